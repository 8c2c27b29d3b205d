"""Relevancy of every family against the slow full-matrix rule over transformers' eager maps."""

from functools import partial

import pytest
import torch
from relevancy_oracle import oracle, shares
from tiny_backbones import BACKBONES, tiny_backbone, tiny_backbone_processor
from tiny_models import (
    PALIGEMMA_2,
    PARTIAL,
    TINY,
    tiny_gemma3,
    tiny_image,
    tiny_processor,
    tiny_prompt,
)

from firsthand.modeling.families import FAMILIES, vision_layers
from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import SteeringVector, attach_steering

QUESTION = "What is in the image?"
ANSWER = "a dog top left, a cup."
GRIDS = {  # rows, columns and merge for the image of 80 x 60 pixels, or what stands for it
    "llava": (4, 4, 1),
    "internvl": (2, 2, 2),
    "qwen2_vl": (2, 3, 2),
    "qwen2_5_vl": (2, 3, 2),
    "qwen3_vl": (2, 3, 2),
    "gemma3": (2, 2, 2),
    "paligemma": (4, 4, 1),
    "paligemma2": (4, 4, 1),
    "llava_next": (6, 8, "views"),
    "llava_onevision": (6, 8, "views"),
    "blip-2": (1, 6, "queries"),
    "instructblip": (1, 6, "queries"),
    "idefics3": (2, 2, 2),
    "smolvlm": (2, 2, 2),
    "minigpt4": (1, 5, "queries"),
    "conv_llava": (2, 2, "cells"),
    "mplug_owl": (1, 5, "abstractor"),
    "mplug_owl2": (1, 5, "abstractor"),
}
# Gemma 3's windows are shorter than the prompt here
MODELS = TINY | PARTIAL | {"gemma3": partial(tiny_gemma3, sliding_window=8)}
MODELS["paligemma2"] = PALIGEMMA_2
MODELS |= {name: partial(tiny_backbone, name) for name in BACKBONES}
VARIANTS = {"paligemma2", "minigpt4"}  # of the rows of PaliGemma and BLIP-2
# image tokens mix several layers of the vision encoder, or it has no attention
UNCHAINED = {"qwen3_vl", "conv_llava"}


def processor_of(family):
    return tiny_backbone_processor(family) if family in BACKBONES else tiny_processor(family)


def test_every_family_is_tested():
    assert set(GRIDS) - VARIANTS == set(FAMILIES)


@torch.no_grad()
def sharp(model):
    """With vision weights large enough that its attention is far from uniform."""
    for parameter in vision_layers(model).parameters():
        if parameter.ndim == 2 and parameter.std() < 0.15:
            parameter.mul_(0.2 / parameter.std())
    return model


@pytest.mark.parametrize("backend", ["streaming", "eager"])
@pytest.mark.parametrize("family", GRIDS)
def test_it_equals_the_full_matrix_rule(family, backend):
    model, processor, image = sharp(MODELS[family]()), processor_of(family), tiny_image(3)
    found = explain(model, processor, image, QUESTION, ANSWER, backend=backend, layers=True)
    asked = tiny_prompt(processor, QUESTION)
    prompt = len(processor(images=[[image]], text=[asked])["input_ids"][0])
    *grid, merge = GRIDS[family]
    assert (found.patches is None) == (family in UNCHAINED)
    rows = list(oracle(model, processor, image, QUESTION, ANSWER, tuple(grid), merge))
    assert len(rows) == len(found.tokens) == len(found.selected)
    for index, (layers, tokens, patches) in enumerate(rows):
        row = layers[-1]
        scale = float(row.max())
        assert scale > 1e-4 and tokens.max() > 1e-6
        pairs = [(found.image, tokens), (found.answer_relevancy, row[prompt:])]
        pairs.append((found.answer_layers, layers[:, prompt:]))
        if family not in UNCHAINED:
            assert patches.max() > 1e-6
            small = 1e-5 * float(patches.max())
            torch.testing.assert_close(found.patches[index], patches, atol=small, rtol=0)
        if family not in UNCHAINED and isinstance(merge, int):  # what the encoder itself moved
            laid, moved = shares(found.image[index], merge), patches - shares(tokens, merge)
            small = 1e-3 * float(moved.max())
            torch.testing.assert_close(found.patches[index] - laid, moved, atol=small, rtol=0)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[index], theirs, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("family", GRIDS)
def test_an_answer_is_read_as_it_was_generated(family):
    """Position ids, masks and token types of the answer are those of decoding step by step."""
    model, processor, image = MODELS[family](), processor_of(family), tiny_image(3)
    found = explain(model, processor, image, QUESTION, max_new_tokens=6, tokens=[0])
    inputs = processor(
        images=[[image]], text=[tiny_prompt(processor, QUESTION)], return_tensors="pt"
    )
    inputs.pop("labels", None)
    said = model.generate(
        **inputs, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
    )
    assert len(found.token_ids) >= 3
    for index, token in enumerate(found.token_ids):
        expected = said.logits[index][0].softmax(-1)[token]
        torch.testing.assert_close(found.probability[index], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", GRIDS)
def test_steering_is_in_force(family):
    model, processor = MODELS[family](), processor_of(family)
    ask = partial(explain, model, processor, tiny_image(3), QUESTION, ANSWER, tokens=[0])
    plain = ask().probability
    with attach_steering(model, SteeringVector({0: torch.linspace(-1, 1, 32)}), strength=2.0):
        assert float((ask().probability / plain).log().abs().max()) > 1e-2
    assert torch.equal(ask().probability, plain)
