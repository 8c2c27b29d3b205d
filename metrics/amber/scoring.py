"""AMBER by exact words: what descriptions invent and cover, and how yes/no questions are answered.

What it is: plain functions over prediction rows that follow AMBER's counting (Wang et al. 2023,
arXiv 2311.07397) without a tagger and without a table of similar words: the variant `amber_exact`.
What it is not: a reproduction of published AMBER numbers; the card says what differs.

    from firsthand.metrics import amber
    truth = amber.read_truth("AMBER/data")       # annotations.json, relation.json, safe_words.txt
    amber.score(rows, truth, skip_bad=False, details=False)
    amber.pairs(rows, truth, skip_bad=False)     # columns for intervals
    amber.pair_ids(rows, truth, skip_bad=False)  # the row id of each
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .truth import KINDS, Truth, make_truth, read_queries, read_responses, read_truth

__all__ = [
    "KINDS",
    "Truth",
    "make_truth",
    "pair_ids",
    "pairs",
    "read_queries",
    "read_responses",
    "read_truth",
    "score",
]

Row = Mapping[str, Any]
VARIANT = "amber_exact"
ATTRIBUTES = ("state", "number", "action")
FIGURES = ("accuracy", "precision", "recall", "f1")
PLURAL_ONLY = frozenset({"can", "hot", "leave"})
"""AMBER's words that are hardly ever nouns as they stand ("can be seen"): found as cans, leaves."""

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_YES_NO = re.compile(r"[\W_]*(yes|no)\b", re.IGNORECASE)
_IRREGULAR = {"man": "men", "child": "children", "goose": "geese", "mouse": "mice"}
_IRREGULAR |= {"ife": "ives", "lf": "lves", "arf": "arves"}  # knife, shelf, scarf


class Noun(NamedTuple):
    """A counted word: `text[start:end]`, AMBER's word for it, and whether the image lacks it."""

    start: int
    end: int
    node: str
    hallucinated: bool


class Described(NamedTuple):
    """A description: its row, counted words, and targets covered of those there are."""

    row: Row
    nouns: list[Noun]
    covered: int
    shown: int
    imagined: int
    imaginable: int


class Answered(NamedTuple):
    """An answered question: its row, kind, right answer and what was said (None: neither)."""

    row: Row
    kind: str
    gold: str
    said: str | None


def score(
    rows: Iterable[Row], truth: Truth, skip_bad: bool = False, details: bool = False
) -> dict[str, Any]:
    """AMBER's figures of descriptions and of yes/no answers, whichever the rows hold.

    Args:
        rows: prediction rows `{id, prediction}` or AMBER's own `{id, response}` of one model, ids
            being AMBER's (a number or its digits); rows with an `error` are counted, not scored.
        truth: of `read_truth(folder)` or `make_truth(...)`.
        skip_bad: leave out rows that cannot be scored (an unknown id, a second row of one, no text)
            instead of raising; `skipped` then lists `{id, reason}`.
        details: add `responses`: per description `{id, words, spans, nodes, hallucinated}` (words
            and character spans of the prediction), per answer `{id, kind, answer, parsed}`.

    Returns:
        Fractions in 0..1. Descriptions: `amber_chair` (hallucinated words / counted words; lower is
        better), `amber_cover` (objects covered / objects shown; higher), `amber_hal` (descriptions
        with a hallucinated word / descriptions; lower), `amber_cog` (often imagined objects named /
        often imagined objects; lower). Answers, "no" being the positive class: `amber_accuracy`,
        `amber_precision`, `amber_recall`, `amber_f1` (higher), and the same of each kind asked
        about: `amber_existence_f1`, ..., of `state, number, action`, of `attribute` (these three)
        and of `relation`. An answer that begins with neither yes nor no is wrong and is counted in
        `n_unparsed`. Also `n_generative, n_discriminative, n_empty` (no word at all), `n_silent`
        (descriptions without a counted word), `n_errors, n_skipped` and `variant`. A ratio without
        a denominator is NaN.

    Raises:
        ValueError: unknown or duplicate ids, rows without id.
        TypeError: a prediction that is no string.
    """
    described, answered, n_errors, skipped = _judged(rows, truth, skip_bad)
    columns = _columns(described, answered)
    result: dict[str, Any] = {name: _ratio(column) for name, column in columns.items()}
    texts = [_text(row) for row in [*(d.row for d in described), *(a.row for a in answered)]]
    result |= {
        "n_generative": len(described),
        "n_discriminative": len(answered),
        "n_unparsed": sum(one.said is None for one in answered),
        "n_empty": sum(not text.strip() for text in texts),
        "n_silent": sum(not one.nouns for one in described),
        "n_errors": n_errors,
        "n_skipped": len(skipped),
        "variant": VARIANT,
    }
    if skip_bad:
        result["skipped"] = skipped
    if details:
        made = [_description_detail(one) for one in described]
        result["responses"] = made + [_answer_detail(one) for one in answered]
    return result


