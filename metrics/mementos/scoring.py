"""Mementos: which objects and behaviours of an image sequence a description tells of.

What it is: plain functions that find keywords in descriptions, merge synonyms, and compare the sets
with the reference's, image by image (Wang et al. 2024, arXiv 2401.10529). What it is not: the
original's extraction of keywords by a language model; give its lists as rows if you have them.

    from firsthand.metrics import mementos
    keywords = {"objects": [["person", "man"], ["dog"]], "behaviours": [["walk", "walking"]]}
    mementos.score(rows, references, keywords, skip_bad=False, details=False)
    mementos.pairs(rows, references, keywords, skip_bad=False)     # columns for intervals
    mementos.pair_ids(rows, references, keywords, skip_bad=False)  # the row id of each

`references` is `{image_id: description}` or `{image_id: {"objects": [...], "behaviours": [...]}}`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["FIGURES", "PARTS", "find_keywords", "keywords_hash", "pair_ids", "pairs", "score"]

Row = Mapping[str, Any]
Groups = Mapping[str, Iterable[Iterable[str]]]
Judged = tuple[Row, dict[str, tuple[frozenset[str], frozenset[str]]]]
"""A row, and per part the keywords that were said and those of the reference."""

PARTS = ("objects", "behaviours")
FIGURES = ("precision", "recall", "f1")
_BREAK = re.compile(r"[.,;:!?()\n]")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def score(
    rows: Iterable[Row],
    references: Mapping[Any, Any],
    keywords: Groups,
    skip_bad: bool = False,
    details: bool = False,
) -> dict[str, Any]:
    """Precision, recall and F1 of keywords as sets, per image, averaged over images.

    Args:
        rows: prediction rows `{id, image_id, prediction}` of one model, one an image; the
            prediction is a description, or `{"objects": [...], "behaviours": [...]}`. Rows that
            carry an `error` are counted, not scored.
        references: image id -> description or lists, likewise. An id may be a number here and its
            digits there.
        keywords: `{"objects": groups, "behaviours": groups}`, a group being a list of synonyms
            under its first term. In descriptions only these are found, as written or with a final
            s or es; the longest wins. A listed keyword of no group stands for itself.
        skip_bad: leave out rows that cannot be scored (a second row of an id, no text, an image
            without reference) instead of raising; `skipped` then lists `{id, reason}`.
        details: add `images`: per row and part `{id, part, said, missed, invented}`, lists of
            keywords.

    Returns:
        `mementos_objects_precision`, `..._recall`, `..._f1` and the same of `behaviours`, means
        over images in 0..1, higher is better. Precision leaves out images where no keyword was
        said, recall those whose reference has none, F1 those where both are so; NaN if that is all
        of them. `n_silent_<part>` and `n_bare_<part>` count them; `n`, `n_errors`, `n_skipped`,
        `keywords_hash`.

    Raises:
        ValueError: duplicate ids, images without reference, one term in two groups, no groups.
        TypeError: predictions, references or groups of the wrong type.
    """
    judged, n_errors, skipped = _judged(rows, references, keywords, skip_bad)
    columns, _ = _columns(judged)
    result: dict[str, Any] = {name: _ratio(column) for name, column in columns.items()}
    for part in PARTS:
        result[f"n_silent_{part}"] = sum(not sets[part][0] for _, sets in judged)
        result[f"n_bare_{part}"] = sum(not sets[part][1] for _, sets in judged)
    result |= {"n": len(judged), "n_errors": n_errors, "n_skipped": len(skipped)}
    result["keywords_hash"] = keywords_hash(keywords)
    if skip_bad:
        result["skipped"] = skipped
    if details:
        result["images"] = [one for row, sets in judged for one in _details(row, sets)]
    return result


def pairs(
    rows: Iterable[Row], references: Mapping[Any, Any], keywords: Groups, skip_bad: bool = False
) -> dict[str, np.ndarray]:
    """Per-image (value, 1) columns [n, 2] of every figure, for bootstrap intervals.

    An image where the figure is undefined has no row in it. Names, arguments and errors as in
    `score`.
    """
    return _columns(_judged(rows, references, keywords, skip_bad)[0])[0]


def pair_ids(
    rows: Iterable[Row], references: Mapping[Any, Any], keywords: Groups, skip_bad: bool = False
) -> dict[str, list[Any]]:
    """The id of each row of `pairs`. Arguments and errors as in `score`."""
    return _columns(_judged(rows, references, keywords, skip_bad)[0])[1]


def keywords_hash(keywords: Groups) -> str:
    """First 12 hexadecimal digits of the groups' SHA-256, in any order: equal lists, equal hash."""
    tables = {part: sorted(_terms(keywords, part).items()) for part in PARTS}
    return hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:12]


def find_keywords(text: str, terms: Mapping[str, str]) -> frozenset[str]:
    """The keywords that a text names: words of `terms` (lower case term -> keyword).

    A term is found as written or with a final s or es, not across punctuation; of several the
    longest wins.

    >>> sorted(find_keywords("Two dogs eat hot dogs.", {"dog": "dog", "hot dog": "food"}))
    ['dog', 'food']
    """
    longest = max((term.count(" ") + 1 for term in terms), default=0)
    found: set[str] = set()
    for clause in _BREAK.split(text.lower()):
        words, at = _WORD.findall(clause), 0
        while at < len(words):
            size, keyword = _longest(words[at : at + longest], terms)
            if keyword is not None:
                found.add(keyword)
            at += size
    return frozenset(found)


