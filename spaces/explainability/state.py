"""What the page keeps of one visitor: the last question, its answers, and what is shown of them.

Plain data for one browser session (`gr.State`); no model, no drawing, nothing shared.

    turn = Turn(image, "What is this?", [reply]); turn.replies[0].words
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from firsthand.modeling.explanation import (
    WORD,
    Contribution,
    Explanation,
    WordRelevancy,
    tokens_within,
)
from firsthand.processing.key_expressions import noun_phrases

ROWS = (  # of an explanation that has them for some tokens
    "image", "patches", "question_relevancy", "answer_relevancy", "image_layers",
    "question_layers", "answer_layers",
)  # fmt: skip


@dataclass
class Reply:
    """One answer, explained as far as somebody looked.

    Attributes:
        explanation: per layer, against a blank image; its rows grow (`joined`).
        strength: of the steering that was in force, 0 for the plain answer.
        notice: what the reader must know ("cut after 64 tokens"), or "".
        heads: [L, H, A] share of each head's attention that lies on the image, at the positions
            that produce the answer's tokens; None where the family shows none.
    """

    explanation: Explanation
    strength: float = 0.0
    notice: str = ""
    heads: torch.Tensor | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Characters of the clickable words; an answer without words is one piece."""
        return self.explanation.word_spans or [(0, len(self.explanation.answer))]

    def tokens(self, word: int) -> list[int]:
        """Indices of a word's tokens."""
        return tokens_within(self.explanation.spans, *self.spans[word])

    def word_text(self, word: int) -> str:
        """A word as it stands in the answer."""
        return self.explanation.answer[slice(*self.spans[word])]

    def word(self, word: int) -> WordRelevancy:
        """A word that is explained."""
        return self.explanation.span(*self.spans[word])

    def supports(self) -> list[float]:
        """How much the image raises each word's log-probability over a blank one, in nats."""
        ratios = self.explanation.log_likelihood_ratio
        assert ratios is not None
        return [ratios[self.tokens(word)].sum().item() for word in range(len(self.spans))]

    def opening_word(self) -> int:
        """The word to show first: it is explained."""
        at = opening(self.explanation.answer)
        return next(i for i, (_, end) in enumerate(self.spans) if end > at[0])

    def missing(self) -> list[int]:
        """Tokens that are not explained yet."""
        return sorted(set(range(len(self.explanation.tokens))) - set(self.explanation.selected))


@dataclass
class Turn:
    """One question of one visitor.

    Attributes:
        image: what was asked about.
        question: the text.
        replies: the plain answer, and the steered one where it was asked for.
        earlier: questions and plain answers before it about the same image, the oldest first.
        layer, how: what the strip shows now: a decoder layer from 1, and "sum", "mean" or "max".
        over: the visitor has asked something else since.
    """

    image: Image.Image
    question: str
    replies: list[Reply]
    layer: int
    how: Contribution = "sum"
    earlier: list[tuple[str, str]] = field(default_factory=list)
    over: bool = False


def joined(known: Explanation, more: Explanation) -> Explanation:
    """`known` with the rows of tokens that only `more` explains; both are of one answer."""
    new = [i for i, token in enumerate(more.selected) if token not in known.selected]
    if not new:
        return known
    rows = {}
    for name in ROWS:
        first, second = vars(known)[name], vars(more)[name]
        rows[name] = None if first is None else torch.cat([first, second[new]])
    return replace(known, selected=known.selected + [more.selected[i] for i in new], **rows)


def opening(answer: str) -> tuple[int, int]:
    """Characters of the first word that names something visible; else of the first word, or all."""
    words = [match.span() for match in WORD.finditer(answer)] or [(0, len(answer))]
    ends = [end for _, end, _ in noun_phrases(answer)][:1]
    return next((span for span in words for end in ends if span[1] >= end), words[0])


def warned_words(reply: Reply, threshold: float) -> set[int]:
    """Indices of the words to warn about: things that the image hardly speaks for.

    A noun phrase is warned about where the image raises its log-probability by at most `threshold`
    nats over a blank one, as in the demo's report. Words that name nothing visible never are.
    """
    explanation, found = reply.explanation, set()
    assert explanation.log_likelihood_ratio is not None
    for start, end, _ in noun_phrases(explanation.answer):
        inside = tokens_within(explanation.spans, start, end)
        if explanation.log_likelihood_ratio[inside].sum().item() <= threshold:
            found |= {i for i, (a, b) in enumerate(reply.spans) if a < end and b > start}
    return found
