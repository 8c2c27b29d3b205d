"""CHAIR: the share of objects that captions mention and images do not show.

What it is: plain functions over prediction rows (Rohrbach et al. 2018, arXiv 1809.02156, section
3), with the spans of every counted word, under any of the `VARIANTS` in use. What it is not: a
source of intervals; those come from `firsthand.metrics.results`.

    from firsthand.metrics import chair
    objects = chair.objects_from_coco("instances_val2014.json", "captions_val2014.json")
    chair.score(rows, objects)                                  # COCO names, CHAIR's own word list
    chair.score(rows, objects, variant="opera")                 # as OPERA and lmms-eval count
    chair.score(rows, objects, chair.lexicon_from_nouns(nouns)) # any objects
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from .coco import COCO
from .lexicon import Lexicon, Mention, lexicon_from_nouns
from .truth import objects_from_coco, read_objects
from .variants import VARIANTS, choose_lexicon, lexicon_for

__all__ = [
    "COCO",
    "VARIANTS",
    "Lexicon",
    "at_length",
    "at_recall",
    "lexicon_for",
    "lexicon_from_nouns",
    "objects_from_coco",
    "pairs",
    "position_accuracy",
    "position_pairs",
    "read_objects",
    "score",
]

Row = Mapping[str, Any]
Objects = Mapping[Any, Iterable[str]]
Judged = tuple[Row, list[Mention], frozenset[str]]
"""A caption's row, its mentions, and the nodes that its image shows."""

_WORD = re.compile(r"\S+")
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
    objects: Objects,
    lexicon: Lexicon = COCO,
    details: bool = False,
    variant: str = "original",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """CHAIR of captions against the objects that their images show.

    Args:
        rows: prediction rows `{id, image_id, question, prediction}` of one model under one
            condition; rows that carry an `error` are counted, not scored. `n_tokens`, where every
            row has it, is the caption's length.
        objects: image id -> names of the objects it shows (nouns or synonyms of the lexicon). An
            id may be a number here and its digits there.
        lexicon: which words name which object; a lexicon of your own takes the place of the
            variant's.
        details: add `captions`: per caption `{id, image_id, words, spans, nodes, hallucinated}`,
            where `words[i] == prediction[spans[i][0]:spans[i][1]]` and `hallucinated[i]` is a bool.
        variant: which published CHAIR to follow, one of `VARIANTS`.
        skip_bad: leave out rows that cannot be scored (a second row of an id, no text, an image
            without ground truth) instead of raising; `skipped` then lists `{id, reason}`.

    Returns:
        Fractions in 0..1: `chair_s` (captions with a hallucinated object / captions; lower is
        better), `chair_i` (hallucinated mentions / mentions; lower is better), `recall` (objects
        mentioned / objects shown, summed over captions; higher is better), `coverage` (the same
        ratio, averaged over the captions whose image shows an object; higher is better);
        `mean_length` in the unit `length_unit` ("words" between blanks, or "tokens"); counts
        `n_captions, n_mentions, n_hallucinated, n_objects, n_errors, n_skipped, n_empty` (captions
        without a word) and `n_silent` (captions that mention no object); `variant` and
        `lexicon_hash`. A ratio without a denominator (no object mentioned anywhere) is NaN. The
        variant `objhal` also has `correct_rate` (1 - chair_s) and `obj_rec` (its name of recall).

    Raises:
        ValueError: duplicate ids, image ids without ground truth, objects the lexicon does not
            know, an unknown variant, or a variant together with a lexicon.
        TypeError: a caption that is no string, or objects that are no mapping to lists.
        ImportError: the variant `opera` without NLTK or its data.
    """
    lexicon = choose_lexicon(lexicon, variant)
    good, n_errors, skipped = _checked(rows, objects, skip_bad)
    unit, counts, captions = _length_unit(good), [], []
    for row, mentions, shown in _judged(good, objects, lexicon):
        counts.append(_counts(_length(row, unit), mentions, shown, lexicon.counting))
        if details:
            captions.append(_detail(row, mentions, shown))
    result = _result(counts, unit, lexicon) | _tally(good, n_errors, len(skipped))
    if skip_bad:
        result["skipped"] = skipped
    if details:
        result["captions"] = captions
    return result


