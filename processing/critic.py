"""A critic's question about two responses, and its verdict read strictly (SIMA, arXiv 2405.15973).

What it is: SIMA's in-context critic in our own words (three visual metrics, two demonstrations, the
pair), the verdict's readers, and what two opposite orders say together. What it is not: a model or
a client; `augment critique` asks.

    text = question_of("What is it?", "a dog", "a cat", ground_truth="A dog sleeps.")
    verdict("The first names the dog. Verdict: [[1]]")  # 1
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from firsthand.processing.messages import render

Verdict = Literal[1, 2]
MARK = re.compile(r"\[\[([^\[\]]*)\]\]")
START = " Verdict: [["  # what a forced choice continues


def question_of(question: str, first: str, second: str, ground_truth: str = "") -> str:
    """The critic's prompt for one order of a pair; texts become single lines.

    Without a ground truth the critic has the image alone.
    """
    fields = {"question": question, "first": first, "second": second, "ground_truth": ground_truth}
    return render("critic", **{name: " ".join(text.split()) for name, text in fields.items()})


def verdict(reply: str) -> Verdict | None:
    """1 or 2 where every `[[...]]` of the reply says so, and there is one; None otherwise."""
    marks = {mark.strip() for mark in MARK.findall(reply)}
    return {"1": 1, "2": 2}.get(marks.pop()) if len(marks) == 1 else None  # type: ignore[return-value]


def verdict_as_published(reply: str) -> Verdict | None:
    """As SIMA's script reads it: what stands between the last `[[` and the next `]]`."""
    said = reply.split("[[")[-1].split("]]")[0]
    return {"1": 1, "2": 2}.get(said)  # type: ignore[return-value]


READERS: dict[str, Callable[[str], Verdict | None]] = {
    "strict": verdict,
    "published": verdict_as_published,
}


def holds_verdict(response: str) -> bool:
    """Whether a response carries a `[[...]]` of its own, which the critic may repeat."""
    return MARK.search(response) is not None


def likelier(chances: list[list[float]]) -> Verdict | Literal["tie"]:
    """The response that the critic gives the higher probability, summed over the orders.

    A preference for a place, which both orders share, cancels.

    Args:
        chances: for each order the log-probabilities of the verdicts 1 and 2; in the second order
            the responses have changed places.
    """
    odds = sum((a - b) * (-1) ** order for order, (a, b) in enumerate(chances))
    return "tie" if odds == 0 else 1 if odds > 0 else 2


def agreed(verdicts: list[Verdict | None]) -> Verdict | Literal["tie", "unparsed"]:
    """What the verdicts of one pair, as seen from its first order, say together.

    Args:
        verdicts: of one order, or of both; the second order's already turned round.
    """
    if None in verdicts:
        return "unparsed"
    first = verdicts[0]
    assert first is not None
    return first if all(one == first for one in verdicts) else "tie"
