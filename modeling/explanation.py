"""The relevancy of an answer's tokens, as numbers: what `explain` returns, saved and loaded.

It holds grids and rows on the CPU, by token and by word; it computes no relevancy (relevancy.py)
and draws nothing (processing/overlays.py).

    explanation = Explanation.load("out/explanation")
    explanation.words; explanation.word(1).image; explanation.visual_contribution
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers import PreTrainedTokenizerBase

WEIGHTS_NAME, CONFIG_NAME = "explanation.safetensors", "explanation.json"
TEXTS = (
    "question", "answer", "tokens", "token_ids", "spans", "selected", "question_tokens", "baseline",
    "lens_raw", "lens_normed",
)  # fmt: skip
TENSORS = (
    "image", "patches", "question_relevancy", "answer_relevancy", "probability", "image_layers",
    "question_layers", "answer_layers", "lens_raw_probability", "lens_normed_probability",
    "log_likelihood_ratio",
)  # fmt: skip
Contribution = Literal["sum", "mean", "max"]
WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class WordRelevancy:
    """The mean relevancy of the tokens of one word or phrase.

    Attributes:
        text: the word as it stands in the answer.
        span: its (start, end) characters in the answer.
        tokens: indices of its answer tokens.
        image, patches, question: as in `Explanation`, without the first dimension.
        visual_contribution: image share of its relevancy, 0 to 1; low = not supported by the image.
        probability: of all its tokens together, 0 to 1.
        log_likelihood_ratio: of all its tokens together, nats; None without a baseline.
    """

    text: str
    span: tuple[int, int]
    tokens: list[int]
    image: torch.Tensor
    patches: torch.Tensor | None
    question: torch.Tensor
    visual_contribution: float
    probability: float
    log_likelihood_ratio: float | None = None

    @property
    def map(self) -> torch.Tensor:
        """The finer of the two maps: over patches where there is one, else over image tokens."""
        return self.image if self.patches is None else self.patches

    @property
    def smooth_map(self) -> torch.Tensor:
        """`map` for drawing: a merged token's relevancy fades into its neighbours, without blocks.

        What the vision encoder adds to the patches is as in `patches`; only the equal shares within
        each merged token are interpolated (bicubic, >= 0). Measure with `map`, not with this.
        """
        if self.patches is None:
            return self.map
        size = self.patches.shape
        rows, columns = (a // b for a, b in zip(size, self.image.shape, strict=True))
        if rows != columns or rows == 1:  # a Q-Former's queries, or one token a patch
            return self.map
        shares = self.image / (rows * columns)
        blocks = shares.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        faded = interpolate(shares[None, None], size=tuple(size), mode="bicubic")[0, 0]
        return (self.patches - blocks + faded).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Relevancy of S selected tokens among the A tokens of an answer (S = A unless selected).

    Relevancies are >= 0, unnormalised, float32, comparable within one row: higher = the token's
    logit leans more on that position.

    Attributes:
        question, answer: the texts.
        tokens: the text of each of the A answer tokens (the end token is not among them).
        token_ids: A token ids.
        spans: A (start, end) characters of each token in `answer`.
        selected: S indices of the explained answer tokens; rows below are in this order.
        question_tokens: the text of each of the Q tokens of the question, spaces included.
        image: [S, R, C] relevancy to the R x C image tokens ([S, 1, Q] to a Q-Former's queries).
        patches: [S, r, c] the same carried through the vision encoder to its patches, or None where
            the encoder's outputs of several layers are mixed.
        question_relevancy: [S, Q].
        answer_relevancy: [S, A]; zero at and after the token itself.
        probability: [A] of each emitted token, 0 to 1.

    With `layers`, else None (L decoder layers; relevancy with the gradients of the final logit):
        image_layers, question_layers, answer_layers: [S, L, R, C], [S, L, Q] and [S, L, A], the
            three relevancies after each layer; the last is the one above.
        lens_raw, lens_normed: [L + 1][A] texts of the tokens that the state before the first layer
            and after each layer would say, read without and with the final norm.
        lens_raw_probability, lens_normed_probability: [L + 1, A] of these tokens, 0 to 1.

    With a baseline, else None:
        baseline: what the image was compared with: "blank", "blur" or "noise".
        log_likelihood_ratio: [A] log-probability of each token with the image minus with the
            baseline, nats; high = the image made the model say it (VaLSe, arXiv 2505.17812).
    """

    question: str
    answer: str
    tokens: list[str]
    token_ids: list[int]
    spans: list[tuple[int, int]]
    selected: list[int]
    question_tokens: list[str]
    image: torch.Tensor
    patches: torch.Tensor | None
    question_relevancy: torch.Tensor
    answer_relevancy: torch.Tensor
    probability: torch.Tensor
    image_layers: torch.Tensor | None = None
    question_layers: torch.Tensor | None = None
    answer_layers: torch.Tensor | None = None
    lens_raw: list[list[str]] | None = None
    lens_normed: list[list[str]] | None = None
    lens_raw_probability: torch.Tensor | None = None
    lens_normed_probability: torch.Tensor | None = None
    baseline: str | None = None
    log_likelihood_ratio: torch.Tensor | None = None

    @property
    def visual_contribution(self) -> torch.Tensor:
        """[S] image share of the relevancy to image, question and earlier answer, 0 to 1.

        Template tokens of the prompt count for neither side. Without any relevancy it is 0.
        """
        return _share(self.image, self.question_relevancy, self.answer_relevancy)

    def contribution(self, how: Contribution = "sum") -> torch.Tensor:
        """Relevancy to the image over that to question and earlier answer, as Stethoscope has it.

        Args:
            how: compare the "sum", "mean" or "max" over the tokens of each side.

        Returns:
            [S], or [S, L] after each layer if the layers were asked for; >= 0, unbounded, high =
            leans on the image. It is 0 without relevancy to the image, inf with no other.
        """
        layered = self.image_layers is not None
        image = self.image_layers if layered else self.image
        question = self.question_layers if layered else self.question_relevancy
        answer = self.answer_layers if layered else self.answer_relevancy
        assert image is not None and question is not None and answer is not None
        text = torch.cat([question, answer], -1)
        if how == "sum":
            seen, read = image.sum((-2, -1)), text.sum(-1)
        elif how == "max":
            seen, read = image.amax((-2, -1)), text.amax(-1)
        elif how == "mean":
            counts = (torch.tensor(self.selected) + question.shape[-1]).clamp_min(1)
            counts = counts.view(-1, *[1] * (image.ndim - 3))
            seen, read = image.mean((-2, -1)), text.sum(-1) / counts
        else:
            raise ValueError(f"how is {how!r}; it must be one of {get_args(Contribution)}.")
        return torch.where(seen > 0, seen / read, 0)

    def visual_tokens(self, threshold: float = 1.0) -> list[int]:
        """Indices of the answer's tokens that the image made likelier by over `threshold` nats.

        Raises:
            ValueError: when the answer was explained without a baseline.
        """
        if self.log_likelihood_ratio is None:
            raise ValueError('There is no likelihood ratio; explain with baseline="noise".')
        return (self.log_likelihood_ratio > threshold).nonzero()[:, 0].tolist()

    @cached_property
    def word_spans(self) -> list[tuple[int, int]]:
        """(start, end) characters of the answer's words, without punctuation."""
        return [match.span() for match in WORD.finditer(self.answer)]

    @property
    def words(self) -> list[str]:
        """The words of the answer, in order."""
        return [self.answer[start:end] for start, end in self.word_spans]

    @cached_property
    def question_words(self) -> list[tuple[str, list[int]]]:
        """The words of the question, punctuation included, with the indices of their tokens."""
        words: list[tuple[str, list[int]]] = []
        for index, token in enumerate(self.question_tokens):
            joins = words and not token[:1].isspace() and not words[-1][0][-1:].isspace()
            text, indices = words.pop() if joins else ("", [])
            words.append((text + token, [*indices, index]))
        return [(text.strip(), indices) for text, indices in words if text.strip()]

    def word(self, index: int) -> WordRelevancy:
        """Word `index` of `words`.

        Raises:
            IndexError: when there is no such word.
            ValueError: when none of its tokens was selected.
        """
        if not 0 <= index < len(self.word_spans):
            raise IndexError(f"The answer has {len(self.word_spans)} words; there is no {index}.")
        return self.span(*self.word_spans[index])

    def span(self, start: int, end: int) -> WordRelevancy:
        """What the characters `start` to `end` of the answer lean on: the mean over their tokens.

        Raises:
            ValueError: when no selected token lies there.
        """
        inside = tokens_within(self.spans, start, end)
        rows = [row for row, token in enumerate(self.selected) if token in inside]
        if not rows:
            raise ValueError(
                f"No explained token lies in characters {start} to {end} of the answer "
                f"({self.answer[start:end]!r}). Explain it with tokens={inside}."
            )
        image, question, answer = (
            x[rows].mean(0) for x in (self.image, self.question_relevancy, self.answer_relevancy)
        )
        ratio = self.log_likelihood_ratio
        return WordRelevancy(
            text=self.answer[start:end],
            span=(start, end),
            tokens=inside,
            image=image,
            patches=None if self.patches is None else self.patches[rows].mean(0),
            question=question,
            visual_contribution=_share(image[None], question[None], answer[None]).item(),
            probability=self.probability[inside].prod().item(),
            log_likelihood_ratio=None if ratio is None else ratio[inside].sum().item(),
        )

    def save(self, folder: str | Path) -> None:
        """Write explanation.safetensors and explanation.json into `folder`, exactly."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {name: getattr(self, name) for name in TEXTS}
        tensors = {name: getattr(self, name) for name in TENSORS}
        kept = {name: x.contiguous() for name, x in tensors.items() if x is not None}
        save_file(kept, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when `folder` holds no explanation.
        """
        folder = Path(folder)
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{folder} holds no explanation; write one with save().")
        texts = json.loads((folder / CONFIG_NAME).read_text())
        texts["spans"] = [(start, end) for start, end in texts["spans"]]
        tensors: dict[str, Any] = {"patches": None, **load_file(folder / WEIGHTS_NAME)}
        return cls(**texts, **tensors)


def _share(image: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    seen = image.flatten(1).sum(1)
    total = seen + question.sum(1) + answer.sum(1)
    return torch.where(total > 0, seen / total.clamp_min(torch.finfo(total.dtype).tiny), 0)


def tokens_within(spans: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Indices of the tokens that share a character with `start` to `end`."""
    return [i for i, (first, last) in enumerate(spans) if first < end and last > start]


def token_spans(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text of `token_ids`, stripped at both ends, and each token's characters in it.

    Tokens that are bytes of one character share that character. Special tokens are kept as text.
    """
    prefixes = [
        str(tokenizer.decode(token_ids[:count], clean_up_tokenization_spaces=False))
        for count in range(len(token_ids) + 1)
    ]
    text = prefixes[-1]
    ends = [len(os.path.commonprefix([prefix, text])) for prefix in prefixes]
    ends[-1] = len(text)
    pairs = [(first, max(last, first + 1)) for first, last in zip(ends, ends[1:], strict=False)]
    skipped = len(text) - len(text.lstrip())
    stripped = text.strip()
    limit = len(stripped)
    return stripped, [
        (min(max(first - skipped, 0), limit), min(max(last - skipped, 0), limit))
        for first, last in pairs
    ]