def pairs(
    rows: Iterable[Row],
    objects: Objects,
    lexicon: Lexicon = COCO,
    variant: str = "original",
    skip_bad: bool = False,
) -> dict[str, np.ndarray]:
    """Per-caption (numerator, denominator) columns [n, 2] of every figure, for bootstrap intervals.

    `sum(numerators) / sum(denominators)` of a column is the figure that `score` returns under its
    name: chair_s, chair_i, recall, coverage, mean_length. Arguments and errors as in `score`.
    """
    lexicon = choose_lexicon(lexicon, variant)
    good, _, _ = _checked(rows, objects, skip_bad)
    unit, how = _length_unit(good), lexicon.counting
    judged = _judged(good, objects, lexicon)
    return _columns([_counts(_length(r, unit), m, shown, how) for r, m, shown in judged], how)


def at_length(
    rows: Iterable[Row],
    objects: Objects,
    words: int,
    lexicon: Lexicon = COCO,
    variant: str = "original",
) -> dict[str, Any]:
    """CHAIR of the first `words` words of every caption, so that lengths are equal.

    A mention counts if it ends within them; a caption is read whole, so cutting makes no new
    mention ("baby" of "baby elephant"). Shorter captions stay whole. Returns what `score` returns,
    and `budget_words`; lengths are in words. Other arguments and errors as in `score`.

    Raises:
        ValueError: `words` is less than 1.
    """
    if words < 1:
        raise ValueError(f"A budget of {words} words leaves no caption. Give at least 1.")
    lexicon = choose_lexicon(lexicon, variant)
    good, n_errors, _ = _checked(rows, objects, False)
    result = _cut_result(_judged(good, objects, lexicon), words, lexicon)
    return result | _tally(good, n_errors, 0)


