"""Batches for vision modeling: conversations about images, with a word for each image token.

FiVL's labels (arXiv 2412.14672): an image token that a key expression's mask covers must predict
the expression's noun. Labels are made here, from masks in pixels of the original image, so that one
data set serves every model. What it is not: an augmenter (expressions, nouns and masks are given),
or a loss (`firsthand.modeling.vision_modeling`).

    collator = VisionLabelCollator(processor, model.config)
    batch = collator([sample, ...])
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedConfig, ProcessorMixin

from firsthand.modeling.families import (
    Grid,
    check_causal,
    family_of,
    image_grid,
    image_grids,
    image_token_id,
)
from firsthand.processing.masks import Frame, decode, frame_of, patch_coverage

IGNORE = -100
Conflict = Literal["smallest", "first", "most_covered"]
Noun = Literal["last", "first", "random"]
Sample = Mapping[str, Any]


def word_token(tokenizer: Any, word: str) -> int:
    """The token that a word starts with inside a sentence.

    It is read from "a <word>": after a space, as byte-level BPE needs it, and without one where the
    tokenizer marks word beginnings itself. Needs a fast tokenizer.
    """
    encoded = tokenizer(f"a {word}", add_special_tokens=False)
    return encoded.input_ids[encoded.char_to_token(2)]


class AnswerCollator:
    """Conversations about images -> a padded batch whose labels are the answers' tokens.

    A sample is `{id, image (PIL), turns: [{question, answer, ...}]}`. One whose image is None is
    text only: its answers are learnt like all others, its questions are not.

    Args:
        processor: the model's own, with a chat template and a fast tokenizer.

    Raises:
        ValueError: for a processor without a chat template.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        if processor.chat_template is None:
            raise ValueError("the processor has no chat template: set its chat_template first")
        self.processor, self.tokenizer = processor, processor.tokenizer

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """The batch of some samples.

        Returns:
            What the processor gives (input_ids, attention_mask [B, T], pixel_values [B, ...]),
            padded on the right and never cut, and `labels` (int64 [B, T], -100 for none): answer
            tokens, each answer's end token included.

        Raises:
            ValueError: where answers cannot be told from questions.
        """
        rendered = [self._render(sample) for sample in samples]
        images = [[s["image"].convert("RGB")] if s["image"] else [] for s in samples]
        batch = dict(
            self.processor(
                images=images if any(images) else None,
                text=[text for text, _ in rendered],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        )
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
        for row, (text, ends) in enumerate(rendered):
            length = int(batch["attention_mask"][row].sum())
            for start, end in self._answers(text, ends, length):
                batch["labels"][row, start:end] = batch["input_ids"][row, start:end]
        return batch

    def _render(self, sample: Sample) -> tuple[str, list[tuple[str, str]]]:
        """The conversation's text, and for each turn the text up to its answer and through it."""
        messages: list[dict] = []
        ends, render = [], self.processor.apply_chat_template
        for turn in sample["turns"]:
            content = [{"type": "image"}] if sample["image"] and not messages else []
            content.append({"type": "text", "text": turn["question"]})
            messages.append({"role": "user", "content": content})
            before = render(messages, add_generation_prompt=True)
            answer = [{"type": "text", "text": turn["answer"]}]
            messages.append({"role": "assistant", "content": answer})
            ends.append((before, render(messages)))
        text = ends[-1][1] if ends else ""
        if not ends or not all(text.startswith(part) for pair in ends for part in pair):
            raise ValueError(
                f"sample {sample['id']!r}: it has no turns, or the chat template writes a turn "
                "differently when another follows, so answers cannot be told from questions"
            )
        return text, ends

    def _answers(self, text: str, ends: list[tuple[str, str]], length: int) -> list[tuple]:
        """First and last + 1 position of each answer, its end token included, among `length`.

        The image comes before every answer, so the tokens that the processor puts in for it move
        all answers by the same number.
        """
        plain = self.tokenizer(text).input_ids
        moved, spans = length - len(plain), []
        for before, through in ends:
            prompt, whole = self.tokenizer(before).input_ids, self.tokenizer(through).input_ids
            if plain[: len(prompt)] != prompt or plain[: len(whole)] != whole:
                raise ValueError(
                    "the tokenizer joins an answer with the text around it; let the chat template "
                    "put a special token or a space between"
                )
            answer = whole[len(prompt) :]
            ended = [i for i, t in enumerate(answer, 1) if t == self.tokenizer.eos_token_id]
            start = len(prompt) + moved
            spans.append((start, start + (ended[-1] if ended else len(answer))))
        return spans


class VisionLabelCollator(AnswerCollator):
    """Grounded samples -> a padded batch, for `combined_loss`.

    A sample is `{id, image (PIL), turns: [{question, answer, expressions: [{nouns, mask, ...}]}]}`.
    Each expression labels the image tokens that its mask covers with the first token of one of its
    nouns. Expressions without nouns or without mask give no label. A sample whose image is None is
    text only: its answers are learnt like all others, its questions are not.

    Args:
        processor: the model's own, with a chat template and a fast tokenizer.
        config: the model's config; it gives the grid of image tokens.
        frame: what the processor's image processing shows of an image (see `masks`); None asks the
            processor.
        threshold: a token is labelled where at least this share of its area is covered, 0..1; at 0
            any overlap counts, as in FiVL.
        max_area: expressions that would label more than this share of the image are left out.
        conflict: who labels a token that several expressions cover: the one with the smallest mask,
            the first one (FiVL), or the one that covers most of the token.
        noun: which noun of an expression: the last (the head of an English compound), the first, or
            one drawn each time the sample is read (FiVL).
        seed: of that draw.

    Raises:
        ValueError: for settings out of range, a model without places for labels, or a processor
            without a chat template.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        frame: Frame | None = None,
        threshold: float = 0.5,
        max_area: float = 0.3,
        conflict: Conflict = "smallest",
        noun: Noun = "last",
        seed: int = 0,
    ) -> None:
        if not 0 <= threshold <= 1 or not 0 < max_area <= 1:
            raise ValueError(
                f"threshold is {threshold}, max_area {max_area}; both are shares of an area in 0..1"
            )
        for name, value, kind in (("conflict", conflict, Conflict), ("noun", noun, Noun)):
            if value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; it must be one of {get_args(kind)}")
        if frame is not None and frame not in get_args(Frame):
            raise ValueError(f"frame is {frame!r}; it must be one of {get_args(Frame)}")
        check_causal(config, "vision modeling")
        if family_of(config).grids is None:
            image_grid(config)
        super().__init__(processor)
        self.config, self.image_token = config, image_token_id(config)
        self.frame, self.threshold, self.max_area = frame, threshold, max_area
        self.conflict, self.noun = conflict, noun
        self._draw = random.Random(seed)
        self._tokens: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """The batch of some samples.

        Returns:
            What AnswerCollator gives, and `vision_labels` (int64 [B, T], -100 for none), the
            labels of image tokens.

        Raises:
            ValueError: naming the sample, where its mask is not of its image's size, or the
                processor does not write one image's tokens.
        """
        batch = super().__call__(samples)
        ids, grids = batch["input_ids"], iter(image_grids(self.config, batch))
        batch["vision_labels"] = torch.full_like(ids, IGNORE)
        for row, sample in enumerate(samples):
            on_image = (ids[row] == self.image_token).nonzero()[:, 0]
            if sample["image"]:
                labels = self.vision_labels(sample, self._grid(sample, grids, len(on_image)))
                batch["vision_labels"][row, on_image] = torch.from_numpy(labels.ravel())
        return batch

    def _grid(self, sample: Sample, grids: Iterator[Grid], found: int) -> Grid:
        """The next image's grid, which must be that of all of the row's image tokens."""
        grid = next(grids, (0, 0))
        if found != grid[0] * grid[1]:
            raise ValueError(
                f"sample {sample['id']!r}: the processor wrote {found} image tokens, one image has "
                f"{grid[0]} x {grid[1]}. Use the model's own processor, and switch image splitting "
                "off (do_image_splitting, crop_to_patches), since tiles overlap the whole image"
            )
        return grid

    def vision_labels(self, sample: Sample, grid: Grid) -> np.ndarray:
        """What each image token must predict: token ids, -100 for none, int64 [R, C] = `grid`."""
        labels = np.full(grid, IGNORE, dtype=np.int64)
        best = np.full(grid, -np.inf)
        frame = self.frame or frame_of(self.processor)
        expressions = [e for turn in sample["turns"] for e in turn["expressions"] or ()]
        for order, expression in enumerate(expressions):
            if not expression["nouns"] or not expression["mask"]:
                continue
            mask = self._mask(sample, expression)
            coverage = patch_coverage(mask, grid, frame)
            covered = (coverage >= self.threshold) & (coverage > 0)
            if covered.mean() > self.max_area:
                continue
            wins = {"first": -order, "smallest": -mask.sum(), "most_covered": coverage}
            score = np.broadcast_to(wins[self.conflict], grid)
            chosen = covered & (score > best)
            labels[chosen] = self._token(self._chosen(expression["nouns"]))
            best[chosen] = score[chosen]
        return labels

    def _chosen(self, nouns: Sequence[str]) -> str:
        if self.noun == "random":
            return self._draw.choice(nouns)
        return nouns[-1 if self.noun == "last" else 0]

    def _mask(self, sample: Sample, expression: Mapping[str, Any]) -> np.ndarray:
        mask, size = decode(expression["mask"]), sample["image"].size
        if mask.shape != size[::-1]:
            raise ValueError(
                f"sample {sample['id']!r}: the mask of {expression.get('text')!r} is {mask.shape}, "
                f"its image {size[::-1]} (H, W); masks belong to the original image"
            )
        return mask

    def _token(self, noun: str) -> int:
        if noun not in self._tokens:
            self._tokens[noun] = word_token(self.tokenizer, noun)
        return self._tokens[noun]
