"""Steering's other forms: turns of VTI and VISTA, the vision side, and the gate of support."""

from dataclasses import replace

import pytest
import torch
from tiny_models import TINY, tiny_inputs, tiny_llava, tiny_processor, tiny_qwen
from torch.nn import functional as F

from firsthand.modeling.families import decoder_layers, image_mask, steered_modules, vision_layers
from firsthand.modeling.modeling_grounded_llava import GroundedLlavaForConditionalGeneration
from firsthand.modeling.steering import SteeringVector, attach_steering, steer
from firsthand.modeling.steering_gate import MOST_SIMILAR

QUESTIONS = ["What?", "Is there a dog in the image?"]
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def _vector(layers=(0, 1), size=32, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(size, generator=generator) for layer in layers}
    return SteeringVector(directions, **kwargs)


def _vision(model, per_token=False, seed=1):
    layers = vision_layers(model)
    width = [m for m in layers[0].mlp.modules() if isinstance(m, torch.nn.Linear)][-1].out_features
    generator = torch.Generator().manual_seed(seed)
    shape = (17, width) if per_token else (width,)
    return {i: torch.randn(shape, generator=generator) for i in range(2)}


@torch.no_grad()
def _logits(model, inputs):
    return model(**inputs).logits


# modes


def test_turn_is_vtis_formula():
    hidden, direction, alpha = torch.randn(2, 5, 8) * 3, torch.randn(8), 0.9
    toward = F.normalize(hidden, dim=-1) + 0.1 * alpha * F.normalize(direction, dim=0)
    expected = F.normalize(toward, dim=-1) * hidden.norm(dim=-1, keepdim=True)
    unit = 0.1 * F.normalize(direction, dim=0)
    torch.testing.assert_close(steer(hidden, unit, torch.tensor(alpha), "turn"), expected)


def test_vista_turns_more_what_points_away():
    hidden, direction, alpha = torch.randn(2, 5, 8) * 3, torch.randn(8), 0.17
    away = F.cosine_similarity(hidden, -direction, dim=-1).clamp_min(0)[..., None]
    unit = F.normalize(direction, dim=0)
    toward = F.normalize(hidden, dim=-1) + alpha * (1 + away) * unit
    expected = F.normalize(toward, dim=-1) * hidden.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(steer(hidden, unit, torch.tensor(alpha), "vista"), expected)


# the vision side


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_encoder_of_every_family_is_steered(family):
    model, inputs = TINY[family](), tiny_inputs(tiny_processor(family), QUESTIONS)
    plain = _logits(model, inputs)
    vector = SteeringVector({}, vision=_vision(model), mode="turn")
    with attach_steering(model, vector, strength=0.5) as steering:
        assert not torch.equal(_logits(model, inputs), plain)
        steering.strength = 0
        assert torch.equal(_logits(model, inputs), plain)
    assert torch.equal(_logits(model, inputs), plain)
    assert not any(layer.mlp._forward_hooks for layer in vision_layers(model))


def test_a_direction_a_token_is_added_to_that_token():
    model = tiny_llava()
    mlp, vector = vision_layers(model)[0].mlp, SteeringVector({}, vision={0: torch.randn(17, 24)})
    hidden = torch.randn(2, 17, 24)
    with torch.no_grad(), attach_steering(model, vector, strength=2.0):
        steered = mlp(hidden)
    torch.testing.assert_close(steered, mlp(hidden) + 2 * vector.vision[0])


def test_text_and_vision_sides_compose():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor(), QUESTIONS)
    text, vision = _vector(), SteeringVector({}, vision=_vision(model))
    with attach_steering(model, text), attach_steering(model, vision):
        expected = _logits(model, inputs)
    with attach_steering(model, text | vision):
        assert torch.equal(_logits(model, inputs), expected)
    both = (text | vision) - (text | vision)
    assert not any(d.any() for d in (*both.directions.values(), *both.vision.values()))
    with pytest.raises(ValueError, match=r"share layers \[0, 1\]"):
        text | text


