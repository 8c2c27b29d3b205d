"""Head statistics against slow textbook loops over pixels, and scipy where it is installed."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firsthand.processing.head_statistics import (
    STATISTICS,
    Grid,
    ceilings,
    mean_over_tokens,
    ordered,
    ranks,
    statistics,
)

PIXELS = 4  # of each token, so that coverages are quarters


@st.composite
def cases(draw):
    """Rows with many ties, and a coverage in quarters that is neither empty nor full."""
    n = draw(st.integers(2, 9))
    rows = draw(
        st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=3)
    )
    quarters = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    if sum(quarters) in (0, 4 * n):
        quarters[0] = 2
    return np.array(rows, float) / 7, np.array(quarters) / 4


def pixels(row, coverage):
    """(attention, inside) of every pixel of a coverage in quarters."""
    return [(a, k < c * PIXELS) for a, c in zip(row, coverage, strict=True) for k in range(PIXELS)]


def slow_auroc(row, coverage):
    inside = [a for a, hit in pixels(row, coverage) if hit]
    outside = [a for a, hit in pixels(row, coverage) if not hit]
    won = [(a > b) + (a == b) / 2 for a, b in product(inside, outside)]
    return sum(won) / len(won)


def slow_average_precision(row, coverage):
    """The mean over pixels of the mask of the precision at their threshold."""
    spots = pixels(row, coverage)
    found = []
    for a in [a for a, hit in spots if hit]:
        chosen = [hit for b, hit in spots if b >= a]
        found.append(sum(chosen) / len(chosen))
    return sum(found) / len(found)


def slow_energy_ratio(row, coverage):
    spots = pixels(row, coverage)
    total = sum(a for a, _ in spots)
    if total == 0:
        return np.nan
    share = sum(a for a, hit in spots if hit) / total
    return share / (sum(hit for _, hit in spots) / len(spots))


def slow_pointing_game(row, coverage):
    spots = pixels(row, coverage)
    best = max(a for a, _ in spots)
    hits = [hit for a, hit in spots if a == best]
    return sum(hits) / len(hits)


def slow_ranks(row):
    return [sum(b < a for b in row) + (sum(b == a for b in row) + 1) / 2 for a in row]


def slow_spearman(row, coverage):
    a, b = slow_ranks(row), slow_ranks(coverage)
    if len(set(a)) == 1 or len(set(b)) == 1:
        return np.nan
    return np.corrcoef(a, b)[0, 1]


SLOW = {name: globals()[f"slow_{name}"] for name in STATISTICS}


@settings(max_examples=60, deadline=None)
@given(cases())
def test_statistics_are_the_textbooks(case):
    rows, coverage = case
    found = statistics(rows, coverage)
    assert set(found) == set(STATISTICS)
    for name, values in found.items():
        expected = [SLOW[name](row, coverage) for row in rows]
        np.testing.assert_allclose(values, expected, atol=1e-12, err_msg=name)


def test_spearman_is_scipys():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    attention, coverage = rng.integers(0, 9, (3, 4, 30)) / 9, rng.integers(0, 3, 30) / 2
    found = statistics(attention, coverage)["spearman"]
    for at in np.ndindex(3, 4):
        expected = scipy_stats.spearmanr(attention[at], coverage).statistic
        assert found[at] == pytest.approx(expected, abs=1e-12)


def test_shapes_and_reuse_of_the_order():
    rng = np.random.default_rng(0)
    attention, coverage = rng.random((2, 3, 4, 10)), rng.random(10)
    found, again = statistics(attention, coverage), statistics(ordered(attention), coverage)
    for name in STATISTICS:
        assert found[name].shape == (2, 3, 4)
        np.testing.assert_array_equal(found[name], again[name])
    np.testing.assert_array_equal(ranks(ordered([[3.0, 1.0, 3.0]])), [[2.5, 1.0, 2.5]])


def test_perfect_attention_reaches_the_ceiling_and_known_values():
    coverage = np.zeros(20)
    coverage[:5] = 1
    found = {k: float(v) for k, v in statistics(coverage, coverage).items()}
    expected = {"spearman": 1, "auroc": 1, "average_precision": 1, "energy_ratio": 4}
    expected |= {"pointing_game": 1}
    assert found == pytest.approx(expected)
    assert ceilings(coverage) == pytest.approx(expected)
    distinct = np.arange(20, 0, -1)
    assert statistics(distinct, coverage)["spearman"] == pytest.approx(0.75, abs=0.01)


@settings(max_examples=30, deadline=None)
@example((np.array([[0, 0, 2, 1.0]]), np.array([0.25, 0.25, 0.5, 0.25])))  # a tie in the mask
@given(cases())
def test_nothing_exceeds_its_ceiling(case):
    rows, coverage = case
    best, found = ceilings(coverage), statistics(rows, coverage)
    for name, values in found.items():
        if not np.isnan(best[name]):
            assert np.nanmax(np.append(values, -1)) <= best[name] + 1e-9, name


def test_undefined_values_are_nan_and_stay_in_their_row():
    coverage = np.array([1.0, 0, 0, 0])
    found = statistics([[0, 0, 0, 0], [1, 2, np.nan, 0], [4, 1, 1, 0]], coverage)
    assert np.isnan(found["spearman"][:2]).all() and np.isnan(found["energy_ratio"][:2]).all()
    assert found["auroc"][0] == 0.5 and np.isnan(found["auroc"][1])
    assert all(np.isfinite(values[2]) for values in found.values())
    assert all(np.isnan(v) for v in statistics([1, 2], [0, 0]).values())
    with pytest.raises(ValueError, match=r"shape \(3,\) for rows of 4"):
        statistics([1, 2, 3, 4], [0, 0, 1])


def test_running_means_leave_nan_out():
    rng = np.random.default_rng(0)
    values = rng.random((7, 2, 3))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[:, 0, 0], values[1:, 0, 1], values[0, 0, 1] = np.nan, np.nan, 5
    grid = Grid((2, 3))
    for one in values:
        grid.add(one)
    known = ~np.isnan(values)
    np.testing.assert_array_equal(grid.count, known.sum(0))
    for at in np.ndindex(2, 3):
        column = values[:, *at][known[:, *at]]
        expected = column.mean() if len(column) else np.nan
        error = column.std(ddof=1) / np.sqrt(len(column)) if len(column) > 1 else np.nan
        np.testing.assert_allclose(grid.mean[at], expected)
        np.testing.assert_allclose(grid.standard_error[at], error)
    np.testing.assert_array_equal(
        mean_over_tokens(np.array([[1, np.nan], [np.nan] * 2])), [1, np.nan]
    )
