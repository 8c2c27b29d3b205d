"""Result rows: every number with its interval, its n and the protocol it was measured under.

What it is: the only bootstrap, the only result row and the only results file of firsthand. What it
is not: a metric; metrics hand over per-row (numerator, denominator) columns through their `pairs`.

    rows = result_rows(chair.pairs(captions, objects), arm="plain", split="test", protocol=p)
    write_results("results.json", rows)
    print(table(rows))
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "bootstrap",
    "mean",
    "paired_difference",
    "protocol",
    "ratio",
    "read_results",
    "result_row",
    "result_rows",
    "table",
    "write_results",
]

Interval = tuple[float, float, float]
Statistic = Callable[[np.ndarray], np.ndarray]

FIELDS = ("arm", "metric", "split", "value", "low", "high", "n", "protocol")
LIBRARIES = ("firsthand", "numpy", "torch", "transformers")
_DRAWS_AT_ONCE = 1 << 20


def mean(means: np.ndarray) -> np.ndarray:
    """The statistic of one column: its mean. [..., 1] -> [...]."""
    return means[..., 0]


def ratio(means: np.ndarray) -> np.ndarray:
    """The statistic of (numerator, denominator) columns: sum / sum, NaN for x / 0.

    [..., 2] -> [...].
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(means[..., 1] == 0, np.nan, means[..., 0] / means[..., 1])