def at_recall(
    rows: Iterable[Row],
    objects: Objects,
    recall: float,
    lexicon: Lexicon = COCO,
    variant: str = "original",
) -> dict[str, Any]:
    """CHAIR at a fixed recall: of the shortest captions, cut alike, that reach it.

    The budget is the smallest number of words per caption (as in `at_length`) at which `recall` is
    at least the one asked for; `budget_words` tells it. So a model gains nothing by saying little.
    Other arguments and errors as in `score`.

    Args:
        recall: in (0, 1].

    Raises:
        ValueError: whole captions do not reach the recall.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"Recall {recall} is not in (0, 1].")
    lexicon = choose_lexicon(lexicon, variant)
    good, n_errors, _ = _checked(rows, objects, False)
    judged = list(_judged(good, objects, lexicon))
    total = sum(len(shown) for _, _, shown in judged)
    needed = sorted(
        words
        for row, mentions, shown in judged
        for words in _words_needed(row["prediction"], mentions, shown)
    )
    reached = [words for i, words in enumerate(needed, 1) if i / total >= recall]
    if not reached:
        raise ValueError(
            f"Recall {recall} is out of reach: whole captions mention {len(needed)} of the {total} "
            "objects shown. Ask for less."
        )
    result = _cut_result(judged, reached[0], lexicon)
    return result | _tally(good, n_errors, 0)


def _words_needed(text: str, mentions: list[Mention], shown: frozenset[str]) -> list[int]:
    """How many words of the text it takes to have mentioned each object that is both."""
    first: dict[str, int] = {}
    for mention in mentions:
        if mention.node in shown:
            first.setdefault(mention.node, mention.end)
    ends = [match.end() for match in _WORD.finditer(text)] if first else []
    return [bisect_left(ends, end) + 1 for end in first.values()]


def _cut_result(judged: Iterable[Judged], words: int, lexicon: Lexicon) -> dict[str, Any]:
    counts = []
    for row, mentions, shown in judged:
        ends = [match.end() for match in _WORD.finditer(row["prediction"])]
        end = ends[words - 1] if len(ends) > words else len(row["prediction"])
        kept = [mention for mention in mentions if mention.end <= end]
        counts.append(_counts(min(words, len(ends)), kept, shown, lexicon.counting))
    return _result(counts, "words", lexicon) | {"budget_words": words}


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
    rows, _, _ = _checked(rows, scenes, False)
    truth = {row["image_id"]: list(scenes[_key(scenes, row["image_id"])]) for row in rows}
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


def _checked(
    rows: Iterable[Row], truth: Mapping[Any, Any], skip_bad: bool
) -> tuple[list[Row], int, list[dict[str, Any]]]:
    """The scorable rows, the number of failed ones, and what was skipped and why.

    Raises what cannot be scored unless `skip_bad`.
    """
    if not isinstance(truth, Mapping):
        raise TypeError(
            f"Ground truth must map image ids to object names, not be a {type(truth).__name__}."
        )
    seen: set[Any] = set()
    good, n_errors, skipped, unknown = [], 0, [], []
    for row in rows:
        fault = _fault(row, seen)
        if fault and not skip_bad:
            raise fault
        seen.add(row.get("id"))
        if fault:
            skipped.append({"id": row.get("id"), "reason": str(fault)})
        elif row.get("error"):
            n_errors += 1
        elif _key(truth, row["image_id"]) is None:
            unknown.append(row)
        else:
            good.append(row)
    if unknown and not skip_bad:
        raise _no_ground_truth(unknown, truth)
    reason = "No ground truth for the image id {!r}."
    skipped += [{"id": r["id"], "reason": reason.format(r["image_id"])} for r in unknown]
    return good, n_errors, skipped


def _fault(row: Row, seen: set[Any]) -> ValueError | TypeError | None:
    """Why the row itself cannot be scored, if so."""
    if "id" not in row or "image_id" not in row:
        return ValueError(f"Every row needs id and image_id; one has only {sorted(row)}.")
    if row["id"] in seen:
        return ValueError(
            f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
        )
    if not row.get("error") and not isinstance(row.get("prediction"), str):
        return TypeError(
            f"Row {row['id']!r}: the prediction is of type {type(row.get('prediction')).__name__}, "
            "not str. A prediction that failed belongs in a row with `error`."
        )
    return None


def _key(truth: Mapping[Any, Any], image_id: Any) -> Any:
    """The image's key: JSON writes the key 42 as "42". None if there is none."""
    if image_id in truth:
        return image_id
    other: Any = str(image_id)
    if isinstance(image_id, str):
        other = int(image_id) if image_id.isdecimal() else None
    return other if other in truth else None


def _no_ground_truth(rows: list[Row], truth: Mapping[Any, Any]) -> ValueError:
    if {"annotations", "images"} <= set(truth):
        return ValueError(
            "This ground truth is a COCO file's content. Make objects of it first: "
            "objects_from_coco(instances, captions)."
        )
    missing = list(dict.fromkeys(str(row["image_id"]) for row in rows))
    known = ", ".join(repr(key) for key in list(truth)[:2]) or "none"
    return ValueError(
        f"No ground truth for {len(missing)} image ids, e.g. {', '.join(missing[:3])} (it knows "
        f"{len(truth)}, e.g. {known}): all they mention would count as hallucinated. Check that "
        "rows and ground truth speak of the same images."
    )


def _judged(rows: list[Row], objects: Objects, lexicon: Lexicon) -> Iterator[Judged]:
    """Per caption its row, its mentions and the nodes that its image shows."""
    keys = {row["image_id"]: _key(objects, row["image_id"]) for row in rows}
    shown = {image_id: _nodes(image_id, objects[key], lexicon) for image_id, key in keys.items()}
    find = partial(_firsts, lexicon) if lexicon.counting == "distinct" else lexicon.mentions
    return ((row, find(row["prediction"]), shown[row["image_id"]]) for row in rows)


