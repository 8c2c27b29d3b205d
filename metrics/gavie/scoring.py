"""GAVIE with prompts of our own: a judge marks answers for relevance and accuracy, 0 to 10 each.

What it is: requests for a judge, a strict reader of its replies, and the scores (Liu et al. 2023,
arXiv 2306.14565): mean relevance, mean accuracy, and the spread of several samples of one judge.
The judge never sees the image; it reads dense captions with their boxes. What it is not: a client
of a server; the judge is a function, see `firsthand.recipes.judge`. Nor the original prompt: marks
compare among results of one judge, one mode and one `PROMPT_HASH` only.

    from firsthand.metrics import gavie
    judge = judge_of(endpoint, gavie.parse, **gavie.SETTINGS)  # firsthand.recipes.judge
    rated = gavie.rate(rows, [judge])  # adds `ratings`, or `unparsed`
    gavie.score(rated)
    gavie.pairs(rated)     # columns for intervals
    gavie.pair_ids(rated)  # the row id of each
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from .prompts import BBOX_FORMATS, PROMPT_HASH, build_request, is_number, unaskable
from .replies import HIGHEST, MARKS, parse

__all__ = [
    "BBOX_FORMATS",
    "PROMPT_HASH",
    "SETTINGS",
    "build_request",
    "from_records",
    "pair_ids",
    "pairs",
    "parse",
    "rate",
    "rate_jointly",
    "score",
]

Row = Mapping[str, Any]
Message = dict[str, str]
Judge = Callable[[list[list[Message]]], Sequence[str | None]]
"""Lists of chat messages -> a reply each, in order; None where the request failed."""

SETTINGS = {"temperature": 0.0, "max_tokens": 512, "response_format": {"type": "json_object"}}
"""What the judge's endpoint is asked for."""
RULE_JUDGE = "rule_judge"  # marks that no language model gave, see `rules`