def bootstrap(
    values: Any,
    statistic: Statistic = mean,
    n: int = 1000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """A statistic of rows and its 95 % percentile bootstrap interval.

    Args:
        values: [rows] or [rows, columns] numbers, one row per caption, question or pair.
        statistic: `mean`, `ratio`, or any function of the columns' means ([..., columns] -> [...]).
        n: number of resamples.
        seed: of the resampling; equal arguments give equal intervals.
        groups: one key per row (say the image id): whole groups are resampled, since the
            questions of one image are not independent.

    Returns:
        (value, low, high). NaN without rows, or where the statistic is undefined; resamples in
        which it is undefined (no mention drawn) are left out.

    Raises:
        ValueError: values that are not finite, of the wrong shape, or groups of another length.
    """
    return _interval(_totals(values, groups), partial(_apply, statistic), n, seed)


def _interval(totals: np.ndarray, statistic: Statistic, n: int, seed: int) -> Interval:
    """`bootstrap` of a statistic of sums of `_totals`."""
    if len(totals) == 0:
        return math.nan, math.nan, math.nan
    value = float(statistic(totals.sum(axis=0)))
    if math.isnan(value):
        return math.nan, math.nan, math.nan
    drawn = statistic(_resampled_sums(totals, n, np.random.default_rng(seed)))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return value, float(low), float(high)


def _apply(statistic: Statistic, sums: np.ndarray) -> np.ndarray:
    """The statistic of sums whose last column is the number of rows.

    A ratio of sums is one of means, and of counts it is exact: the figure that the metric gives.
    """
    if statistic is ratio:
        return ratio(sums[..., :-1])
    return statistic(sums[..., :-1] / sums[..., -1:])


def paired_difference(
    a: Any,
    b: Any,
    statistic: Statistic = mean,
    n: int = 1000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """statistic(a) - statistic(b) for two arms measured on the same rows, with its interval.

    Both arms are resampled together, so what makes a row hard for both cancels. The difference is
    significant at the 5 % level where the interval excludes 0. Row i of `a` and of `b` must be
    the same question. Other arguments and errors as in `bootstrap`.
    """
    a, b = _as_columns(a), _as_columns(b)
    if a.shape != b.shape:
        raise ValueError(
            f"Paired arms need the same rows and columns, got {a.shape} and {b.shape}. Keep only "
            "the ids that both have, in one order."
        )
    width = a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        of_a = sums[..., [*range(width), -1]]
        return _apply(statistic, of_a) - _apply(statistic, sums[..., width:])

    totals = _totals(np.concatenate([a, b], axis=1), groups)
    return _interval(totals, difference, n, seed)


def _as_columns(values: Any) -> np.ndarray:
    columns = np.asarray(values, dtype=float)
    if columns.ndim == 1:
        columns = columns[:, None]
    if columns.ndim != 2:
        raise ValueError(f"Expected shape [rows] or [rows, columns], got {columns.shape}.")
    if not np.isfinite(columns).all():
        raise ValueError("Some values are NaN or infinite. Leave those rows out and count them.")
    return columns


def _totals(values: Any, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Per unit of resampling the sums of all columns, and last its number of rows."""
    columns = _as_columns(values)
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    if groups is None:
        return columns
    if len(groups) != len(columns):
        raise ValueError(f"{len(groups)} groups for {len(columns)} rows; give one per row.")
    index = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    totals = np.zeros((len(index), columns.shape[1]))
    np.add.at(totals, [index[key] for key in groups], columns)
    return totals


def _resampled_sums(totals: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, columns]: sums over resamples with replacement, drawn in blocks of bounded memory."""
    size = len(totals)
    step = max(1, _DRAWS_AT_ONCE // size)
    sums = []
    for start in range(0, n, step):
        block = min(step, n - start)
        drawn = rng.integers(0, size, (block, size)) + size * np.arange(block)[:, None]
        times = np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size)
        sums.append(times @ totals)
    return np.concatenate(sums)


def protocol(
    ids: Iterable[Any],
    *,
    prompt: str | None = None,
    decoding: str = "greedy",
    max_new_tokens: int | None = None,
    lexicon_hash: str | None = None,
    variant: str | None = None,
    truth_hash: str | None = None,
    seed: int | None = None,
    libraries: Sequence[str] = LIBRARIES,
) -> dict[str, Any]:
    """The fingerprint of a measurement: equal `fingerprint`, comparable numbers.

    Args:
        ids: of the scored rows, in any order.
        prompt: the question or its template, if there is one.
        decoding: how answers were decoded.
        max_new_tokens: the bound of an answer's length.
        lexicon_hash, variant: the metric's word list (`Lexicon.hash`) or parser.
        truth_hash: of the ground truth, where that can be made in several ways.
        seed: of whatever was drawn (questions, decoding).
        libraries: distributions whose versions are recorded; not part of the fingerprint, since
            they change without changing the measurement.

    Returns:
        A JSON-ready dict of the above with `ids_hash`, `n_ids`, `versions` and `fingerprint`.
    """
    listed = sorted(str(i) for i in ids)
    measured: dict[str, Any] = {
        "ids_hash": _digest(listed),
        "n_ids": len(listed),
        "prompt": prompt,
        "decoding": decoding,
        "max_new_tokens": max_new_tokens,
        "lexicon_hash": lexicon_hash,
        "variant": variant,
        "seed": seed,
    }
    if truth_hash is not None:
        measured["truth_hash"] = truth_hash
    return measured | {"versions": _versions(libraries), "fingerprint": _digest(measured)}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _versions(libraries: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def result_row(
    metric: str, interval: Interval, n: int, *, arm: str, split: str, protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """One result: `{arm, metric, split, value, low, high, n, protocol}`.

    Args:
        metric: its snake-case name, e.g. `chair_i`.
        interval: (value, low, high) of `bootstrap`.
        n: number of rows behind the value.
        arm: `plain`, `steered`, `shuffled` or a method's name.
        split: of the data, e.g. `test_prior`.
        protocol: of `protocol`.
    """
    value, low, high = interval
    return {
        "arm": arm,
        "metric": metric,
        "split": split,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "protocol": dict(protocol),
    }


def result_rows(
    pairs: Mapping[str, np.ndarray],
    *,
    arm: str,
    split: str,
    protocol: Mapping[str, Any],
    groups: Sequence[Hashable] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Result rows of a metric's `pairs`: per name the ratio of sums, its interval and its n.

    `groups` (one key per row) as in `bootstrap`; n is the number of rows.
    """
    return [
        result_row(
            metric,
            bootstrap(columns, ratio, n_resamples, seed, groups),
            len(columns),
            arm=arm,
            split=split,
            protocol=protocol,
        )
        for metric, columns in pairs.items()
    ]


def write_results(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write result rows as JSON, whole or not at all; NaN becomes null.

    Raises:
        ValueError: a row that lacks a field or has one too many.
    """
    rows = [_checked(row, "a row to write") for row in rows]
    text = json.dumps([_nan_to_none(row) for row in rows], indent=1, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_results` wrote; null becomes NaN.

    Raises:
        ValueError: a file that holds something else.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, list):
        raise ValueError(f"{path} holds no list of result rows.")
    rows = [_checked(row, str(path)) for row in content]
    return [row | {k: math.nan for k in ("value", "low", "high") if row[k] is None} for row in rows]


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) or set(row) != set(FIELDS):
        fields = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where}: a result row has the fields {list(FIELDS)}, got {fields}.")
    return {field: row[field] for field in FIELDS}


def _nan_to_none(row: Mapping[str, Any]) -> dict[str, Any]:
    bare = {k: None for k in ("value", "low", "high") if row[k] is None or math.isnan(row[k])}
    return dict(row) | bare


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table: a line per metric and split, a column per arm, `value [low, high] (n)`."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["metric"], row["split"]), {})[row["arm"]] = _cell(row)
    arms = list(dict.fromkeys(arm for line in cells.values() for arm in line))
    lines = [["metric", "split", *arms], ["---"] * (2 + len(arms))]
    lines += [[*key, *(line.get(arm, "") for arm in arms)] for key, line in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Mapping[str, Any]) -> str:
    if math.isnan(row["value"]):
        return f"undefined (n={row['n']})"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] (n={row['n']})"