def pairs(rows: Iterable[Row], truth: Truth, skip_bad: bool = False) -> dict[str, np.ndarray]:
    """Per-response (numerator, denominator) columns [n, 2], for bootstrap intervals.

    Names as in `score`, without those of which the rows hold nothing. Arguments and errors as in
    `score`.
    """
    described, answered, _, _ = _judged(rows, truth, skip_bad)
    return {n: column for n, column in _columns(described, answered).items() if len(column)}


def pair_ids(rows: Iterable[Row], truth: Truth, skip_bad: bool = False) -> dict[str, list[Any]]:
    """The id of each row of `pairs`. Arguments and errors as in `score`."""
    described, answered, _, _ = _judged(rows, truth, skip_bad)
    found = dict.fromkeys(_GENERATIVE, [one.row["id"] for one in described])
    for kind, chosen in _by_kind(answered).items():
        found |= dict.fromkeys(_names(kind), [one.row["id"] for one in chosen])
    return {name: ids for name, ids in found.items() if ids}


def _judged(
    rows: Iterable[Row], truth: Truth, skip_bad: bool
) -> tuple[list[Described], list[Answered], int, list[dict[str, Any]]]:
    """Descriptions, answers, the number of failed rows, and what was skipped and why."""
    forms = spellings(truth)
    described, answered, skipped, n_errors = [], [], [], 0
    seen: set[str] = set()
    for row in rows:
        fault = _fault(row, seen, truth)
        if fault and not skip_bad:
            raise fault
        seen.add(str(row.get("id")))
        if fault:
            skipped.append({"id": row.get("id"), "reason": str(fault)})
        elif row.get("error"):
            n_errors += 1
        else:
            annotation = truth.annotations[_amber_id(row["id"])]
            if annotation["type"] == "generative":
                described.append(_described(row, annotation, truth, forms))
            else:
                match = _YES_NO.match(_text(row))
                said = match.group(1).lower() if match else None
                kind = KINDS[annotation["type"]]
                answered.append(Answered(row, kind, annotation["truth"], said))
    return described, answered, n_errors, skipped


def _fault(row: Row, seen: set[str], truth: Truth) -> ValueError | TypeError | None:
    """Why a row cannot be scored, if so."""
    if "id" not in row:
        return ValueError(
            f"Every row needs id and prediction (or response); one has {sorted(row)}."
        )
    if str(row["id"]) in seen:
        return ValueError(
            f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
        )
    if _amber_id(row["id"]) not in truth.annotations:
        return ValueError(
            f"AMBER has no id {row['id']!r}; its annotations hold {len(truth.annotations)}, e.g. "
            f"{', '.join(map(str, list(truth.annotations)[:3]))}."
        )
    if not row.get("error") and not isinstance(_text(row), str):
        return TypeError(
            f"Row {row['id']!r}: the prediction is of type {type(_text(row)).__name__}, not str. A "
            "prediction that failed belongs in a row with `error`."
        )
    return None


def _amber_id(given: Any) -> Any:
    """AMBER's number of a row: JSON may write 42 as "42"."""
    return int(given) if isinstance(given, str) and given.isdecimal() else given


def _text(row: Row) -> Any:
    return row["prediction"] if "prediction" in row else row.get("response")


def spellings(truth: Truth) -> dict[str, str]:
    """Spelling, lower case -> AMBER's word: each word and its plural, and the singular of a plural.

    Exact words come first, so that no derived spelling hides one of AMBER's.
    """
    related = truth.relation
    words = sorted({*related, *(word for others in related.values() for word in others)})
    forms = {word: word for word in words if word not in PLURAL_ONLY}
    for word in words:
        for form in _inflected(word):
            forms.setdefault(form, word)
    return forms


