"""Does the model still say that a thing is there when it is asked about nothing else?

What it is: the yes/no question about a noun, in POPE's form, and how sure the model is of its
answer: one forward pass a noun. What it is not: the model's answers in words (generation.py), or
the truth: a model that mistakes a thing when it describes may do so here too.

    yes_over_no(model, processor, image, ["dog"])  # {"dog": log-odds}; > 0 means yes
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image

from firsthand.modeling.families import unwrap
from firsthand.processing.generation import shared_features, shared_inputs

YES, NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")
MASS = ("bread", "broccoli", "corn", "food", "grass", "rice", "sand", "snow", "water")


def existence_question(noun: str) -> str:
    """`Is there a dog in the image?`; plural and mass nouns get no article."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    article = "" if plural or noun in MASS else "an " if noun[0] in "aeiou" else "a "
    return f"Is there {article}{noun} in the image?"


@torch.inference_mode()
def yes_over_no(
    model: Any, processor: Any, image: Image.Image, nouns: Iterable[str]
) -> dict[str, float]:
    """Log-odds, in nats, that the answer to `existence_question` begins with yes and not with no.

    The chances of each, written large or small and with or without a space before it, are summed.
    The image is encoded once where the model takes encoded images.

    Args:
        model, processor: a supported model, in eval mode, and its processor with a chat template.
        image: any PIL image.
        nouns: what is asked about, each on its own; case does not matter.

    Returns:
        A number a noun: above 0 for yes.

    Raises:
        ValueError: where the tokenizer does not tell the two answers apart.
    """
    yes, no = (_first_tokens(processor.tokenizer, texts) for texts in (YES, NO))
    yes, no = yes - no, no - yes
    if not yes or not no:
        raise ValueError("the tokenizer begins yes and no with the same token: no way to tell them")
    inner: Any = unwrap(model)
    features, found = shared_features(inner), {}
    for noun in dict.fromkeys(nouns):
        question = existence_question(noun.lower())
        asked = {"image_id": "image", "image": image, "question": question}
        inputs = shared_inputs(inner, processor, [asked], features)
        logits = inner(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        odds = [logits[sorted(ids)].logsumexp(0) for ids in (yes, no)]
        found[noun] = float(odds[0] - odds[1])
    return found


def _first_tokens(tokenizer: Any, texts: tuple[str, ...]) -> set[int]:
    return {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts}
