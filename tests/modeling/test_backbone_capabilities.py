"""MiniGPT-4, ConvLLaVA and the Owls beyond answering: steered, fitted, labelled, or refused.

Their relevancy is compared with full matrices in test_relevancy_families.py.
"""

import pytest
import torch
from tiny_backbones import BACKBONES, tiny_backbone, tiny_backbone_processor
from tiny_models import tiny_image, tiny_inputs

from firsthand.modeling import GroundedLlavaForConditionalGeneration
from firsthand.modeling.families import image_grid, image_grids, patch_grid, vision_layers
from firsthand.modeling.head_attention import head_attention
from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import MODES, SteeringVector, attach_steering
from firsthand.modeling.steering_fit import fit_steering
from firsthand.modeling.steering_vision import fit_vti_vision
from firsthand.modeling.steering_weights import fold_steering
from firsthand.modeling.vision_modeling import combined_loss, vision_logits
from firsthand.processing.collator import VisionLabelCollator

QUESTIONS = ["What?", "Is there a dog in the image?"]
LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
QUERIED = ["minigpt4", "mplug_owl", "mplug_owl2"]


def _vector(**kwargs):
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({i: torch.randn(32, generator=generator) for i in (0, 1)}, **kwargs)


@pytest.mark.parametrize(("name", "mode"), zip(BACKBONES, MODES, strict=True))
def test_batches_are_steered_with_and_without_cache(name, mode):
    model, processor = tiny_backbone(name), tiny_backbone_processor(name)
    inputs, alone = (tiny_inputs(processor, q) for q in (QUESTIONS, QUESTIONS[:1]))
    keys, plain = list(model.state_dict()), model.generate(**inputs, **LENGTH)
    with attach_steering(model, _vector(mode=mode), strength=1.5) as steering:
        steered = model.generate(**inputs, **LENGTH)
        assert not torch.equal(steered, plain)
        assert torch.equal(model.generate(**inputs, use_cache=False, **LENGTH), steered)
        assert torch.equal(model.generate(**alone, **LENGTH)[0, -5:], steered[0, -5:])
        steering.strength = 0
        assert torch.equal(model.generate(**inputs, **LENGTH), plain)
    assert torch.equal(model.generate(**inputs, **LENGTH), plain)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["conv_llava", "mplug_owl", "mplug_owl2"])
def test_a_gate_opens_by_what_the_image_supports(name):
    model, inputs = tiny_backbone(name), tiny_inputs(tiny_backbone_processor(name), QUESTIONS)
    plain = model.generate(**inputs, **LENGTH)
    with attach_steering(model, _vector(), strength=1.5):
        steered = model.generate(**inputs, **LENGTH)
    for gate, expected in ((2.0, steered), (-2.0, plain)):
        with attach_steering(model, _vector(gate=gate), strength=1.5):
            assert torch.equal(model.generate(**inputs, **LENGTH), expected)