def _nodes(image_id: Any, names: Iterable[str], lexicon: Lexicon) -> frozenset[str]:
    if isinstance(names, (str, Mapping)) or not isinstance(names, Iterable):
        what = "one string" if isinstance(names, str) else f"a {type(names).__name__}"
        raise TypeError(f"Image {image_id!r}: objects must be a list of names, not {what}.")
    try:
        return frozenset(map(lexicon.node, names))
    except ValueError as error:
        raise ValueError(f"Image {image_id!r}: {error}") from error


def _firsts(lexicon: Lexicon, text: str) -> list[Mention]:
    """The first mention of each term."""
    first: dict[str, Mention] = {}
    for mention in lexicon.mentions(text):
        first.setdefault(mention.term, mention)
    return list(first.values())


def _tally(rows: list[Row], n_errors: int, n_skipped: int) -> dict[str, int]:
    """Counts of captions that say nothing or were not scored."""
    n_empty = sum(not row["prediction"].strip() for row in rows)
    return {"n_empty": n_empty, "n_errors": n_errors, "n_skipped": n_skipped}


def _counts(
    length: float, mentions: list[Mention], shown: frozenset[str], counting: str
) -> tuple[float, ...]:
    """Of one caption: hallucinated, mentions, objects found, objects shown, length."""
    nodes = {node for _, _, _, node in mentions}
    found, n_false = len(nodes & shown), 0
    if found < len(nodes):
        false = [mention.term for mention in mentions if mention.node not in shown]
        n_false = len(set(false)) if counting == "distinct false" else len(false)
    return n_false, len(mentions), found, len(shown), length


def _length_unit(rows: list[Row]) -> str:
    return "tokens" if rows and all("n_tokens" in row for row in rows) else "words"


def _length(row: Row, unit: str) -> float:
    return row["n_tokens"] if unit == "tokens" else len(row["prediction"].split())


def _columns(counts: list[tuple[float, ...]], counting: str) -> dict[str, np.ndarray]:
    """Every figure's numerators and denominators, [captions, 2]."""
    table = np.array(counts, dtype=float).reshape(-1, 5)
    false, mentions, found, shown, length = table.T
    one = np.ones(len(table))
    captions = (mentions > 0) if counting == "distinct" else one
    columns = {
        "chair_s": (false > 0, captions),
        "chair_i": (false, mentions),
        "recall": (found, shown),
        "coverage": (found / np.maximum(shown, 1), shown > 0),
        "mean_length": (length, one),
    }
    if counting == "distinct":
        columns["correct_rate"] = (captions & (false == 0), captions)
        columns["obj_rec"] = columns["recall"]
    return {name: np.stack(column, axis=1).astype(float) for name, column in columns.items()}


def _result(counts: list[tuple[float, ...]], unit: str, lexicon: Lexicon) -> dict[str, Any]:
    columns = _columns(counts, lexicon.counting)
    return {
        **{name: _ratio(column) for name, column in columns.items()},
        "length_unit": unit,
        "n_captions": len(counts),
        "n_mentions": int(columns["chair_i"][:, 1].sum()),
        "n_hallucinated": int(columns["chair_i"][:, 0].sum()),
        "n_objects": int(columns["recall"][:, 1].sum()),
        "n_silent": sum(mentions == 0 for _, mentions, *_ in counts),
        "variant": lexicon.name,
        "lexicon_hash": lexicon.hash,
    }


def _detail(row: Row, mentions: list[Mention], shown: frozenset[str]) -> dict[str, Any]:
    text, nodes = row["prediction"], [node for _, _, _, node in mentions]
    return {
        "id": row["id"],
        "image_id": row["image_id"],
        "words": [text[start:end] for start, end, _, _ in mentions],
        "spans": [mention[:2] for mention in mentions],
        "nodes": nodes,
        "hallucinated": [node not in shown for node in nodes],
    }


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan
