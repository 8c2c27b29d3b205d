"""Is an instruction true to its image's captions, and new? Cleaning rules for instruction data.

What it is: the rules that need the image's captions (an object that is said to be absent must not
be named in them, one that is said to be there must) and the image's other instructions; reasons
for what is refused. What it is not: a judge of what an answer says beyond its object.

    named = Named(["a red car", "two men"])
    named.names("man"), named.names("zebra")       # True, False
    kept, rejected = clean(instructions, named)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from firsthand.metrics import chair
from firsthand.metrics.chair.lexicon import lexicon_from_nouns
from firsthand.processing import instructions
from firsthand.processing.instructions import Instruction
from firsthand.processing.key_expressions import head_noun


class Named:
    """What texts about one image name: words in singular and plural, and synonyms of CHAIR's."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.text = ". ".join(texts)
        self._nodes = {mention.node for mention in chair.COCO.mentions(self.text)}

    def names(self, thing: str) -> bool:
        """Whether the texts name a thing: by its head noun, or a synonym that CHAIR knows."""
        word = self._head(thing)
        if word is None:
            return False
        if lexicon_from_nouns([word]).mentions(self.text):
            return True
        return bool(self._nodes & {mention.node for mention in chair.COCO.mentions(thing)})

    def _head(self, thing: str) -> str | None:
        words = re.findall(r"[^\W_]+", thing.lower())
        return head_noun(thing) or (words[-1] if words else None)


def problem(one: Instruction, named: Named, max_words: int = instructions.MAX_WORDS) -> str | None:
    """Why an instruction cannot be used for an image; None where it can."""
    if reason := instructions.problem(one, max_words):
        return reason
    if one["polarity"] == "positive":
        return None
    there, thing = named.names(one["object"]), one["object"]
    if one["task"] == "nonexistent object" and (there or not thing):
        return f"named in the captions: {thing!r} is said to be absent"
    if one["task"] != "nonexistent object" and not there:
        return f"not named in the captions: {thing!r} is said to be there"
    return None


def clean(
    found: Iterable[Instruction], named: Named, max_words: int = instructions.MAX_WORDS
) -> tuple[list[Instruction], list[Instruction]]:
    """The instructions of one image that can be used, and the others with `reason`, in order.

    Of several that ask the same the first is kept.
    """
    kept: list[Instruction] = []
    rejected: list[Instruction] = []
    asked: set[str] = set()
    for one in found:
        key = instructions.key_of(one["question"])
        reason = problem(one, named, max_words)
        if reason is None and key in asked:
            reason = "duplicate: an earlier instruction asks the same"
        if reason is None:
            asked.add(key)
            kept.append(one)
        else:
            rejected.append({**one, "reason": reason})
    return kept, rejected
