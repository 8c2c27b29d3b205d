"""Dispersion and grounding consistency, against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.processing.compactness import consistency, dispersion, foreground, similarities


def grid(*lit: tuple[int, int, float], size: int = 5) -> np.ndarray:
    values = np.zeros((size, size))
    for row, column, value in lit:
        values[row, column] = value
    return values


def test_a_cluster_beats_a_stronger_sink():
    values = grid((0, 0, 9.0), (3, 3, 2.0), (4, 4, 1.0))
    kept = foreground(values, top=0.1)  # the three strongest of 25
    assert sorted(map(tuple, np.argwhere(kept))) == [(3, 3), (4, 4)]  # neighbours across a corner


def test_the_heavier_of_equal_clusters_is_kept():
    assert np.argwhere(foreground(grid((0, 0, 1.0), (4, 4, 2.0)), top=0.08)).tolist() == [[4, 4]]


def test_dispersion_by_hand():
    assert dispersion(grid((2, 2, 5.0))) == 0  # all mass in the blob
    values = grid((0, 0, 2.0), (0, 1, 2.0), (4, 0, 1.0), (4, 2, 1.0))
    expected = 2 / 6 * np.log(2) / np.log(23)  # a third of it outside, on two of 23 patches
    assert dispersion(values, top=0.08) == pytest.approx(expected)
    assert dispersion(np.ones((5, 5)), top=0.04) == pytest.approx(24 / 25)
    assert dispersion(np.zeros((5, 5))) == 1


@given(st.integers(0, 10_000), st.floats(0.1, 100))
def test_dispersion_knows_no_scale_and_stays_in_its_range(seed, scale):
    maps = np.random.default_rng(seed).exponential(size=(3, 4, 6))
    found = dispersion(maps)
    assert found.shape == (3,) and (found >= 0).all() and (found <= 1).all()
    assert dispersion(maps * scale) == pytest.approx(found)
    assert dispersion(maps[:, ::-1, ::-1]) == pytest.approx(found)  # nor which way is up


def test_consistency_is_the_mean_of_the_nearest_patches():
    token, patches = np.array([[1.0, 0.0]]), np.array([[[2, 0], [0, 3], [-1, 0], [0, 0]]])
    cosines = similarities(token, patches)
    assert cosines.tolist() == [[1, 0, -1, 0]]
    assert consistency(cosines, top=0.1).tolist() == [1]
    assert consistency(cosines, top=0.5).tolist() == [0.5]


def test_a_top_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"top is 0; it must lie in \(0, 1\]"):
        consistency([[1.0]], top=0)
