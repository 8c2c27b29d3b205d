"""Visual reliance: how much of a score is lost when the regions that matter are removed.

What it is: plain functions over paired answers to one question under several views of its image
(FiVL, arXiv 2412.14672, section on the visual reliance score; the relative form is deduced from
its table). What it is not: the maker of the masked images; see `firsthand.processing.masks`.

    from firsthand.metrics import visual_reliance
    visual_reliance.score(rows)  # every id under "plain" and "masked", perhaps "control" and
    "blank"
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "AREAS",
    "CONDITIONS",
    "answer_score",
    "by_area",
    "pair_ids",
    "pairs",
    "score",
    "vqa_score",
]

Row = Mapping[str, Any]

CONDITIONS = {
    "plain": "the image as it is",
    "masked": "without the key regions",
    "control": "without regions of equal area elsewhere",
    "outside": "the key regions alone, without all else",
    "blank": "without any content: what the language prior alone answers",
}
AREAS = (0.05, 0.1, 0.2, 0.3)  # upper ends of the table's bins, as shares of the image


def score(rows: Iterable[Row]) -> dict[str, Any]:
    """Visual reliance of paired answers.

    Args:
        rows: `{id, condition, ...}` with a key of `CONDITIONS`, and either `score` (0..1), or
            `prediction` and `answers` (a list, see `vqa_score`) or `answer` (see `answer_score`).
            Ids without a masked row (nothing to mask) are counted and left out; "outside" and
            "blank" may be missing altogether, "control" also for some ids (where there was no room
            elsewhere). An id with an `error` in one of its rows is left out and counted.

    Returns:
        `visual_reliance` = (plain - masked) / plain, at most 1, higher: relies more on the key
        regions; `absolute_drop` = plain - masked; `control_adjusted` = (control - masked) /
        plain over the ids that have a control: the part that is not due to damaging the image;
        `normalised` = (plain - masked) /
        (plain - blank): 1 if removing the regions costs as much as removing the image;
        `flip_rate`: share of right answers (score >= 0.5) that turn wrong; `score_<condition>`:
        means, `score_blank` being the floor of the language prior; `n` ids used, `n_control`,
        `n_unmasked`, `n_errors`. NaN where a condition is missing or a denominator is 0.

    Raises:
        ValueError: an unknown condition, an id twice under one, a changed id without its plain row,
            rows of another condition for other ids than the masked ones, or a score outside 0..1.
        TypeError: a prediction or answer that is no string.
    """
    views, _, n_unmasked, n_errors = _views(rows)
    columns = _columns(views)
    result: dict[str, Any] = {name: _ratio(column) for name, column in columns.items()}
    for condition in CONDITIONS:
        seen = views[condition][~np.isnan(views[condition])]
        result[f"score_{condition}"] = float(seen.mean()) if len(seen) else math.nan
    n_control = int((~np.isnan(views["control"])).sum())
    counts = {"n": len(views["plain"]), "n_control": n_control}
    return result | counts | {"n_unmasked": n_unmasked, "n_errors": n_errors}


def by_area(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Visual reliance for key regions of like size: larger ones cost more as such.

    Args:
        rows: as in `score`; masked rows carry `area`, the regions' share of the image, 0..1.

    Returns:
        For each bin (up to 0.05, 0.1, 0.2, 0.3 and above) `{low, high}` (shares), and
        `visual_reliance, control_adjusted, n` of `score`. Rows without `area` are in no bin.
    """
    rows = list(rows)
    areas = {r["id"]: r["area"] for r in rows if r["condition"] == "masked" and "area" in r}
    table = []
    for low, high in zip((0.0, *AREAS), (*AREAS, 1.0), strict=True):
        chosen = {i for i, area in areas.items() if low <= area <= high and (area > low or not low)}
        found = score(r for r in rows if r["id"] in chosen)
        names = ("visual_reliance", "control_adjusted", "n")
        table.append({"low": low, "high": high} | {name: found[name] for name in names})
    return table


