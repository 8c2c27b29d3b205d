"""POPE: balanced yes/no questions about objects that are, or are not, in an image.

What it is: the score (Li et al. 2023, arXiv 2305.10355, section 5), plain functions over rows,
under any of the ways in use to read an answer (`PARSER_NAMES`). What it is not: a model runner;
answers come as prediction rows. Questions are built and read in `questions`.

    from firsthand.metrics import pope
    questions = pope.build_questions(objects, n_per_image=6, strategy="adversarial", seed=0)
    pope.score(pope.join(questions, answers))                    # or by a legacy parser:
    pope.score(rows, parser="opera", skip_bad=True, details=True)
    pope.pairs(rows, parser, skip_bad)                           # columns for intervals
    pope.pair_ids(rows, parser, skip_bad)                        # the row id of each
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .questions import (
    Answer,
    build_questions,
    existence_question,
    join,
    read_questions,
    sample_images,
)

__all__ = [
    "PARSERS",
    "PARSER_NAMES",
    "build_questions",
    "existence_question",
    "join",
    "pair_ids",
    "pairs",
    "parse_strict",
    "read_answer",
    "read_questions",
    "sample_images",
    "score",
]

Row = Mapping[str, Any]
_ANSWERS: dict[str, Answer] = {"yes": "yes", "no": "no"}


def parse_strict(text: str) -> Answer | None:
    """`yes` or `no` if the text begins with that word, in any case; else None.

    >>> parse_strict("Yes, there is."), parse_strict("Not sure."), parse_strict("There is no dog.")
    ('yes', None, None)
    """
    match = re.match(r"[\W_]*(yes|no)\b", text, re.IGNORECASE)
    return _ANSWERS[match.group(1).lower()] if match else None


def parse_pope(text: str) -> Answer:
    """As POPE's own script reads: `no` if the first sentence has the token No, no or not, else yes.

    It takes "NO" and "I cannot see a dog." for yes; kept to compare with published numbers.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_opera(text: str) -> Answer:
    """As OPERA reads: `no` if any word is No, no, NO or not, or ends in n't; else yes.

    The whole answer counts: "The image shows a dog. It is not a cat." is a no.
    """
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = {"No", "not", "no", "NO"} & set(words) or any(w.endswith("n't") for w in words)
    return "no" if negative else "yes"


def parse_exact(text: str) -> Answer | None:
    """Only the bare word counts, as in lmms-eval: "Yes." with its full stop is unparsed."""
    return _ANSWERS.get(text.strip().lower())


PARSERS: dict[str, Callable[[str], Answer | None]] = {
    "strict": parse_strict,
    "pope": parse_pope,
    "opera": parse_opera,
    "lmms_eval": parse_exact,
    "exact": parse_exact,
}
"""How an answer is read, by name; `lmms_eval` and `exact` are one."""

PARSER_NAMES = (*PARSERS, "vcd")
"""What `score` takes; VCD's reading needs the right answer too, see `read_answer`."""


def read_answer(text: str, gold: Answer, parser: str = "strict") -> Answer | None:
    """How the parser reads an answer; None if it cannot.

    `vcd` looks at the right answer, as VCD's script does: right if that stands anywhere in the
    text ("no" in "cannot"), else the opposite. A sentence that says neither is thus always wrong.

    >>> read_answer("A dog is present.", "yes", "vcd"), read_answer("I cannot see.", "no", "vcd")
    ('no', 'no')
    """
    if parser != "vcd":
        return PARSERS[parser](text)
    opposite: dict[Answer, Answer] = {"yes": "no", "no": "yes"}
    return gold if gold in text.lower() else opposite[gold]


def score(
    rows: Iterable[Row], parser: str = "strict", skip_bad: bool = False, details: bool = False
) -> dict[str, Any]:
    """Score answered questions; "yes" is the positive class.

    Args:
        rows: `{id, prediction, answer}` rows, `answer` being "yes" or "no" ("Yes." is fine); rows
            that carry an `error` are counted, not scored.
        parser: one of `PARSER_NAMES`.
        skip_bad: leave out rows that cannot be scored (a second row of an id, no text, an answer
            that is neither yes nor no) instead of raising; `skipped` then lists `{id, reason}`.
        details: add `answers`: per scored row `{id, image_id, answer, parsed}`, parsed being None
            where it is unparsed; image_id only where the row has one.

    Returns:
        Fractions in 0..1: `pope_accuracy, precision, recall, f1` (higher is better) and
        `pope_yes_ratio` (predicted yes / all; near the share of gold yes, 0.5 if balanced, is
        better). An unparsed prediction is neither yes nor no, hence always wrong; `n_unparsed`
        counts them. Further `n`, `n_errors`, `n_skipped`, `parser`. A ratio without a denominator
        is NaN.

    Raises:
        ValueError: unknown parser, duplicate ids, or an `answer` that is neither yes nor no.
        TypeError: a prediction that is no string.
    """
    parsed, n_errors, skipped = _parsed(rows, parser, skip_bad)
    columns = _columns(parsed)
    result: dict[str, Any] = {
        "pope_accuracy": _ratio(columns["pope_accuracy"]),
        "precision": _ratio(columns["pope_precision"]),
        "recall": _ratio(columns["pope_recall"]),
        "f1": _ratio(columns["pope_f1"]),
        "pope_yes_ratio": _ratio(columns["pope_yes_ratio"]),
        "n_unparsed": sum(said is None for _, _, said in parsed),
        "n": len(parsed),
        "n_errors": n_errors,
        "n_skipped": len(skipped),
        "parser": parser,
    }
    if skip_bad:
        result["skipped"] = skipped
    if details:
        result["answers"] = [_detail(row, gold, said) for row, gold, said in parsed]
    return result


