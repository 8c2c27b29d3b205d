"""CHAIR: the share of objects that captions mention and images do not show.

What it is: plain functions over prediction rows (Rohrbach et al. 2018, arXiv 1809.02156, section
3), with the spans of every counted word. What it is not: a source of ground truth or of
intervals; objects come from the caller, intervals from `firsthand.metrics.results`.

    from firsthand.metrics import chair
    chair.score(rows, objects)                                  # COCO names, CHAIR's own word list
    chair.score(rows, objects, chair.lexicon_from_nouns(nouns)) # any objects
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from .coco import COCO
from .lexicon import Lexicon, Mention, lexicon_from_nouns

__all__ = [
    "COCO",
    "Lexicon",
    "lexicon_from_nouns",
    "pairs",
    "position_accuracy",
    "position_pairs",
    "score",
]

Row = Mapping[str, Any]

_POSITION_WORDS = {
    "top": "top",
    "upper": "top",
    "bottom": "bottom",
    "lower": "bottom",
    "left": "left",
    "right": "right",
    "center": "center",
    "centre": "center",
    "middle": "center",
}
_CLAUSE_END = re.compile(r"[.,;:!?\n]|\b(?:and|while|with)\b")
_POSITION = re.compile(
    r"\b(?:(top|upper|bottom|lower)[\s-]*(left|right)|center|centre|middle)\b", re.IGNORECASE
)


def score(
    rows: Iterable[Row],
    objects: Mapping[Any, Iterable[str]],
    lexicon: Lexicon = COCO,
    details: bool = False,
) -> dict[str, Any]:
    """CHAIR of captions against the objects that their images show.

    Args:
        rows: prediction rows `{id, image_id, question, prediction}` of one model under one
            condition; rows that carry an `error` are counted, not scored. `n_tokens`, where every
            row has it, is the caption's length.
        objects: image id -> names of the objects it shows (nouns or synonyms of the lexicon).
        lexicon: which words name which object.
        details: add `captions`: per caption `{id, image_id, words, spans, nodes, hallucinated}`,
            where `words[i] == prediction[spans[i][0]:spans[i][1]]` and `hallucinated[i]` is a bool.

    Returns:
        Fractions in 0..1: `chair_s` (captions with a hallucinated object / captions; lower is
        better), `chair_i` (hallucinated mentions / mentions; lower is better), `recall` (objects
        mentioned / objects shown; higher is better); `mean_length` in the unit `length_unit`
        ("words" between blanks, or "tokens"); counts `n_captions, n_mentions, n_hallucinated,
        n_objects, n_errors`; `variant` and `lexicon_hash`. A ratio without a denominator (no
        object mentioned anywhere) is NaN.

    Raises:
        ValueError: duplicate ids, image ids without ground truth, or objects the lexicon does not
            know.
        TypeError: a caption that is no string.
    """
    rows, n_errors = _checked(rows)
    judged = _judge(rows, objects, lexicon)
    columns = _columns(rows, judged)
    result: dict[str, Any] = {name: _ratio(column) for name, column in columns.items()}
    result |= {
        "length_unit": _length_unit(rows),
        "n_captions": len(rows),
        "n_mentions": int(columns["chair_i"][:, 1].sum()),
        "n_hallucinated": int(columns["chair_i"][:, 0].sum()),
        "n_objects": int(columns["recall"][:, 1].sum()),
        "n_errors": n_errors,
        "variant": lexicon.name,
        "lexicon_hash": lexicon.hash,
    }
    if details:
        result["captions"] = [_detail(row, *found) for row, found in zip(rows, judged, strict=True)]
    return result


def pairs(
    rows: Iterable[Row], objects: Mapping[Any, Iterable[str]], lexicon: Lexicon = COCO
) -> dict[str, np.ndarray]:
    """Per-caption (numerator, denominator) columns [n, 2] of every figure, for bootstrap intervals.

    `sum(numerators) / sum(denominators)` of a column is the figure that `score` returns under its
    name: chair_s, chair_i, recall, mean_length. Arguments and errors as in `score`.
    """
    rows, _ = _checked(rows)
    return _columns(rows, _judge(rows, objects, lexicon))


def position_accuracy(
    rows: Iterable[Row], scenes: Mapping[Any, Iterable[Row]], lexicon: Lexicon | None = None
) -> float:
    """Share of the scenes' objects that captions name with their right position (0..1, higher is
    better).

    A position ("top left", "bottom-right", "center") belongs to the object named last before it
    within the clause: "a dog top left, a cup center." An object that is not mentioned counts as
    missed.

    Args:
        rows: prediction rows, as for `score`.
        scenes: image id -> objects `{noun, position}`.
        lexicon: default: an open lexicon of the scenes' nouns.

    Returns:
        The fraction; NaN where the scenes hold no object.
    """
    return _ratio(position_pairs(rows, scenes, lexicon))


def position_pairs(
    rows: Iterable[Row], scenes: Mapping[Any, Iterable[Row]], lexicon: Lexicon | None = None
) -> np.ndarray:
    """Per caption (objects with the right position, objects shown), [n, 2], for intervals."""
    rows, _ = _checked(rows)
    _require_known_images(rows, scenes)
    truth = {row["image_id"]: list(scenes[row["image_id"]]) for row in rows}
    nouns = sorted({thing["noun"] for things in truth.values() for thing in things})
    if not nouns:
        return np.zeros((len(rows), 2))
    lexicon = lexicon or lexicon_from_nouns(nouns)
    counts = []
    for row in rows:
        shown = Counter(
            (lexicon.node(thing["noun"]), _position(thing["position"]))
            for thing in truth[row["image_id"]]
        )
        right = shown & Counter(_placed(row["prediction"], lexicon))
        counts.append((right.total(), shown.total()))
    return np.array(counts, dtype=float).reshape(-1, 2)


def _placed(text: str, lexicon: Lexicon) -> list[tuple[str, str]]:
    """(node, position) of every mention that a position follows within its clause."""
    found = []
    mentions = lexicon.mentions(text)
    for mention, following in zip_longest(mentions, mentions[1:]):
        end = following.start if following else len(text)
        clause = _CLAUSE_END.split(text[mention.end : end], maxsplit=1)[0]
        if match := _POSITION.search(clause):
            found.append((mention.node, _position(match.group())))
    return found


def _position(phrase: str) -> str:
    """`Top-left`, `upper left` -> `top left`."""
    words = re.split(r"[\s-]+", phrase.strip().lower())
    if not set(words) <= set(_POSITION_WORDS):
        raise ValueError(f"{phrase!r} is no position like 'top left', 'bottom right', 'center'.")
    return " ".join(_POSITION_WORDS[word] for word in words)


def _checked(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The scorable rows and the number of failed ones; refuses what cannot be scored."""
    good, seen, n_errors = [], set(), 0
    for row in rows:
        if row["id"] in seen:
            raise ValueError(
                f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
            )
        seen.add(row["id"])
        if row.get("error"):
            n_errors += 1
        elif not isinstance(row["prediction"], str):
            raise TypeError(
                f"Row {row['id']!r}: the prediction is of type {type(row['prediction']).__name__}, "
                "not str. A prediction that failed belongs in a row with `error`."
            )
        else:
            good.append(row)
    return good, n_errors