def test_a_gate_is_refused_where_generate_hides_the_image():
    model, inputs = tiny_backbone("minigpt4"), tiny_inputs(tiny_backbone_processor("minigpt4"))
    with attach_steering(model, _vector(gate=0.5)):
        assert torch.isfinite(model(**inputs).logits).all()
    with (
        attach_steering(model, _vector(gate=0.5)),
        pytest.raises(ValueError, match="MiniGPT4ForConditionalGeneration does not pass on"),
    ):
        model.generate(**inputs, **LENGTH)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_fitted_vector_is_that_of_each_pair_alone(name):
    model, processor = tiny_backbone(name), tiny_backbone_processor(name)
    pairs = [
        {
            "positive": {"image": tiny_image(i), "question": q, "answer": "a dog top left."},
            "negative": {"image": tiny_image(i + 2), "question": q, "answer": "a cup."},
        }
        for i, q in enumerate(QUESTIONS)
    ]
    together, alone = (
        fit_steering(model, processor, pairs, batch_size=size, progress=False) for size in (2, 1)
    )
    for layer, direction in together.directions.items():
        assert float(direction.norm()) > 1e-2
        torch.testing.assert_close(direction, alone.directions[layer], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_folding_is_for_stock_classes(name):
    with pytest.raises(ValueError, match="no class of transformers.* use attach_steering"):
        fold_steering(tiny_backbone(name), _vector())


@pytest.mark.parametrize("name", BACKBONES)
def test_the_vision_encoder_is_steered_where_it_has_tokens(name):
    model, processor = tiny_backbone(name), tiny_backbone_processor(name)
    vision = {0: torch.ones(24)}
    if name == "conv_llava":
        with pytest.raises(ValueError, match="vision encoder of 'conv_llava' is a convnext"):
            fit_vti_vision(model, processor, [tiny_image()], progress=False)
        with pytest.raises(ValueError, match="vision encoder of 'conv_llava' is a convnext"):
            attach_steering(model, SteeringVector({}, vision=vision))
        return
    vector = fit_vti_vision(model, processor, [tiny_image()], 0.5, 2, batch_size=2, progress=False)
    assert len(vector.vision) == len(vision_layers(model)) == 2
    inputs = tiny_inputs(processor)
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach_steering(model, vector, strength=5.0):
            moved = float((model(**inputs).logits - plain).abs().max())
    assert moved > 1e-3


@pytest.mark.parametrize("name", QUERIED)
def test_queries_have_no_places_to_label_or_draw(name):
    model, processor = tiny_backbone(name), tiny_backbone_processor(name)
    inputs = tiny_inputs(processor)
    kind = {"minigpt4": "blip-2"}.get(name, name)
    calls = (
        lambda: VisionLabelCollator(processor, model.config),
        lambda: vision_logits(model, **inputs),
        lambda: head_attention(model, inputs, [3]),
        lambda: image_grids(model.config, inputs),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"'{kind}' has no grid of image tokens: .*queries"):
            call()


def test_the_end_of_an_abstractors_queries_has_no_relevancy_to_the_image():
    """It is the same for every image, so it counts for neither image nor text."""
    model, processor = tiny_backbone("mplug_owl"), tiny_backbone_processor("mplug_owl")
    found = explain(model, processor, tiny_image(), "What?", "a dog", layers=True)
    assert found.image.shape[1:] == (1, 5) and found.patches.shape[1:] == (4, 4)
    assert found.image_layers.shape[-2:] == (1, 5)


def test_conv_llava_cells_lie_on_its_grid():
    model, processor = tiny_backbone("conv_llava"), tiny_backbone_processor("conv_llava")
    inputs = tiny_inputs(processor, QUESTIONS)
    assert patch_grid(model.config) == (32, 32) and image_grid(model.config) == (2, 2)
    assert image_grids(model.config, inputs) == [(2, 2), (2, 2)]
    logits = vision_logits(model, **inputs)
    with torch.no_grad():
        whole = model(**inputs).logits
    image = inputs["input_ids"] == model.config.image_token_id
    torch.testing.assert_close(logits, whole[image].view(2, 4, -1))


def test_conv_llava_learns_vision_labels():
    model, processor = tiny_backbone("conv_llava"), tiny_backbone_processor("conv_llava")
    model.requires_grad_(True)
    batch = dict(tiny_inputs(processor))
    image = batch["input_ids"] == model.config.image_token_id
    batch["labels"] = torch.where(image, -100, batch["input_ids"])
    batch["vision_labels"] = torch.where(image, 300, -100)
    loss = combined_loss(model, batch, vision_weight=1.0)
    torch.testing.assert_close(
        loss.vision,
        torch.nn.functional.cross_entropy(
            vision_logits(model, **tiny_inputs(processor))[0], torch.full((4,), 300)
        ),
    )
    loss.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.model.multi_modal_projector.parameters())


def test_conv_llava_heads_are_those_of_eager_attention():
    model = tiny_backbone("conv_llava")
    inputs = tiny_inputs(tiny_backbone_processor("conv_llava"))
    last = inputs["input_ids"].shape[1] - 1
    rows = head_attention(model, inputs, [last])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model.base_model(**inputs, output_attentions=True).attentions)
    image = (inputs["input_ids"] == model.config.image_token_id)[0]
    expected = maps[:, 0][:, :, [last]][..., image].unflatten(-1, (2, 2))
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["conv_llava", "mplug_owl", "mplug_owl2"])
def test_grounded_classes_take_no_other_family(name):
    with pytest.raises(ValueError, match=f"GroundedLlavaConfig.*'llava'.*'{name}'"):
        GroundedLlavaForConditionalGeneration.from_stock(tiny_backbone(name))
