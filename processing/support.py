"""How much the image supports the words of an answer: with it against a blank one, in nats.

What it is: VaLSe's visual-token test (arXiv 2505.17812): the log-likelihood ratio of a word's
tokens under the image and under an image of its mean colour. A word that the prior would have said
anyway has none. What it is not: a choice of words, or a calibrated warning.

    supports(model, processor, image, "What is it?", "a dog", [(2, 5)])  # [4.1]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from firsthand.modeling.families import unwrap
from firsthand.modeling.image_baselines import baseline_image
from firsthand.processing.answered import forced


def blank(image: Image.Image) -> Image.Image:
    """An image of the same size in its mean colour."""
    return Image.fromarray(baseline_image(np.array(image.convert("RGB")), "blank"))


@torch.inference_mode()
def log_likelihoods(
    model: Any, processor: Any, image: Image.Image, question: str, answer: str
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Log-probability of each token of a given answer, float32 [A], and its characters.

    Raises:
        ValueError: for an empty answer, or one that the chat template does not keep.
    """
    asked = forced(model, processor, image, question, answer)
    count = len(asked.spans)
    tokens = asked.inputs["input_ids"][0, asked.first : asked.first + count]
    logits = unwrap(model)(**asked.inputs).logits[0, asked.first - 1 : asked.first - 1 + count]
    chances = logits.float().log_softmax(-1)
    return chances.gather(-1, tokens[:, None])[:, 0].cpu(), asked.spans


def word_log_likelihoods(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    answer: str,
    words: Sequence[tuple[int, int]],
) -> list[tuple[float, float]]:
    """The log-likelihood of each word with the image and with a blank one, in nats, at most 0.

    Args:
        model, processor: a supported model.
        image: any PIL image.
        question, answer: what was asked, and the answer to test.
        words: (first character, last character + 1) in the answer.
    """
    if not words:
        return []
    with_image, spans = log_likelihoods(model, processor, image, question, answer)
    without, _ = log_likelihoods(model, processor, blank(image), question, answer)
    inside = [[i for i, (a, b) in enumerate(spans) if a < end and b > at] for at, end in words]
    return [(float(with_image[t].sum()), float(without[t].sum())) for t in inside]


def supports(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    answer: str,
    words: Sequence[tuple[int, int]],
) -> list[float]:
    """The support of each word, in nats: positive where the image speaks for it.

    Arguments as in `word_log_likelihoods`.
    """
    found = word_log_likelihoods(model, processor, image, question, answer, words)
    return [with_image - without for with_image, without in found]
