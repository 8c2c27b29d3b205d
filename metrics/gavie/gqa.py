"""LRV's judged accuracy on GQA: is a free answer right, given the right one? A judge says.

What it is: requests, a strict reader of replies, and the share of answers judged right (Liu et al.
2023, arXiv 2306.14565, who judged 500 GQA questions), for answers too free to be compared word by
word. What it is not: GQA's own accuracy, which is exact match; nor the original prompt, which put
two models' answers side by side: here each has its own.

    from firsthand.metrics.gavie import gqa
    rated = gqa.rate(rows, judge_of(endpoint, gqa.parse, **gqa.SETTINGS))
    gqa.score(rated)
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from .prompts import Message, Row
from .scoring import SETTINGS, Judge, ratio, sort_rows

__all__ = [
    "PROMPT_HASH",
    "SETTINGS",
    "build_requests",
    "pair_ids",
    "pairs",
    "parse",
    "rate",
    "score",
]

NAME = "gqa_judged_accuracy"
SYSTEM = """\
You check short answers to questions about images. You cannot see the image: the right answer is \
given, and it is right."""

QUESTION = """\
Question: {question}
Right answer: {answer}
Answer to check: {prediction}

Is the answer to check right? It may be longer, or in other words; it is right if it means what \
the right answer means and contradicts it nowhere. Naming several answers to choose from is wrong.

Reply with one JSON object and nothing else, the reason first, in one sentence: \
{{"reason": "...", "correct": true or false}}"""

PROMPT_HASH = hashlib.sha256((SYSTEM + QUESTION).encode()).hexdigest()[:12]
"""First 12 hexadecimal digits of the prompt's SHA-256; belongs into every report."""


def build_requests(rows: Iterable[Row]) -> list[list[Message]]:
    """A request to the judge for each row `{question, answer, prediction}`: two chat messages.

    Raises:
        TypeError: one of these fields is missing or no string; the row is named.
    """
    return [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": _question(row)}]
        for row in rows
    ]


def _question(row: Row) -> str:
    if reason := _unaskable(row):
        raise TypeError(reason)
    return QUESTION.format(**{name: row[name] for name in ("question", "answer", "prediction")})


def _unaskable(row: Row) -> str | None:
    """Why a judge cannot be asked about the row, if so."""
    for name in ("question", "answer", "prediction"):
        if not isinstance(row.get(name), str):
            kind = type(row.get(name)).__name__
            return f"Row {row.get('id')!r}: `{name}` is of type {kind}, not str."
    return None


def parse(reply: str) -> dict[str, Any]:
    """The judge's `{"correct": bool, "reason": str}`; nothing else is guessed at.

    >>> parse('{"reason": "Same animal.", "correct": true}')
    {'correct': True, 'reason': 'Same animal.'}

    Raises:
        ValueError: a reply that is no such JSON object.
    """
    try:
        found = json.loads(reply)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"the reply is not JSON: {error}") from error
    if not isinstance(found, dict) or set(found) != {"correct", "reason"}:
        raise ValueError('expected a JSON object {"correct": ..., "reason": ...} and nothing else')
    if not isinstance(found["correct"], bool) or not isinstance(found["reason"], str):
        raise ValueError("`correct` must be true or false, and `reason` text")
    return {"correct": found["correct"], "reason": found["reason"]}


def rate(rows: Iterable[Row], judge: Judge, skip_bad: bool = False) -> list[dict[str, Any]]:
    """The rows with `correct` and `reason`; where nothing could be read, with `unparsed`: why.

    Rows with an `error` or with `correct` are left as they are and not asked about.

    Args:
        rows: as in `build_requests`.
        judge: asked once, with all requests.
        skip_bad: a row that cannot be asked about gets an `error` instead of raising.

    Raises:
        ValueError: a judge that gives another number of replies.
        TypeError: as in `build_requests`, before anything is asked.
    """
    rated = [dict(row) for row in rows]
    for row in rated if skip_bad else ():
        if "correct" not in row and (reason := _unaskable(row)):
            row["error"] = row.get("error") or reason
    asked = [row for row in rated if not row.get("error") and "correct" not in row]
    requests = build_requests(asked)
    replies = judge(requests) if requests else []
    if len(replies) != len(asked):
        raise ValueError(f"The judge gave {len(replies)} replies to {len(asked)} requests.")
    for row, reply in zip(asked, replies, strict=True):
        row.pop("unparsed", None)
        try:
            row |= parse(reply) if reply is not None else {"unparsed": "the request failed"}
        except ValueError as error:
            row |= {"unparsed": str(error), "reply": reply}
    return rated


def score(rows: Iterable[Row], skip_bad: bool = False) -> dict[str, Any]:
    """Share of rated answers that the judge called right.

    Args:
        rows: of `rate`.
        skip_bad: leave out rows that cannot be scored instead of raising; `skipped` lists them.

    Returns:
        `gqa_judged_accuracy` (0..1, higher is better), `n`, `n_unparsed` (in no figure, never a
        0), `n_errors`, `n_skipped`, `prompt_hash`. NaN where nothing was rated.

    Raises:
        ValueError: duplicate ids, rows without id or `correct`.
    """
    rated, counts, skipped = sort_rows(rows, skip_bad, _fault)
    result = {NAME: ratio(_column(rated))} | counts | {"prompt_hash": PROMPT_HASH}
    return result | ({"skipped": skipped} if skip_bad else {})


def pairs(rows: Iterable[Row], skip_bad: bool = False) -> dict[str, np.ndarray]:
    """Per-answer (numerator, denominator) columns [n, 2]. Arguments and errors as in `score`."""
    return {NAME: _column(sort_rows(rows, skip_bad, _fault)[0])}


def pair_ids(rows: Iterable[Row], skip_bad: bool = False) -> dict[str, list[Any]]:
    """The id of each row of `pairs`. Arguments and errors as in `score`."""
    return {NAME: [row["id"] for row in sort_rows(rows, skip_bad, _fault)[0]]}


def _fault(row: Row) -> str | None:
    if isinstance(row.get("correct"), bool):
        return None
    return f"Row {row['id']!r} was not judged. Ask a judge first: gqa.rate(rows, judge)."


def _column(rated: list[Row]) -> np.ndarray:
    return np.array([(float(row["correct"]), 1.0) for row in rated]).reshape(-1, 2)
