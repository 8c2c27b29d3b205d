"""The support of words against log-likelihoods taken from plain forward passes."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_image, tiny_internvl, tiny_llava, tiny_processor

from firsthand.processing.support import blank, supports

ANSWER = "a dog top left, a cup."


def test_a_blank_image_has_the_mean_colour_alone():
    image = tiny_image()
    pixels = np.array(blank(image)).reshape(-1, 3)
    assert (pixels == pixels[0]).all() and blank(image).size == image.size
    assert abs(pixels[0] - np.array(image).reshape(-1, 3).mean(0)).max() < 1


@pytest.mark.parametrize("family", ["internvl", "llava"])
def test_support_is_the_log_likelihood_ratio(family):
    model = {"internvl": tiny_internvl, "llava": tiny_llava}[family]()
    processor, image = tiny_processor(family), tiny_image()
    prompt = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    offsets = processor.tokenizer(ANSWER, return_offsets_mapping=True).offset_mapping
    sums = []
    for picture in (image, blank(image)):
        inputs = processor(images=[picture], text=[prompt + ANSWER], return_tensors="pt")
        with torch.no_grad():
            chances = model(**inputs).logits[0].log_softmax(-1)
        ids, n = inputs["input_ids"][0], len(offsets)
        said = [float(chances[-n - 1 + i, ids[-n + i]]) for i in range(n)]
        placed = list(zip(said, offsets, strict=True))
        words = [(2, 5), (18, 21)]
        sums.append([sum(s for s, (a, b) in placed if a < e and b > at) for at, e in words])
    expected = np.array(sums[0]) - np.array(sums[1])
    found = supports(model, processor, image, "What?", ANSWER, [(2, 5), (18, 21)])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found).max() > 1e-4 and supports(model, processor, image, "x", "a", []) == []
