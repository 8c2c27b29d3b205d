"""What a model is asked for instruction data, and its reply read strictly (LRV, arXiv 2306.14565).

What it is: LRV-Instruction's four kinds of instructions (positive, and three negative ones that
build on something wrong) as prompts of our own over an image's dense captions or a chart's table,
the reader of the replies, and the rules by which an instruction is refused. What it is not: a
client (`endpoint.py`), or the check of an instruction against its image, which needs a lexicon
(`recipes/instruction_checks.py`).

    messages = request(record, "nonexistent object", count=6)
    replies = endpoint.ask_many([messages], parse=parse_reply, **SETTINGS)
    for entry in replies[0].value: print(instruction(entry, "nonexistent object"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from firsthand.processing.messages import json_object, message, render

POSITIVE = "positive"
NEGATIVES = ("nonexistent object", "existent object", "knowledge")
KINDS = (POSITIVE, *NEGATIVES)
TASKS = (  # the first ten are named in LRV's published prompt; the paper counts 16
    "image captioning",
    "image sentiment analysis",
    "activity recognition",
    "object interaction analysis",
    "object attribute detection",
    "multiple-choice question",
    "visual entailment",
    "visual commonsense reasoning",
    "styled image caption",
    "referential expression grounding",
    "object existence",
    "object counting",
    "spatial relation",
    "object comparison",
    "scene recognition",
    "image-text matching",
)
CHART_TASKS = ("value retrieval", "extreme value", "value comparison", "trend description")
MAX_WORDS = 30  # of an answer; LRV's prompt asks for fewer
SETTINGS = {"temperature": 0.7, "max_tokens": 3072, "response_format": {"type": "json_object"}}
TEXTS = {POSITIVE: ("task", "instruction", "answer")}  # of an entry; other kinds:
MISLEADING = ("object", "instruction", "answer")
LEAKS = re.compile(
    r"\b(?:bounding box(?:es)?|coordinates?|captions? (?:says?|mentions?|states?|given)|"
    r"(?:given|provided|image|dense) (?:captions?|descriptions?|information|annotations?|regions?)|"
    r"(?:description|information|annotation)s? (?:provided|given|above)|"
    r"(?:is|are|was|were)(?: not|n't) (?:mentioned|described|listed)|no mention of|"
    r"misleading|data table|json)\b|\b[XY]\s*:\s*\d|\b(?:width|height)\s*:\s*\d|"
    r"[\[(]\s*\d+(?:\.\d+)?\s*(?:,\s*\d+(?:\.\d+)?\s*){3}[\])]",
    re.IGNORECASE,
)

Instruction = dict[str, str]  # question, answer, task, polarity; object where it is misleading


def request(
    record: Mapping[str, Any], kind: str, count: int, max_words: int = MAX_WORDS
) -> list[dict[str, Any]]:
    """Chat messages that ask for `count` instructions of one of KINDS.

    Args:
        record: `regions` (caption, bbox) and `captions` of an image, or `table` and `title`.
        kind: one of KINDS.
        count: how many; a model gives more or fewer.
        max_words: bound on an answer that is told.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    table = [json.dumps(row, ensure_ascii=False) for row in record["table"]]
    entry = {name: "..." for name in TEXTS.get(kind, MISLEADING)}
    text = render(
        "instructions",
        kind=kind,
        count=count,
        max_words=max_words,
        what="chart" if table else "image",
        table="\n".join(table),
        tasks=CHART_TASKS if table else TASKS,
        form=json.dumps({"instructions": [entry]}),
        **{name: record[name] for name in ("title", "regions", "captions")},
    )
    return message(text)


def parse_reply(text: str) -> list[Any]:
    """The entries of a reply, which must be the one JSON object that was asked for.

    Raises:
        ValueError: for anything else, and for an empty list.
    """
    entries = json_object(text, {"instructions": list})["instructions"]
    if not entries:
        raise ValueError("the reply holds no instructions")
    return entries


def instruction(entry: Any, kind: str) -> Instruction:
    """An entry of a reply as an instruction.

    Raises:
        ValueError: where it has not exactly the fields that were asked for, as text.
    """
    names = TEXTS.get(kind, MISLEADING)
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise ValueError(f"invalid entry: it must have the keys {', '.join(names)}")
    if wrong := [name for name in names if not isinstance(entry[name], str)]:
        raise ValueError(f"invalid entry: {', '.join(wrong)} must be text")
    found = {name: " ".join(entry[name].split()) for name in names}
    if kind == POSITIVE:
        return positive(found["task"].lower(), found["instruction"], found["answer"])
    return negative(kind, found["object"], found["instruction"], found["answer"])


def positive(task: str, question: str, answer: str) -> Instruction:
    """A positive instruction."""
    return {"question": question, "answer": answer, "task": task, "polarity": "positive"}


def negative(kind: str, thing: str, question: str, answer: str) -> Instruction:
    """A misleading instruction about `thing`, of one of NEGATIVES."""
    made = {"question": question, "answer": answer, "task": kind, "polarity": "negative"}
    return {**made, "object": thing}


def problem(one: Instruction, max_words: int = MAX_WORDS) -> str | None:
    """Why an instruction cannot be used whatever its image shows; None where it can."""
    if not one["question"] or not one["answer"]:
        return "empty: the instruction or its answer"
    if one["polarity"] == "positive" and one["task"] not in TASKS + CHART_TASKS:
        return f"unknown task: {one['task']}"
    if (words := len(one["answer"].split())) > max_words:
        return f"answer too long: {words} words, over {max_words}"
    for name in ("question", "answer"):
        if leak := LEAKS.search(one[name]):
            return f"leaks the prompt: its {name} says {leak.group()!r}"
    if one["polarity"] == "negative" and re.match(r"\W*yes\b", one["answer"], re.IGNORECASE):
        return "agrees: the answer to a misleading instruction begins with yes"
    return None


def key_of(question: str) -> str:
    """What two wordings that differ in case, blanks or punctuation share."""
    return " ".join(re.findall(r"\w+", question.lower()))