def _inflected(word: str) -> list[str]:
    forms = [word.removesuffix(e) + many for e, many in _IRREGULAR.items() if word.endswith(e)]
    if re.search(r"[^aeiou]y\Z", word):
        return [*forms, word[:-1] + "ies"]
    if re.search(r"(?:s|x|z|ch|sh)\Z", word):
        singular = [] if word.endswith(("ss", "us")) else [word.removesuffix("s")]
        return [*forms, word + "es", *singular]
    return [*forms, word + "s", *([word + "es"] if word.endswith("o") else [])]


def _described(
    row: Row, annotation: Mapping[str, Any], truth: Truth, forms: Mapping[str, str]
) -> Described:
    shown = _targets(annotation["truth"], truth.relation)
    imaginable = _targets(annotation["hallu"], truth.relation)
    nouns, covered, imagined = [], set(), set()
    for match in _WORD.finditer(_text(row)):
        node = forms.get(match.group().lower())
        if node is None:
            continue
        counted = node not in truth.safe_words
        if counted and node in shown:
            covered.add(shown[node])
        elif counted and node in imaginable:
            imagined.add(imaginable[node])
        nouns.append(Noun(match.start(), match.end(), node, counted and node not in shown))
    n_shown, n_imaginable = len(annotation["truth"]), len(annotation["hallu"])
    return Described(row, nouns, len(covered), n_shown, len(imagined), n_imaginable)


def _targets(objects: list[str], relation: Mapping[str, list[str]]) -> dict[str, int]:
    """Word -> the object it covers: associates before objects themselves, the first one wins."""
    found: dict[str, int] = {}
    for i, name in enumerate(objects):
        for associate in relation[name]:
            found.setdefault(associate, i)
    for i, name in enumerate(objects):
        found.setdefault(name, i)
    return found


_GENERATIVE = ("amber_chair", "amber_cover", "amber_hal", "amber_cog")


def _by_kind(answered: list[Answered]) -> dict[str, list[Answered]]:
    """All answers under "", and those of each kind that was asked about."""
    groups = {"": answered}
    for kind in ("existence", "attribute", *ATTRIBUTES, "relation"):
        kinds = ATTRIBUTES if kind == "attribute" else (kind,)
        chosen = [one for one in answered if one.kind in kinds]
        if chosen:
            groups[kind] = chosen
    return groups


def _columns(described: list[Described], answered: list[Answered]) -> dict[str, np.ndarray]:
    """Every figure's numerators and denominators, [responses, 2]."""
    false = [sum(noun.hallucinated for noun in one.nouns) for one in described]
    counts = [
        [(n, len(one.nouns)) for n, one in zip(false, described, strict=True)],
        [(one.covered, one.shown) for one in described],
        [(n > 0, 1) for n in false],
        [(one.imagined, one.imaginable) for one in described],
    ]
    columns = {
        name: np.array(column, dtype=float).reshape(-1, 2)
        for name, column in zip(_GENERATIVE, counts, strict=True)
    }
    for kind, chosen in _by_kind(answered).items():
        columns |= zip(_names(kind), _answer_columns(chosen), strict=True)
    return columns


def _names(kind: str) -> list[str]:
    return [f"amber_{kind}_{name}" if kind else f"amber_{name}" for name in FIGURES]


def _answer_columns(answered: list[Answered]) -> list[np.ndarray]:
    """`FIGURES` of "no", [answers, 2] each."""
    gold = np.array([one.gold == "no" for one in answered], dtype=float)
    said = np.array([one.said == "no" for one in answered], dtype=float)
    right = np.array([one.said == one.gold for one in answered], dtype=float)
    hit, each = gold * said, np.ones(len(answered))
    figures = ((right, each), (hit, said), (hit, gold), (2 * hit, said + gold))
    return [np.stack(pair, axis=1) for pair in figures]


def _description_detail(one: Described) -> dict[str, Any]:
    text = _text(one.row)
    return {
        "id": one.row["id"],
        "words": [text[noun.start : noun.end] for noun in one.nouns],
        "spans": [(noun.start, noun.end) for noun in one.nouns],
        "nodes": [noun.node for noun in one.nouns],
        "hallucinated": [noun.hallucinated for noun in one.nouns],
    }


def _answer_detail(one: Answered) -> dict[str, Any]:
    return {"id": one.row["id"], "kind": one.kind, "answer": one.gold, "parsed": one.said}


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
