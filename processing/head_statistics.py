"""How well attention lands in a mask: statistics of many heads at once, in numpy.

A mask is given as the share of each image token's area that it covers (`masks.patch_coverage`).
Spearman takes it as it is (FiVL, arXiv 2412.14672); the others count area, as if every pixel had
its token's attention: a half-covered token is half inside and half outside, and no threshold is
needed. What it is not: attention (modeling/head_attention.py) or drawing (figures.py).

    statistics(attention, coverage)["auroc"]  # [layers, heads] of attention [layers, heads, N]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

STATISTICS = ("spearman", "auroc", "average_precision", "energy_ratio", "pointing_game")
CHANCE = {"spearman": 0.0, "auroc": 0.5, "energy_ratio": 1.0}  # of attention that is no guide


class Ordered(NamedTuple):
    """Rows in ascending order; ties are groups, whose bounds every member knows.

    Attributes:
        values: [..., N] as they were, float64.
        order: [..., N] indices that sort them.
        first, last: [..., N] in sorted order: the place of the tied group's first and last member.
    """

    values: np.ndarray
    order: np.ndarray
    first: np.ndarray
    last: np.ndarray


def ordered(values: Any) -> Ordered:
    """Sort rows [..., N], N >= 1, once for all statistics. Equal values are tied."""
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(values, axis=-1, kind="stable")
    run = np.take_along_axis(values, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    edge = np.ones(values.shape[:-1] + (1,), dtype=bool)
    changes = run[..., 1:] != run[..., :-1]
    first = np.maximum.accumulate(np.where(np.concatenate([edge, changes], -1), place, 0), -1)
    ends = np.where(np.concatenate([changes, edge], -1), place, values.shape[-1])
    last = np.minimum.accumulate(ends[..., ::-1], -1)[..., ::-1]
    return Ordered(values, order, first, last)


def ranks(rows: Ordered) -> np.ndarray:
    """Ranks 1 to N of rows [..., N]; tied values share their mean rank."""
    found = np.empty(rows.values.shape)
    np.put_along_axis(found, rows.order, (rows.first + rows.last) / 2 + 1, -1)
    return found


def spearman(rows: Ordered, coverage: np.ndarray) -> np.ndarray:
    """Rank correlation with the coverage [N], -1 to 1; NaN where either is constant.

    Ties bound it: attention that separates a mask of 5 % of the tokens perfectly reaches 0.38, so
    it compares heads, not masks of different sizes.
    """
    a, b = ranks(rows), ranks(ordered(coverage))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean()
    return _divide((a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum()))


def auroc(rows: Ordered, coverage: np.ndarray) -> np.ndarray:
    """Chance that a point inside the mask gets more attention than one outside, ties half: 0 to 1.

    0.5 is no guide; NaN where the mask covers nothing or everything.
    """
    inside = coverage[rows.order]
    outside = 1 - inside
    before = _cumulated(outside)
    below = np.take_along_axis(before, rows.first, -1)
    through = np.take_along_axis(before, rows.last + 1, -1)
    won = (inside * (below + through) / 2).sum(-1)
    return _divide(won, coverage.sum() * (1 - coverage).sum())


def average_precision(rows: Ordered, coverage: np.ndarray) -> np.ndarray:
    """Mean share of the mask among what gets at least as much attention as a point in it: 0 to 1.

    Attention that is no guide gets about the mask's share of the area; NaN for an empty mask.
    """
    inside = coverage[rows.order]
    least = coverage.sum() - np.take_along_axis(_cumulated(inside), rows.first, -1)
    precision = least / (coverage.size - rows.first)
    return _divide((inside * precision).sum(-1), coverage.sum())


def energy_ratio(rows: Ordered, coverage: np.ndarray) -> np.ndarray:
    """Share of the image's attention inside the mask over the mask's share of the area, >= 0.

    1 is even attention; NaN for an empty mask or a row without attention to the image.
    """
    share = _divide(rows.values @ coverage, rows.values.sum(-1))
    return _divide(share, coverage.mean())


def pointing_game(rows: Ordered, coverage: np.ndarray) -> np.ndarray:
    """Share of the strongest token's area that lies in the mask (mean of tied ones): 0 to 1.

    That is the chance that a point drawn there hits; NaN for an empty mask.
    """
    strongest = rows.values == rows.values.max(-1, keepdims=True)
    hit = _divide((strongest * coverage).sum(-1), strongest.sum(-1))
    return hit if coverage.any() else np.full_like(hit, np.nan)


def statistics(attention: Any, coverage: Any) -> dict[str, np.ndarray]:
    """All five statistics of rows [..., N] against a coverage [N]: name -> float64 [...].

    Args:
        attention: >= 0, any scale, or rows that `ordered` made, to use them for several masks.
            Rows with a value that is not finite get NaN throughout.
        coverage: 0..1.

    Raises:
        ValueError: when the coverage is not of the rows' length or not in 0..1.
    """
    rows = attention if isinstance(attention, Ordered) else ordered(attention)
    cover = np.asarray(coverage, dtype=np.float64)
    if cover.shape != rows.values.shape[-1:] or not ((cover >= 0) & (cover <= 1)).all():
        raise ValueError(
            f"coverage has shape {cover.shape} for rows of {rows.values.shape[-1]} image tokens; "
            "it must hold one share, 0 to 1, for each of them"
        )
    finite = np.isfinite(rows.values).all(-1)
    compute = (spearman, auroc, average_precision, energy_ratio, pointing_game)
    with np.errstate(invalid="ignore"):
        found = {f.__name__: f(rows, cover) for f in compute}
    return {name: np.where(finite, values, np.nan) for name, values in found.items()}


def ceilings(coverage: Any) -> dict[str, float]:
    """The most that any attention can reach for a coverage [N], since it has a value a token.

    A mask that covers a fifth of one token leaves a pointing game of 0.2 to the best head.
    """
    cover = np.asarray(coverage, dtype=np.float64)
    best = {name: float(value) for name, value in statistics(cover, cover).items()}
    untied = np.argsort(np.argsort(cover, kind="stable"))  # ties only ever lower the precision
    precision = average_precision(ordered(untied), cover)
    energy = _divide(cover.max(), cover.mean())
    return best | {"average_precision": float(precision), "energy_ratio": float(energy)}


def mean_over_tokens(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing else is there. [..., S] -> [...]."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(-1), known.sum(-1))


class Grid:
    """Running mean, count and standard error of every cell [L, H]; NaN values are left out."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = np.zeros(shape, dtype=np.int64)
        self._mean, self._squares = np.zeros(shape), np.zeros(shape)

    def add(self, values: np.ndarray) -> None:
        """One more item: a value a cell, NaN where it has none."""
        known = ~np.isnan(values)
        self.count += known
        change = np.where(known, values - self._mean, 0)
        self._mean = self._mean + change / np.maximum(self.count, 1)
        self._squares = self._squares + np.where(known, change * (values - self._mean), 0)

    @property
    def mean(self) -> np.ndarray:
        """NaN in cells without a value."""
        return np.where(self.count > 0, self._mean, np.nan)

    @property
    def standard_error(self) -> np.ndarray:
        """Of the mean, from the values' spread; NaN in cells with fewer than two values."""
        return np.sqrt(_divide(_divide(self._squares, self.count - 1.0), self.count))


def _cumulated(values: np.ndarray) -> np.ndarray:
    """Sums of the values before each place: [..., N] -> [..., N + 1]."""
    start = np.zeros(values.shape[:-1] + (1,))
    return np.concatenate([start, np.cumsum(values, -1)], -1)


def _divide(above: Any, below: Any) -> np.ndarray:
    """above / below; NaN where below is 0 or less."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    whole = np.full(above.shape, np.nan)
    return np.divide(above, below, out=whole, where=below > 0)
