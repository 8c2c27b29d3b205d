"""What a judge replied, read strictly: JSON as asked for, or GAVIE's published free text.

What it is: a reply in, marks out, or a ValueError that says why not. What it is not: lenient; a
mark outside 0..10 is not clamped, and a missing one is no zero.

    parse('{"relevance_reason": "a", "relevance": 7, "accuracy_reason": "b", "accuracy": 2}')
"""

import json
import re
from typing import Any

from .prompts import is_number

Rating = dict[str, Any]
HIGHEST = 10
MARKS = ("relevance", "accuracy")
_HEADER = re.compile(r"^[ \t*#_>-]*(relevanc[ey]|accuracy)[ \t*_]*:?[ \t*_]*$", re.I | re.M)
_SCORE = re.compile(
    r"score\s+of\s+(?:the\s+)?answer\s*(\d+)[\s*_]*[:=][\s*_]*"
    r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?(?![ \t]*[-–/][ \t]*\d|\d|\.\d)",
    re.I,
)
_REASON = re.compile(r"reason[\s*_]*:(.*)", re.I | re.S)


def parse(reply: str, answers: int = 1) -> list[Rating]:
    """The judge's marks, one rating an answer, in the prompt's order; nothing else is guessed at.

    Either the JSON object that is asked for, or the published form: a section `Relevancy:` and a
    section `Accuracy:`, each with `score of answer1: 7` and `reason: ...` for every answer.

    >>> parse('{"relevance_reason": "a", "relevance": 7, "accuracy_reason": "b", "accuracy": 2.5}')
    [{'relevance': 7, 'accuracy': 2.5, 'relevance_reason': 'a', 'accuracy_reason': 'b'}]

    Raises:
        ValueError: a reply that is neither, for another number of answers, or with a mark outside
            0..10.
    """
    if not isinstance(reply, str):
        raise ValueError(f"the reply is {type(reply).__name__}, not text")
    if _HEADER.search(reply):
        return _parse_published(reply, answers)
    try:
        found = json.loads(reply)
    except json.JSONDecodeError as error:
        raise ValueError(f"the reply is not JSON: {error}") from error
    if answers == 1:
        return [_rating(found, set())]
    if not isinstance(found, dict) or set(found) != {"answers"}:
        raise ValueError('expected a JSON object {"answers": [...]} and nothing else')
    listed = found["answers"]
    if not isinstance(listed, list) or len(listed) != answers:
        raise ValueError(f"expected a list of {answers} answers' marks")
    ratings = [_rating(one, {"answer"}) for one in listed]
    if [one["answer"] for one in listed] != list(range(1, answers + 1)):
        raise ValueError(f"the answers must be numbered 1 to {answers}, in order")
    return ratings


def _rating(found: Any, more: set[str]) -> Rating:
    """A rating out of a JSON object that has these fields, `more` and no others."""
    reasons = [f"{mark}_reason" for mark in MARKS]
    if not isinstance(found, dict) or set(found) != {*MARKS, *reasons, *more}:
        raise ValueError(f"expected a JSON object with {', '.join((*MARKS, *reasons, *more))}")
    for mark in MARKS:
        if not is_number(found[mark]) or not 0 <= found[mark] <= HIGHEST:
            raise ValueError(f"{mark} must be a number from 0 to {HIGHEST}, not {found[mark]!r}")
    for reason in reasons:
        if not isinstance(found[reason], str):
            raise ValueError(f"{reason} must be text, not {found[reason]!r}")
    return {name: found[name] for name in (*MARKS, *reasons)}


def _parse_published(reply: str, answers: int) -> list[Rating]:
    """Marks in the original's output format."""
    parts = _HEADER.split(reply)
    names = ["accuracy" if name.lower() == "accuracy" else "relevance" for name in parts[1::2]]
    if sorted(names) != sorted(MARKS):
        raise ValueError(f"expected one section Relevancy and one Accuracy, found {names}")
    ratings: list[Rating] = [{} for _ in range(answers)]
    for name, text in zip(names, parts[2::2], strict=True):
        pieces = _SCORE.split(text)
        places = [int(number) for number in pieces[1::3]]
        if sorted(places) != list(range(1, answers + 1)):
            raise ValueError(f"{name} needs a score of each of {answers} answers, found {places}")
        for place, mark, after in zip(places, pieces[2::3], pieces[3::3], strict=True):
            if not 0 <= float(mark) <= HIGHEST:
                raise ValueError(f"{name} must be from 0 to {HIGHEST}, not {mark}")
            reason = _REASON.search(after)
            said = reason.group(1).strip() if reason else ""
            ratings[place - 1] |= {name: float(mark), f"{name}_reason": said}
    order = (*MARKS, *(f"{mark}_reason" for mark in MARKS))
    return [{name: rating[name] for name in order} for rating in ratings]