def _longest(words: list[str], terms: Mapping[str, str]) -> tuple[int, str | None]:
    """The longest term that the words begin with: its number of words and its keyword."""
    for size in range(len(words), 0, -1):
        phrase = " ".join(words[:size])
        for form in (phrase, phrase.removesuffix("s"), phrase.removesuffix("es")):
            if form in terms:
                return size, terms[form]
    return 1, None


def _terms(keywords: Groups, part: str) -> dict[str, str]:
    """term -> keyword (the first term of its group), all lower case."""
    if not isinstance(keywords, Mapping) or not set(PARTS) <= set(keywords):
        raise ValueError(f"Keywords are a mapping with {' and '.join(PARTS)}, lists of groups.")
    terms: dict[str, str] = {}
    for group in keywords[part]:
        if isinstance(group, str) or not all(isinstance(term, str) for term in group):
            raise TypeError(f"A group of {part} is a list of synonyms, not {group!r}.")
        normal = [_normal(term) for term in group]
        for term in normal:
            if terms.setdefault(term, normal[0]) != normal[0]:
                raise ValueError(
                    f"{term!r} is in the groups of {terms[term]!r} and {normal[0]!r} of {part}; "
                    "choose one."
                )
    return terms


def _normal(term: str) -> str:
    normal = " ".join(_WORD.findall(term.lower()))
    if not normal:
        raise ValueError(f"The keyword {term!r} has no word. Leave it out.")
    return normal


def _judged(
    rows: Iterable[Row], references: Mapping[Any, Any], keywords: Groups, skip_bad: bool
) -> tuple[list[Judged], int, list[dict[str, Any]]]:
    """Rows with their sets, the number of failed rows, and what was skipped and why."""
    terms = {part: _terms(keywords, part) for part in PARTS}
    if not isinstance(references, Mapping):
        raise TypeError(f"References map image ids, they are no {type(references).__name__}.")
    judged: list[Judged] = []
    seen: set[Any] = set()
    skipped, n_errors = [], 0
    for row in rows:
        fault = _fault(row, seen, references)
        if fault and not skip_bad:
            raise fault
        seen.add(row.get("id"))
        if fault:
            skipped.append({"id": row.get("id"), "reason": str(fault)})
        elif row.get("error"):
            n_errors += 1
        else:
            reference = references[_key(references, row["image_id"])]
            sets = {
                part: (_said(row["prediction"], part, terms), _said(reference, part, terms))
                for part in PARTS
            }
            judged.append((row, sets))
    return judged, n_errors, skipped


def _fault(
    row: Row, seen: set[Any], references: Mapping[Any, Any]
) -> ValueError | TypeError | None:
    """Why a row cannot be scored, if so."""
    if "id" not in row or "image_id" not in row:
        return ValueError(f"Every row needs id and image_id; one has only {sorted(row)}.")
    if row["id"] in seen:
        return ValueError(
            f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
        )
    if row.get("error"):
        return None
    key = _key(references, row["image_id"])
    if key is None:
        known = ", ".join(repr(k) for k in list(references)[:2]) or "none"
        return ValueError(f"No reference for the image id {row['image_id']!r} (known: {known}).")
    for what, given in (("prediction", row.get("prediction")), ("reference", references[key])):
        if not isinstance(given, str) and not _are_lists(given):
            return TypeError(
                f"Row {row['id']!r}: its {what} is neither a description nor lists of "
                f"{' and '.join(PARTS)}, but {type(given).__name__}."
            )
    return None


def _are_lists(given: Any) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(given.get(part), (list, tuple, set, frozenset))
        and all(isinstance(term, str) for term in given[part])
        for part in PARTS
    )


def _key(references: Mapping[Any, Any], image_id: Any) -> Any:
    """The image's key: JSON writes the key 42 as "42". None if there is none."""
    if image_id in references:
        return image_id
    other: Any = str(image_id)
    if isinstance(image_id, str):
        other = int(image_id) if image_id.isdecimal() else None
    return other if other in references else None


def _said(given: Any, part: str, terms: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    if isinstance(given, str):
        return find_keywords(given, terms[part])
    normal = [_normal(term) for term in given[part]]
    return frozenset(terms[part].get(term, term) for term in normal)


def _columns(judged: list[Judged]) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """Every figure's (value, 1) of the images where it is defined, [images, 2], and their ids."""
    columns, ids = {}, {}
    for part in PARTS:
        sizes = [
            (row["id"], len(said & shown), len(said), len(shown))
            for row, sets in judged
            for said, shown in [sets[part]]
        ]
        ratios = {
            "precision": [(i, hit, said) for i, hit, said, _ in sizes],
            "recall": [(i, hit, shown) for i, hit, _, shown in sizes],
            "f1": [(i, 2 * hit, said + shown) for i, hit, said, shown in sizes],
        }
        for name, ratio in ratios.items():
            defined = [(i, top / bottom) for i, top, bottom in ratio if bottom]
            values = [(value, 1.0) for _, value in defined]
            columns[f"mementos_{part}_{name}"] = np.array(values, dtype=float).reshape(-1, 2)
            ids[f"mementos_{part}_{name}"] = [i for i, _ in defined]
    return columns, ids


def _details(
    row: Row, sets: Mapping[str, tuple[frozenset[str], frozenset[str]]]
) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "part": part,
            "said": sorted(said),
            "missed": sorted(shown - said),
            "invented": sorted(said - shown),
        }
        for part, (said, shown) in sets.items()
    ]


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
