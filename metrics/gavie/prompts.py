"""GAVIE's requests to a judge: dense captions with boxes, an instruction, and answers to it.

What it is: our own prompts, for one answer or for several models' at once. What it is not: the
original's texts, or a reader of replies (`replies`).

    build_request([{"question": "Describe.", "prediction": "A dog.", "regions": regions}])
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Row = Mapping[str, Any]
Message = dict[str, str]
BBOX_FORMATS = ("fixed", "legacy")

SYSTEM = """\
You check what is said about images. You cannot see the image: trust the list of its regions, each \
a description and its box in pixels (left edge x, top edge y, width, height). The list is right \
but need not be complete, and boxes that overlap may show the same thing. Style, length and \
wording do not matter."""

MARKING = """\
Relevance: is what the instruction asks for what the answer gives? 0 is not at all, 10 wholly.
Accuracy: does what the answer says about the image hold? 0 if none of it does, 10 if all of it \
does. An instruction may assume what the image does not show; to say so is accurate."""

SINGLE = """\
Regions of the image:
{regions}

Instruction: {question}
Answer: {answers}

Mark the answer from 0 to 10 twice, each time with a reason of one or two sentences.
{marking}

Reply with one JSON object and nothing else, reasons first: {{"relevance_reason": "...", \
"relevance": N, "accuracy_reason": "...", "accuracy": N}}"""

JOINT = """\
Regions of the image:
{regions}

Instruction: {question}
{answers}

Mark each answer by itself from 0 to 10 twice, each time with a reason of one or two sentences.
{marking}

Reply with one JSON object and nothing else, an entry an answer in the order above, reasons first: \
{{"answers": [{{"answer": 1, "relevance_reason": "...", "relevance": N, "accuracy_reason": "...", \
"accuracy": N}}, ...]}}"""

PROMPT_HASH = hashlib.sha256((SYSTEM + MARKING + SINGLE + JOINT).encode()).hexdigest()[:12]
"""First 12 hexadecimal digits of the prompts' SHA-256; belongs into every report."""


def build_request(answers: Sequence[Row], bbox_format: str = "fixed") -> list[Message]:
    """One request to the judge: two chat messages about one answer, or several to one instruction.

    Args:
        answers: `{question, prediction, regions}`; regions are dense captions
            `{caption, bbox: [x, y, width, height]}` in pixels. Question and regions are the first
            one's.
        bbox_format: "legacy" writes each width as the height too, as the original's script did.

    Raises:
        TypeError: a field is missing or of the wrong type; the row is named.
        ValueError: another `bbox_format`, or no answer.
    """
    if bbox_format not in BBOX_FORMATS:
        raise ValueError(f"bbox_format is {bbox_format!r}: choose {' or '.join(BBOX_FORMATS)}")
    if not answers:
        raise ValueError("A request needs at least one answer.")
    for row in answers:
        if reason := unaskable(row):
            raise TypeError(reason)
    said = [row["prediction"] for row in answers]
    listed = "\n".join(f"Answer {place}: {text}" for place, text in enumerate(said, 1))
    text = (SINGLE if len(said) == 1 else JOINT).format(
        regions="\n".join(_line(region, bbox_format) for region in answers[0]["regions"]),
        question=answers[0]["question"],
        answers=said[0] if len(said) == 1 else listed,
        marking=MARKING,
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _line(region: Row, bbox_format: str) -> str:
    x, y, width, height = region["bbox"]
    height = width if bbox_format == "legacy" else height
    caption = " ".join(region["caption"].split())
    return f"- {caption}: x {x:g}, y {y:g}, width {width:g}, height {height:g}"


def unaskable(row: Row) -> str | None:
    """Why a judge cannot be asked about the row, if so."""
    for name in ("question", "prediction"):
        if not isinstance(row.get(name), str):
            kind = type(row.get(name)).__name__
            return f"Row {row.get('id')!r}: `{name}` is of type {kind}, not str."
    regions = row.get("regions")
    if isinstance(regions, (list, tuple)) and regions and all(map(_is_region, regions)):
        return None
    return (
        f"Row {row.get('id')!r}: `regions` must be a list of {{caption, bbox: [x, y, width, "
        f"height]}}, at least one, got {str(regions)[:80]}. They are all that a judge knows."
    )


def _is_region(region: Any) -> bool:
    if not isinstance(region, Mapping) or not isinstance(region.get("caption"), str):
        return False
    box = region.get("bbox")
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_number, box))


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float; no bool."""
    allowed = isinstance(value, (int, float)) and not isinstance(value, bool)
    return allowed and -math.inf < value < math.inf