def _require_known_images(rows: list[Row], truth: Mapping[Any, Any]) -> None:
    missing = sorted({str(row["image_id"]) for row in rows if row["image_id"] not in truth})
    if missing:
        raise ValueError(
            f"No ground truth for {len(missing)} image ids, e.g. {', '.join(missing[:3])}: all "
            "they mention would count as hallucinated. Check that rows and ground truth use the "
            "same ids, of the same type."
        )


Judged = tuple[list[Mention], frozenset[str]]


def _judge(rows: list[Row], objects: Mapping[Any, Iterable[str]], lexicon: Lexicon) -> list[Judged]:
    """Per caption its mentions and the nodes that its image shows."""
    _require_known_images(rows, objects)
    shown: dict[Any, frozenset[str]] = {}
    for image_id in {row["image_id"] for row in rows}:
        if isinstance(objects[image_id], str):
            raise TypeError(f"Image {image_id!r}: objects must be a list of names, not one string.")
        shown[image_id] = frozenset(lexicon.node(name) for name in objects[image_id])
    return [(lexicon.mentions(row["prediction"]), shown[row["image_id"]]) for row in rows]


def _columns(rows: list[Row], judged: list[Judged]) -> dict[str, np.ndarray]:
    counts = []
    for row, (mentions, shown) in zip(rows, judged, strict=True):
        nodes = [mention.node for mention in mentions]
        false = sum(node not in shown for node in nodes)
        found = len(shown.intersection(nodes))
        counts.append((false, len(nodes), found, len(shown), row.get("n_tokens", 0)))
    table = np.array(counts, dtype=float).reshape(-1, 5)
    one = np.ones(len(rows))
    if _length_unit(rows) == "words":
        table[:, 4] = [len(row["prediction"].split()) for row in rows]
    return {
        "chair_s": np.stack([table[:, 0] > 0, one], axis=1),
        "chair_i": table[:, [0, 1]],
        "recall": table[:, [2, 3]],
        "mean_length": np.stack([table[:, 4], one], axis=1),
    }


def _length_unit(rows: list[Row]) -> str:
    return "tokens" if rows and all("n_tokens" in row for row in rows) else "words"


def _detail(row: Row, mentions: list[Mention], shown: frozenset[str]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "image_id": row["image_id"],
        "words": [row["prediction"][m.start : m.end] for m in mentions],
        "spans": [(m.start, m.end) for m in mentions],
        "nodes": [m.node for m in mentions],
        "hallucinated": [m.node not in shown for m in mentions],
    }


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