def rate(
    rows: Iterable[Row],
    judges: Sequence[Judge],
    bbox_format: str = "fixed",
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """The rows with `ratings`, one a sample that could be read; with `unparsed` where none could.

    Each answer stands in a prompt of its own, so its marks do not hang on other models. Samples
    that could not be read are in `unread`, `{reason, reply}` each. Rows with an `error` or with
    `ratings` are left as they are and not asked about.

    Args:
        rows: `{question, prediction, regions}`, see `build_request`.
        judges: one a sample, each asked once with all requests. For n samples of one model give n
            functions that ask with different seeds.
        bbox_format: see `build_request`.
        skip_bad: a row that cannot be asked about gets an `error` with the reason instead of
            raising.

    Raises:
        ValueError: no judge, or one that gives another number of replies.
        TypeError: as in `build_request`, before anything is asked.
    """
    rated = [dict(row) for row in rows]
    _set_aside(rated, skip_bad)
    _ask([[row] for row in rated if _is_open(row)], judges, bbox_format, seed=0)
    return rated


def rate_jointly(
    arms: Mapping[str, Iterable[Row]],
    judges: Sequence[Judge],
    bbox_format: str = "fixed",
    seed: int = 0,
    skip_bad: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """`rate` for several models' answers in one prompt, as the published figures were made.

    Marks then hang on which models share the prompt. The order is drawn anew for each id and
    sample. An id that not all arms have answered is judged for none: its rows get an `error`.

    Args:
        arms: name -> rows; an id stands for one question in all of them.
        judges, bbox_format, skip_bad: as in `rate`.
        seed: of the orders.

    Raises:
        ValueError: as in `rate`; fewer than two arms; an id that occurs twice in an arm, or
            (without `skip_bad`) that an arm lacks; one that stands for two questions; arms that
            were judged already.
        TypeError: as in `build_request`, before anything is asked.
    """
    if len(arms) < 2:
        raise ValueError(f"Answers of {len(arms)} model cannot be judged jointly: use `rate`.")
    rated = {arm: [dict(row) for row in rows] for arm, rows in arms.items()}
    by_id: dict[Any, dict[str, dict[str, Any]]] = {}
    for arm, rows in rated.items():
        _set_aside(rows, skip_bad)
        for row in rows:
            if "ratings" in row:
                raise ValueError(f"{arm}: row {row.get('id')!r} was judged already: score it.")
            if arm in by_id.setdefault(row.get("id"), {}):
                raise ValueError(f"{arm}: the id {row.get('id')!r} occurs twice.")
            by_id[row.get("id")][arm] = row
    groups = [list(found.values()) for found in by_id.values()]
    for found in by_id.values():
        _close_incomplete(found, list(rated), skip_bad)
    _ask([group for group in groups if all(map(_is_open, group))], judges, bbox_format, seed)
    return rated


def _close_incomplete(found: dict[str, dict[str, Any]], arms: list[str], skip_bad: bool) -> None:
    """Give the rows of an id an `error` where not all arms have a usable answer to it."""
    lacking = [arm for arm in arms if arm not in found]
    first = next(iter(found.values()))
    if lacking and not skip_bad:
        raise ValueError(f"The id {first.get('id')!r} is missing in {', '.join(lacking)}.")
    lacking += [arm for arm, row in found.items() if row.get("error")]
    for row in found.values() if not lacking else ():
        if (row["question"], row.get("image_id")) != (first["question"], first.get("image_id")):
            raise ValueError(f"The id {first.get('id')!r} stands for two questions or images.")
    for row in found.values() if lacking else ():
        row["error"] = row.get("error") or f"no usable answer of {', '.join(lacking)}"


def _set_aside(rows: list[dict[str, Any]], skip_bad: bool) -> None:
    """Give rows that cannot be asked about an `error`, or raise TypeError at the first."""
    for row in filter(_is_open, rows):
        if reason := unaskable(row):
            if not skip_bad:
                raise TypeError(reason)
            row["error"] = reason


def _is_open(row: Row) -> bool:
    return not row.get("error") and "ratings" not in row


def _ask(
    groups: list[list[dict[str, Any]]], judges: Sequence[Judge], bbox_format: str, seed: int
) -> None:
    """Put every judge's marks into the rows of each group, which share a prompt."""
    if not judges:
        raise ValueError("Give at least one judge, one a sample.")
    for row in (row for group in groups for row in group):
        row.pop("unparsed", None)
        row.update(ratings=[], unread=[])
    for sample, judge in enumerate(judges):
        orders = [_order(group, seed, sample) for group in groups]
        requests = [build_request(order, bbox_format) for order in orders]
        replies = judge(requests) if requests else []
        if len(replies) != len(requests):
            raise ValueError(f"The judge gave {len(replies)} replies to {len(requests)} requests.")
        for order, reply in zip(orders, replies, strict=True):
            _read(order, reply)
    for row in (row for group in groups for row in group):
        if not row["ratings"]:
            del row["ratings"]
            row["unparsed"] = row["unread"][0]["reason"]
        if not row["unread"]:
            del row["unread"]


def _order(group: list[dict[str, Any]], seed: int, sample: int) -> list[dict[str, Any]]:
    order = list(group)
    random.Random(f"{seed}/{sample}/{group[0].get('id')}").shuffle(order)
    return order


def _read(order: list[dict[str, Any]], reply: str | None) -> None:
    try:
        if reply is None:
            raise ValueError("the request failed")
        for row, rating in zip(order, parse(reply, len(order)), strict=True):
            row["ratings"].append(rating)
    except ValueError as error:
        for row in order:
            row["unread"].append({"reason": str(error), "reply": reply})


def score(rows: Iterable[Row], skip_bad: bool = False) -> dict[str, Any]:
    """Mean relevance and accuracy of rated answers, and the spread of their samples.

    Args:
        rows: of `rate`, of one arm of `rate_jointly` or of `rules.rate`.
        skip_bad: leave out rows that cannot be scored (a second row of an id, no or wrong ratings)
            instead of raising; `skipped` then lists `{id, reason}`.

    Returns:
        `gavie_relevance` and `gavie_accuracy`, means over answers of the mean over samples (0..10,
        higher is better; report both or none: obeying a misleading instruction is relevant). With
        two samples or more `gavie_relevance_spread` and `gavie_accuracy_spread`, the mean standard
        deviation among an answer's samples (0..7.1, lower is steadier). `gavie_rule_...` where
        rules gave the marks. `n` rated, `n_unparsed` (no sample could be read: in no figure, never
        a 0), `n_unread` samples of rated answers, `n_errors`, `n_skipped`, `prompt_hash` (of a
        language model's prompts). NaN where nothing was rated.

    Raises:
        ValueError: duplicate ids, rows without id or ratings, marks outside 0..10, rows of which
            only some were rated by rules.
    """
    rated, counts, skipped = sort_rows(rows, skip_bad, _fault)
    result: dict[str, Any] = {name: ratio(column) for name, column in _columns(rated).items()}
    n_unread = sum(len(row.get("unread", ())) for row in rated)
    result |= counts | {"n_unread": n_unread}
    result |= {"prompt_hash": PROMPT_HASH} if _prefix(rated) == "gavie" else {}
    return result | ({"skipped": skipped} if skip_bad else {})


def pairs(rows: Iterable[Row], skip_bad: bool = False) -> dict[str, np.ndarray]:
    """Per-answer (numerator, denominator) columns [n, 2] of every figure, for bootstrap intervals.

    Names, arguments and errors as in `score`.
    """
    return _columns(sort_rows(rows, skip_bad, _fault)[0])


def pair_ids(rows: Iterable[Row], skip_bad: bool = False) -> dict[str, list[Any]]:
    """The id of each row of `pairs`. Arguments and errors as in `score`."""
    rated = sort_rows(rows, skip_bad, _fault)[0]
    return {name: [row["id"] for row in chosen] for name, _, chosen in _figures(rated)}


def from_records(records: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows of LRV's own records: `evaluation_set.json` in any of its forms, or answers to it.

    The question is the record's `question` or `instruction`, the prediction its `answer`, the image
    id its `image_id`, or the name of the file in `image`. The id is the record's place, from 0. A
    record without `answer` is a question to be answered.

    Raises:
        ValueError: a record without question or image, named by its place.
    """
    rows = []
    for i, record in enumerate(records):
        question = record.get("question") or record.get("instruction")
        image = record.get("image_id") or record.get("image")
        if not isinstance(question, str) or not isinstance(image, (str, int)):
            raise ValueError(f"Record {i} has no question or image, but {sorted(record)}.")
        image_id = PurePath(str(image).strip()).name.removesuffix(".jpg")
        row = {"id": i, "image_id": image_id, "question": question.strip()}
        answered = {"prediction": record["answer"]} if "answer" in record else {}
        rows.append(row | answered)
    return rows


def sort_rows(
    rows: Iterable[Row], skip_bad: bool, fault_of: Callable[[Row], str | None]
) -> tuple[list[Row], dict[str, int], list[dict[str, Any]]]:
    """Rated rows, the counts n, n_unparsed, n_errors, n_skipped, and what was skipped and why.

    `fault_of` says why a row's marks cannot be used. Raises ValueError without `skip_bad`.
    """
    rated, skipped, n_unparsed, n_errors = [], [], 0, 0
    seen: set[Any] = set()
    for row in rows:
        fault = _id_fault(row, seen)
        if not fault and not row.get("error") and not row.get("unparsed"):
            fault = fault_of(row)
        if fault and not skip_bad:
            raise ValueError(fault)
        seen.add(row.get("id"))
        if fault:
            skipped.append({"id": row.get("id"), "reason": fault})
        elif row.get("error"):
            n_errors += 1
        elif row.get("unparsed"):
            n_unparsed += 1
        else:
            rated.append(row)
    counts = {"n": len(rated), "n_unparsed": n_unparsed, "n_errors": n_errors}
    return rated, counts | {"n_skipped": len(skipped)}, skipped


def _id_fault(row: Row, seen: set[Any]) -> str | None:
    if "id" not in row:
        return f"Every row needs an id; one has only {sorted(row)}."
    if row["id"] in seen:
        return f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
    return None


def _fault(row: Row) -> str | None:
    """Why the row's ratings cannot be used, if so."""
    ratings = row.get("ratings")
    if not isinstance(ratings, (list, tuple)) or not ratings:
        return f"Row {row['id']!r} has no ratings. Ask a judge first: rate(rows, [judge])."
    for rating in ratings:
        for mark in MARKS:
            value = rating.get(mark) if isinstance(rating, Mapping) else None
            if not is_number(value) or not 0 <= value <= HIGHEST:
                return f"Row {row['id']!r}: {mark} is {value!r}, not a number from 0 to {HIGHEST}."
    return None


def _prefix(rated: list[Row]) -> str:
    """What the figures' names begin with; rules and language models are never averaged."""
    kinds = {row.get("judge") == RULE_JUDGE for row in rated}
    if len(kinds) > 1:
        raise ValueError(f"Only some of the rows were rated by {RULE_JUDGE}: score them apart.")
    return "gavie_rule" if kinds == {True} else "gavie"


def _figures(rated: list[Row]) -> list[tuple[str, Callable[[Row], float], list[Row]]]:
    """Of every figure: its name, its value of a row, and the rows that it is over."""
    several = [row for row in rated if len(row["ratings"]) > 1]
    start = _prefix(rated)
    found = [(f"{start}_{mark}", _mean_of(mark), rated) for mark in MARKS]
    spreads = [(f"{start}_{mark}_spread", _spread_of(mark), several) for mark in MARKS]
    return found + (spreads if several else [])


def _mean_of(mark: str) -> Callable[[Row], float]:
    return lambda row: float(np.mean([rating[mark] for rating in row["ratings"]]))


def _spread_of(mark: str) -> Callable[[Row], float]:
    return lambda row: float(np.std([rating[mark] for rating in row["ratings"]], ddof=1))


def _columns(rated: list[Row]) -> dict[str, np.ndarray]:
    """Every figure's numerators and denominators, [answers, 2]."""
    return {
        name: np.array([(value(row), 1.0) for row in chosen]).reshape(-1, 2)
        for name, value, chosen in _figures(rated)
    }


def ratio(column: np.ndarray) -> float:
    """Sum of numerators by sum of denominators of [n, 2]; NaN without rows."""
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