def test_a_vision_vector_that_does_not_fit_is_refused():
    model, qwen = tiny_llava(), tiny_qwen()
    for vision, message in [
        ({0: torch.ones(9)}, "length 9, the encoder's hidden size is 24"),
        ({7: torch.ones(24)}, r"layers 0 to 2, the vector also \[7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach_steering(model, SteeringVector({}, vision=vision))
    inputs = tiny_inputs(tiny_processor("qwen2_5_vl"))
    vector = SteeringVector({}, vision={0: torch.ones(17, 32)})
    with attach_steering(qwen, vector), pytest.raises(ValueError, match="each of 17 vision tokens"):
        qwen(**inputs)


# the gate


@torch.no_grad()
def _slow_support(model, inputs, layer):
    """Mean cosine with the most similar image positions, position by position."""
    kept = []
    handle = decoder_layers(model)[layer].register_forward_pre_hook(
        lambda m, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(**inputs)
    handle.remove()
    states, inside = kept[0], image_mask(model, inputs["input_ids"])
    found = torch.zeros(states.shape[:2])
    for row in range(len(states)):
        images = states[row][inside[row]]
        for place in range(states.shape[1]):
            cosines = F.cosine_similarity(states[row, place][None], images)
            found[row, place] = cosines.sort(descending=True).values[:MOST_SIMILAR].mean()
    return found


@pytest.mark.parametrize("family", sorted(TINY))
def test_support_is_the_similarity_to_image_positions(family):
    model, inputs = TINY[family](), tiny_inputs(tiny_processor(family), QUESTIONS)
    with attach_steering(model, _vector(gate=0.5), strength=0) as steering:
        _logits(model, inputs)
        found = steering.gate.supports
    for layer in (0, 1):
        expected = _slow_support(model, inputs, layer)
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-5)


def test_only_positions_below_the_gate_move():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor(), QUESTIONS)
    support = _slow_support(model, inputs, 1)
    gate = support.median().item()
    kept = []
    module = steered_modules(model)[1]
    with torch.no_grad():
        handle = module.register_forward_hook(lambda m, a, output: kept.append(output))
        model(**inputs)
        handle.remove()
        with attach_steering(model, _vector(layers=[1], gate=gate)):
            handle = module.register_forward_hook(lambda m, a, output: kept.append(output))
            model(**inputs)
            handle.remove()
    moved = (kept[1] - kept[0]).abs().sum(-1) > 0
    assert torch.equal(moved, support < gate) and moved.any() and not moved.all()


def test_an_open_gate_is_no_gate_and_a_closed_one_no_steering():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor(), QUESTIONS)
    plain, keys = model.generate(**inputs, **LENGTH), set(model.state_dict())
    with attach_steering(model, _vector()):
        steered = model.generate(**inputs, **LENGTH)
    for gate, expected in ((2.0, steered), (-2.0, plain)):
        with attach_steering(model, _vector(gate=gate)):
            assert torch.equal(model.generate(**inputs, **LENGTH), expected)
            assert set(model.state_dict()) == keys
    modules = [model.model, *decoder_layers(model)]
    assert not any(module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}]
)
def test_the_gate_remembers_the_image_in_every_cache(settings):
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor(), QUESTIONS)
    beams = {"num_beams": settings.get("num_beams", 1), "use_cache": False}
    gate = _slow_support(model, inputs, 1).median().item()
    with attach_steering(model, _vector(gate=gate), strength=3):
        slow = model.generate(**inputs, **beams, **LENGTH)
        assert torch.equal(model.generate(**inputs, **settings, **LENGTH), slow)


def test_words_without_an_image_have_no_support():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor(), QUESTIONS)
    with attach_steering(model, _vector(gate=0.5)) as steering, torch.no_grad():
        model(**inputs)
        assert (steering.gate.supports[1] > -1).all()
        text = torch.randint(10, 100, (2, 7))
        cache = model(input_ids=text).past_key_values
        assert (steering.gate.supports[1] == -1).all()
        model(input_ids=text[:, :1], past_key_values=cache)
        assert (steering.gate.supports[1] == -1).all()


def test_a_checkpoint_holds_neither_gate_nor_vision_side():
    model = GroundedLlavaForConditionalGeneration.from_stock(tiny_llava())
    for vector in (_vector(gate=0.5), _vector() | SteeringVector({}, vision=_vision(model))):
        with pytest.raises(ValueError, match="use attach_steering"):
            model.set_steering(vector)
    model.set_steering(_vector(mode="turn"), strength=0.5)
    assert model.config.steering_mode == "turn"


def test_a_gate_needs_input_ids_and_decoder_layers():
    model = tiny_llava()
    with attach_steering(model, _vector(gate=0.5)), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    with pytest.raises(ValueError, match="encoder only"):
        SteeringVector({}, vision={0: torch.ones(24)}, gate=0.5)
    with pytest.raises(ValueError, match="gate is nan"):
        replace(_vector(), gate=float("nan"))
