"""Edits of weights: folded steering equals hooks and is a stock checkpoint; Nullu's cut cuts."""

from dataclasses import replace

import pytest
import torch
from tiny_models import (
    PARTIAL,
    TINY,
    tiny_idefics3,
    tiny_inputs,
    tiny_internvl,
    tiny_llava,
    tiny_processor,
    tiny_qwen,
)
from transformers import AutoModelForImageTextToText

from firsthand.modeling import families
from firsthand.modeling.families import steered_modules
from firsthand.modeling.modeling_grounded_llava import GroundedLlavaForConditionalGeneration
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.modeling.steering_fit import contrast_differences
from firsthand.modeling.steering_weights import (
    cut_directions,
    fold_steering,
    hallucinated_directions,
    upper_half,
)

FOLDED = {"llava": tiny_llava, "internvl": tiny_internvl, "idefics3": tiny_idefics3}
FOLDED["smolvlm"] = TINY["smolvlm"]
FOLDED |= {name: PARTIAL[name] for name in ("llava_next", "blip-2", "instructblip")}
QUESTIONS = ["What?", "Is there a dog in the image?"]


def _vector(layers=(0, 1), **kwargs):
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({i: torch.randn(32, generator=generator) for i in layers}, **kwargs)


@torch.no_grad()
def _logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("family", sorted(FOLDED))
def test_a_folded_checkpoint_is_stock_and_equals_hooks(family, tmp_path):
    model, processor = FOLDED[family](), tiny_processor(family)
    inputs, stock = tiny_inputs(processor, QUESTIONS), type(model)
    with attach_steering(model, _vector(layers=[1]), strength=-1.3):
        steered = _logits(model, inputs)
    assert fold_steering(model, _vector(layers=[1]), strength=-1.3) is model
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is stock and "auto_map" not in loaded.config.to_dict()
    assert loaded.config.architectures == [stock.__name__]
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(_logits(loaded, inputs), steered, atol=1e-5, rtol=1e-5)
    if family == "blip-2":  # of OPT: `fc2` has a bias of its own
        assert [type(module).__name__ for module in steered_modules(loaded)] == ["Linear"] * 2
        return
    mlps = [layer.mlp for layer in families.decoder_layers(loaded)]
    assert not any(mlp.gate_proj.bias.any() or mlp.up_proj.bias.any() for mlp in mlps)
    assert not mlps[0].down_proj.bias.any() and mlps[1].down_proj.bias.any()


def test_folding_twice_adds_up():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor())
    with attach_steering(model, _vector(strength=0.5)), attach_steering(model, _vector([0])):
        steered = _logits(model, inputs)
    fold_steering(fold_steering(model, _vector(strength=0.5)), _vector([0]))
    torch.testing.assert_close(_logits(model, inputs), steered, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (_vector(mode="norm"), "mode 'norm' rescales"),
        (_vector(mode="turn"), "mode 'turn' rescales"),
        (_vector(gate=0.3), "it is gated"),
        (_vector() | SteeringVector({}, vision={0: torch.ones(24)}), "vision encoder"),
        (_vector(layers=[5]), r"layers 0 to 1, not \[5\]"),
        (replace(_vector(), directions={0: torch.ones(7)}), "length 7"),
    ],
)
def test_what_a_bias_cannot_say_is_refused(vector, message):
    model = tiny_llava()
    with pytest.raises(ValueError, match=message):
        fold_steering(model, vector)
    assert steered_modules(model)[0].down_proj.bias is None


def test_models_without_place_for_a_bias_are_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llava(), peft.LoraConfig(target_modules=["q_proj"]))
    grounded = GroundedLlavaForConditionalGeneration.from_stock(tiny_llava())
    for model, message in [
        (tiny_qwen(), "type 'qwen2_5_vl_text': its config has no bias"),
        (tiny_llava(text="qwen2"), "type 'qwen2'"),
        (wrapped, "a wrapper: merge it first"),
        (grounded, "which is no class of transformers"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_steering(model, _vector())


def test_a_module_that_ends_in_no_linear_layer_is_refused(monkeypatch):
    """As Gemma's `post_feedforward_layernorm`."""
    monkeypatch.setitem(families.STEERED_MODULES, "llama", "post_attention_layernorm")
    with pytest.raises(ValueError, match="not that of one plain linear layer"):
        fold_steering(tiny_llava(), _vector())


# Nullu


def _pairs(processor):
    from tiny_models import tiny_image

    said = [("a dog.", "a cat."), ("a cup.", "a car top."), ("a tree.", "Yes.")]
    return [
        {
            side: {"image": tiny_image(i), "question": "What?", "answer": text}
            for side, text in zip(("positive", "negative"), texts, strict=True)
        }
        for i, texts in enumerate(said)
    ]


def test_a_cut_behind_a_norm_is_refused():
    """Gemma 3's last module that writes is a norm, whose output no linear layer decides."""
    model = TINY["gemma3"]()
    with pytest.raises(ValueError, match="not that of one plain linear layer"):
        cut_directions(model, {1: torch.eye(2, 32)})


@pytest.mark.parametrize("family", sorted(set(TINY) - {"gemma3"}))
def test_the_cut_leaves_nothing_along_the_directions(family, tmp_path):
    model, processor = TINY[family](), tiny_processor(family)
    layers = upper_half(model)
    differences = contrast_differences(
        model, processor, _pairs(processor), layers, "layer", "all", progress=False
    )
    basis = hallucinated_directions(differences, layers, rank=2)
    assert layers == [1] and basis[1].shape == (2, 32)
    torch.testing.assert_close(basis[1] @ basis[1].T, torch.eye(2), atol=1e-5, rtol=0)
    inputs, outputs = tiny_inputs(processor, QUESTIONS), []
    hook = steered_modules(model)[1].register_forward_hook(lambda m, a, o: outputs.append(o))
    plain = _logits(model, inputs)
    other = model.get_parameter(_name(model, 0)).clone()
    assert not torch.equal(_logits(cut_directions(model, basis), inputs), plain)
    hook.remove()
    before, after = outputs
    expected = before - before @ basis[1].T @ basis[1]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.get_parameter(_name(model, 0)), other)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(_logits(loaded, inputs), _logits(model, inputs))


def _name(model, layer):
    module = steered_modules(model)[layer].down_proj
    return next(n for n, p in model.named_parameters() if p is module.weight)


def test_what_cannot_be_cut_is_refused():
    model = tiny_llava()
    with pytest.raises(ValueError, match="3 pairs allow 1 to 3"):
        hallucinated_directions(torch.randn(3, 1, 32), [1], rank=4)
    with pytest.raises(ValueError, match=r"layers 0 to 1, not \[3\]"):
        cut_directions(model, {3: torch.randn(1, 32)})
    with pytest.raises(ValueError, match="length 8"):
        cut_directions(model, {1: torch.randn(1, 8)})
