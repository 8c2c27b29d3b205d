"""A model trained with vision modeling as its own segmenter, which closes FiVL's loop.

What it is: the probability that image tokens say a phrase's noun, one forward pass for all phrases,
brought back to pixels and sharpened by a saliency map where there is one. What it is not: sharp by
itself: its pixels are image tokens (16 for the demo model), and it knows what the model knows.

    VisionLogits(model, processor, saliency).segment(image, ["a dog", "the cup"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from firsthand.modeling.families import image_grids
from firsthand.modeling.placement import input_device
from firsthand.modeling.vision_modeling import vision_logits
from firsthand.processing import masks
from firsthand.processing.generation import one_view, prepare_inputs
from firsthand.processing.key_expressions import compound_noun, head_noun
from firsthand.processing.segmenters import Saliency, Segment
from firsthand.processing.vision_words import spellings_of

QUESTION = "Describe the image."


class VisionLogits:
    """Segments by vision logits.

    Args:
        model: a supported model whose image tokens say words (see `train_vision_modeling`).
        processor: its own.
        saliency: image -> float [H, W] in 0..1; None leaves the blocks of image tokens as they are.
        threshold: a pixel belongs to a noun where its probability reaches this share of the noun's
            highest in the image.
        floor: a noun whose probability nowhere reaches this is not in the image.
        salient: and where the saliency exceeds this.
    """

    name = "vision-logits"

    def __init__(
        self,
        model: Any,
        processor: Any,
        saliency: Saliency | None = None,
        threshold: float = 0.3,
        floor: float = 0.1,
        salient: float = 0.3,
    ) -> None:
        for name, value in (("threshold", threshold), ("floor", floor), ("salient", salient)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in 0..1")
        self.model, self.processor, self.saliency = model, one_view(processor), saliency
        self.threshold, self.floor, self.salient = threshold, floor, salient

    def segment(self, image: Image.Image, phrases: Sequence[str]) -> list[Segment | None]:
        """As `Segmenter` says; the score is the noun's mean probability inside its mask."""
        return self.segment_from(image, phrases, self.word_maps(image))

    def segment_from(
        self, image: Image.Image, phrases: Sequence[str], maps: torch.Tensor
    ) -> list[Segment | None]:
        """`segment` with the `word_maps` of the image at hand."""
        salient = None if self.saliency is None else self.saliency(image) > self.salient
        return [self._segment(image, phrase, maps, salient) for phrase in phrases]

    @torch.inference_mode()
    def word_maps(self, image: Image.Image) -> torch.Tensor:
        """What each image token says: probabilities over the vocabulary, float32 [R, C, V]."""
        row = {"image": image, "question": QUESTION}
        inputs = prepare_inputs(self.processor, [row], input_device(self.model))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        (grid,) = image_grids(self.model.config, inputs)
        return vision_logits(self.model, **inputs)[0].float().softmax(-1).view(*grid, -1).cpu()

    def soft_map(self, image: Image.Image, nouns: set[str], maps: torch.Tensor) -> np.ndarray:
        """The probability of any of some nouns at each pixel of the original image, float32 [H, W].

        The probabilities of a noun's spellings, and of its plural's, add up; it is 0 outside of
        what the model saw.
        """
        written = nouns | {_plural(noun) for noun in nouns}
        tokenizer = self.processor.tokenizer
        tokens = sorted(set().union(*(spellings_of(tokenizer, word) for word in written)))
        return to_pixels(maps[..., tokens].sum(-1), image.size, masks.frame_of(self.processor))

    def _segment(
        self, image: Image.Image, phrase: str, maps: torch.Tensor, salient: np.ndarray | None
    ) -> Segment | None:
        nouns = {noun for noun in (head_noun(phrase), compound_noun(phrase)) if noun}
        if not nouns:
            return None
        soft = self.soft_map(image, nouns, maps)
        if soft.max() < self.floor:
            return None
        mask = soft >= self.threshold * soft.max()
        if salient is not None:
            mask &= salient
        if not mask.any():
            return None
        left, top, right, bottom = (float(x) for x in masks.boxes_of(mask[None])[0])
        return Segment(mask, float(soft[mask].mean()), [(left, top, right, bottom)])


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def to_pixels(grid: torch.Tensor, size: tuple[int, int], frame: masks.Frame) -> np.ndarray:
    """Values of image tokens [R, C] at the pixels of an image of `size` (width, height), bilinear.

    Pixels that the model did not see are 0.
    """
    left, top, right, bottom = (round(x) for x in masks.seen_area(size, frame))
    seen = torch.nn.functional.interpolate(
        grid[None, None], (bottom - top, right - left), mode="bilinear"
    )[0, 0].numpy()
    out = np.zeros((size[1], size[0]), np.float32)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    out[y0:y1, x0:x1] = seen[y0 - top : y1 - top, x0 - left : x1 - left]
    return out