def pairs(
    rows: Iterable[Row], parser: str = "strict", skip_bad: bool = False
) -> dict[str, np.ndarray]:
    """Per-question (numerator, denominator) columns [n, 2] of every figure, for bootstrap
    intervals.

    Names: pope_accuracy, pope_precision, pope_recall, pope_f1, pope_yes_ratio. Resample images, not
    questions (`groups=[image_of[i] for i in pair_ids(rows)[name]]`). Arguments and errors as in
    `score`.
    """
    return _columns(_parsed(rows, parser, skip_bad)[0])


def pair_ids(
    rows: Iterable[Row], parser: str = "strict", skip_bad: bool = False
) -> dict[str, list[Any]]:
    """The id of each row of `pairs`. Arguments and errors as in `score`."""
    parsed = _parsed(rows, parser, skip_bad)[0]
    return dict.fromkeys(_columns([]), [row["id"] for row, _, _ in parsed])


Parsed = tuple[Row, Answer, Answer | None]


def _parsed(
    rows: Iterable[Row], parser: str, skip_bad: bool
) -> tuple[list[Parsed], int, list[dict[str, Any]]]:
    """(row, gold, said) of scorable rows, the number of failed ones, and what was skipped."""
    if parser not in PARSER_NAMES:
        raise ValueError(f"Unknown parser {parser!r}; choose one of {', '.join(PARSER_NAMES)}.")
    parsed: list[Parsed] = []
    seen: set[Any] = set()
    skipped, n_errors = [], 0
    for row in rows:
        gold = parse_strict(str(row.get("answer")))
        fault = _fault(row, seen, gold)
        if fault and not skip_bad:
            raise fault
        seen.add(row.get("id"))
        if fault or gold is None:
            skipped.append({"id": row.get("id"), "reason": str(fault)})
        elif row.get("error"):
            n_errors += 1
        else:
            parsed.append((row, gold, read_answer(row["prediction"], gold, parser)))
    return parsed, n_errors, skipped


def _fault(row: Row, seen: set[Any], gold: Answer | None) -> ValueError | TypeError | None:
    """Why a row cannot be scored, if so."""
    if "id" not in row or "answer" not in row:
        return ValueError(f"Every row needs id, answer and prediction; one has {sorted(row)}.")
    if row["id"] in seen:
        return ValueError(
            f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
        )
    if gold is None:
        return ValueError(f"Row {row['id']!r}: the answer {row['answer']!r} is no yes or no.")
    if not row.get("error") and not isinstance(row.get("prediction"), str):
        return TypeError(
            f"Row {row['id']!r}: the prediction is of type {type(row.get('prediction')).__name__}, "
            "not str. A prediction that failed belongs in a row with `error`."
        )
    return None


def _detail(row: Row, gold: Answer, said: Answer | None) -> dict[str, Any]:
    ids = {name: row[name] for name in ("id", "image_id") if name in row}
    return ids | {"answer": gold, "parsed": said}


def _columns(parsed: list[Parsed]) -> dict[str, np.ndarray]:
    gold = np.array([gold == "yes" for _, gold, _ in parsed], dtype=float)
    yes = np.array([said == "yes" for _, _, said in parsed], dtype=float)
    right = np.array([said == gold for _, gold, said in parsed], dtype=float)
    hit, one = gold * yes, np.ones(len(parsed))
    figures = {
        "pope_accuracy": (right, one),
        "pope_precision": (hit, yes),
        "pope_recall": (hit, gold),
        "pope_f1": (2 * hit, yes + gold),
        "pope_yes_ratio": (yes, one),
    }
    return {name: np.stack(columns, axis=1) for name, columns in figures.items()}


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
