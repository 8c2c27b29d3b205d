"""Each statistic against its slow textbook form, by area; running means against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
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

shares = st.integers(0, 4).map(lambda n: n / 4)
rows = st.lists(st.tuples(st.integers(0, 6), shares), min_size=1, max_size=12)


def slow_ranks(values):
    return [
        1 + sum(other < one for other in values) + (sum(other == one for other in values) - 1) / 2
        for one in values
    ]


def slow_spearman(attention, coverage):
    a, b = np.array(slow_ranks(attention)), np.array(slow_ranks(coverage))
    if len(set(attention)) < 2 or len(set(coverage)) < 2:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def slow_auroc(attention, coverage):
    won = possible = 0.0
    for one, inside in zip(attention, coverage, strict=True):
        for other, covered in zip(attention, coverage, strict=True):
            weight = inside * (1 - covered)
            possible += weight
            won += weight * (1.0 if one > other else 0.5 if one == other else 0.0)
    return won / possible if possible else math.nan


def slow_average_precision(attention, coverage):
    total = 0.0
    for one, inside in zip(attention, coverage, strict=True):
        above = [c for other, c in zip(attention, coverage, strict=True) if other >= one]
        total += inside * sum(above) / len(above)
    return total / sum(coverage) if sum(coverage) else math.nan


def slow_energy(attention, coverage):
    if not sum(attention) or not sum(coverage):
        return math.nan
    inside = sum(a * c for a, c in zip(attention, coverage, strict=True)) / sum(attention)
    return inside / (sum(coverage) / len(coverage))


def slow_pointing(attention, coverage):
    best = [c for a, c in zip(attention, coverage, strict=True) if a == max(attention)]
    return sum(best) / len(best) if sum(coverage) else math.nan


SLOW = {
    "spearman": slow_spearman,
    "auroc": slow_auroc,
    "average_precision": slow_average_precision,
    "energy_ratio": slow_energy,
    "pointing_game": slow_pointing,
}


@settings(max_examples=200, deadline=None)
@given(rows)
def test_all_equal_their_textbook_form(pairs):
    attention = [float(a) for a, _ in pairs]
    coverage = [c for _, c in pairs]
    found = statistics(np.array(attention), np.array(coverage))
    assert set(found) == set(STATISTICS) == set(SLOW)
    for name, slow in SLOW.items():
        expected = slow(attention, coverage)
        assert found[name] == pytest.approx(expected, abs=1e-9, nan_ok=True), name


def test_many_heads_at_once_equal_one_by_one():
    attention = np.random.default_rng(0).random((3, 4, 5, 16)).round(1)
    coverage = np.random.default_rng(1).integers(0, 3, 16) / 2
    whole = statistics(attention, coverage)
    for place in np.ndindex(3, 4, 5):
        for name, value in statistics(attention[place], coverage).items():
            assert whole[name][place] == pytest.approx(value, nan_ok=True)
    again = statistics(ordered(attention), coverage)
    assert all(np.array_equal(whole[n], again[n], equal_nan=True) for n in whole)


def test_the_published_ceiling_of_spearman_under_ties():
    """Perfect attention reaches 0.75 for a mask of a quarter and 0.38 for one of a twentieth."""
    for share, ceiling in ((0.25, 0.75), (0.05, 0.38)):
        coverage = np.zeros(400)
        coverage[: int(400 * share)] = 1
        attention = np.linspace(1, 0, 400)
        found = statistics(attention, coverage)
        assert found["spearman"] == pytest.approx(ceiling, abs=0.01)
        assert found["auroc"] == 1 and found["average_precision"] == 1


@given(rows)
def test_no_attention_beats_the_ceiling(pairs):
    coverage = np.array([c for _, c in pairs])
    best = ceilings(coverage)
    for name, value in statistics(np.array([float(a) for a, _ in pairs]), coverage).items():
        assert math.isnan(value) or value <= best[name] + 1e-9 or math.isnan(best[name])


def test_ranks_share_ties():
    assert ranks(ordered([[3, 1, 3, 2]])).tolist() == [[3.5, 1.0, 3.5, 2.0]]


def test_rows_that_are_not_finite_have_no_value():
    found = statistics(np.array([[1.0, np.nan], [1.0, 2.0]]), np.array([0.0, 1.0]))
    assert all(np.isnan(v[0]) and not np.isnan(v[1]) for v in found.values())


def test_wrong_coverage_is_refused():
    for wrong in ([0.5], [0.5, 1.5], [0.5, np.nan]):
        with pytest.raises(ValueError, match="must hold one share"):
            statistics(np.ones(2), np.array(wrong))


def test_running_means_leave_nan_out():
    values = np.random.default_rng(0).random((7, 2, 3))
    values[2, 0, 0] = values[:, 1, 1] = np.nan
    values[1:, 1, 2] = np.nan
    grid = Grid((2, 3))
    for one in values:
        grid.add(one)
    known = (~np.isnan(values)).sum(0)
    assert np.array_equal(grid.count, known)
    with np.errstate(all="ignore"):
        mean = np.nanmean(np.where(known > 0, values, np.nan), 0) if known.all() else None
    expected = [[np.nanmean(c) if not np.isnan(c).all() else np.nan for c in r] for r in
                values.transpose(1, 2, 0)]  # fmt: skip
    np.testing.assert_allclose(grid.mean, expected)
    error = grid.standard_error
    clean = values[:, 0, 1]
    assert error[0, 1] == pytest.approx(clean.std(ddof=1) / math.sqrt(7)) and mean is None
    assert np.isnan(error[1, 1]) and np.isnan(error[1, 2])


def test_means_over_tokens():
    assert mean_over_tokens(np.array([[1.0, np.nan, 3.0], [np.nan] * 3])).tolist()[0] == 2.0
    assert np.isnan(mean_over_tokens(np.array([np.nan])))