def pairs(rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """Per-question (numerator, denominator) columns [n, 2], for bootstrap intervals.

    Names: visual_reliance, absolute_drop, flip_rate and, where their condition is there,
    control_adjusted and normalised. Arguments and errors as in `score`.
    """
    return {name: column for name, column in _columns(_views(rows)[0]).items() if len(column)}


def pair_ids(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """The id of each row of `pairs`, to resample what belongs together (say an image's questions).

    Arguments and errors as in `score`.
    """
    views, ids, _, _ = _views(rows)
    has = [i for i, value in zip(ids, views["control"], strict=False) if not math.isnan(value)]
    columns = _columns(views)
    return {
        name: has if name == "control_adjusted" else ids for name in columns if len(columns[name])
    }


def answer_score(prediction: str, answer: str) -> float:
    """1.0 if the prediction begins with the answer's words (case and punctuation aside), else 0.0.

    >>> answer_score("Yes, a dog.", "Yes."), answer_score("top left", "Top right.")
    (1.0, 0.0)
    """
    said, gold = (re.findall(r"\w+", text.lower()) for text in (prediction, answer))
    return float(bool(gold) and said[: len(gold)] == gold)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """VQA's accuracy of a short answer against several people's: 0 to 1.

    Mean over the people of min(1, equal answers of the others / 3) (VQA, arXiv 1505.00468, section
    5); case, punctuation and articles aside.

    >>> vqa_score("A dog.", ["dog"] * 2 + ["cat"] * 8)
    0.6
    """
    said, gold = _short(prediction), [_short(answer) for answer in answers]
    same = sum(one == said for one in gold)
    parts = [min(1.0, (same - (one == said)) / 3) for one in gold]
    return round(sum(parts) / len(parts), 6) if parts else 0.0


def _short(text: str) -> str:
    words = re.findall(r"[\w']+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _views(rows: Iterable[Row]) -> tuple[dict[str, np.ndarray], list[Any], int, int]:
    """Scores per condition over the ids that count, and these; numbers of unmasked and failed."""
    scores: dict[str, dict[Any, float]] = {condition: {} for condition in CONDITIONS}
    failed = set()
    for row in rows:
        condition = row["condition"]
        if condition not in scores:
            raise ValueError(f"Unknown condition {condition!r}; use {', '.join(CONDITIONS)}.")
        if row["id"] in scores[condition]:
            raise ValueError(f"The id {row['id']!r} occurs twice under {condition!r}.")
        if row.get("error"):
            failed.add(row["id"])
        scores[condition][row["id"]] = math.nan if row.get("error") else _row_score(row)
    _require_pairs(scores)
    used = [i for i in scores["masked"] if i not in failed]
    views = {
        condition: np.array([found.get(i, math.nan) for i in used] if found else [], dtype=float)
        for condition, found in scores.items()
    }
    n_unmasked = len(set(scores["plain"]) - set(scores["masked"]) - failed)
    return views, used, n_unmasked, len(failed)


def _row_score(row: Row) -> float:
    if "score" in row:
        value = float(row["score"])
        if not 0 <= value <= 1:
            raise ValueError(f"Row {row['id']!r}: the score {value} is outside 0..1.")
        return value
    if "answers" in row:
        return vqa_score(row["prediction"], row["answers"])
    for field in ("prediction", "answer"):
        if not isinstance(row[field], str):
            raise TypeError(
                f"Row {row['id']!r}: `{field}` is of type {type(row[field]).__name__}, not str. "
                "Give strings, or a `score`."
            )
    return answer_score(row["prediction"], row["answer"])


def _require_pairs(scores: Mapping[str, Mapping[Any, float]]) -> None:
    masked = set(scores["masked"])
    if alone := sorted(str(i) for i in masked - set(scores["plain"])):
        raise ValueError(
            f"{len(alone)} masked ids have no plain row, e.g. {', '.join(alone[:3])}. Answer the "
            "same questions under both conditions."
        )
    for condition in ("control", "outside", "blank"):
        found = set(scores[condition])
        differ = sorted(
            str(i) for i in (found - masked if condition == "control" else found ^ masked)
        )
        if scores[condition] and differ:
            raise ValueError(
                f"The {condition!r} rows cover other ids than the masked ones, e.g. "
                f"{', '.join(differ[:3])}. Answer the same questions under each condition."
            )


def _columns(views: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    plain, masked = views["plain"], views["masked"]
    right = (plain >= 0.5).astype(float)
    nothing = np.zeros((0, 2))
    columns = {
        "visual_reliance": np.stack([plain - masked, plain], axis=1),
        "absolute_drop": np.stack([plain - masked, np.ones(len(plain))], axis=1),
        "flip_rate": np.stack([right * (masked < 0.5), right], axis=1),
        "control_adjusted": nothing,
        "normalised": nothing,
    }
    if len(views["control"]):
        has = ~np.isnan(views["control"])
        change = views["control"][has] - masked[has]
        columns["control_adjusted"] = np.stack([change, plain[has]], axis=1)
    if len(views["blank"]):
        columns["normalised"] = np.stack([plain - masked, plain - views["blank"]], axis=1)
    return columns


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
