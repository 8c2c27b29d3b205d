"""Steering on native models: identities first, then that it acts wherever the model computes."""

import copy
import math

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny_inputs, tiny_internvl, tiny_llava, tiny_processor
from torch import nn

from firsthand.modeling.families import steered_modules
from firsthand.modeling.steering import MODES, SteeringVector, attach_steering

BUILDERS = {"llava": tiny_llava, "internvl": tiny_internvl}
QUESTIONS = ["What?", "Is there a dog in the image?"]


def _vector(seed: int = 0, layers=(0, 1), size: int = 32, **kwargs) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(size, generator=generator) for layer in layers}
    return SteeringVector(directions, **kwargs)


@pytest.fixture(params=sorted(BUILDERS))
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return BUILDERS[family]()


@pytest.fixture
def inputs(family):
    return tiny_inputs(tiny_processor(family), QUESTIONS)


@torch.no_grad()
def _logits(model, inputs):
    return model(**inputs).logits


def _generate(model, inputs, **kwargs):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | kwargs
    return model.generate(**inputs, **settings)


# identities


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_is_bit_identical(model, inputs, mode):
    logits, answer = _logits(model, inputs), _generate(model, inputs)
    with attach_steering(model, _vector(mode=mode), strength=0):
        assert torch.equal(_logits(model, inputs), logits)
        assert torch.equal(_generate(model, inputs), answer)


def test_strength_zero_is_bit_identical_in_bfloat16(model, inputs):
    model.to(torch.bfloat16)
    inputs = inputs.to(torch.bfloat16)
    logits = _logits(model, inputs)
    with attach_steering(model, _vector(mode="norm"), strength=0) as steering:
        assert torch.equal(_logits(model, inputs), logits)
        steering.strength = 1
        assert not torch.equal(_logits(model, inputs), logits)


def test_detach_restores_the_model(model, inputs):
    logits, keys = _logits(model, inputs), set(model.state_dict())
    steering = attach_steering(model, _vector())
    assert set(model.state_dict()) == keys
    assert not torch.equal(_logits(model, inputs), logits)
    steering.detach()
    steering.detach()
    assert torch.equal(_logits(model, inputs), logits)
    assert not any(module._forward_hooks for module in steered_modules(model))


def test_the_context_manager_detaches_after_an_error(model, inputs):
    logits = _logits(model, inputs)
    with pytest.raises(RuntimeError, match="boom"), attach_steering(model, _vector()):
        raise RuntimeError("boom")
    assert torch.equal(_logits(model, inputs), logits)


def test_vector_arithmetic():
    a, b = _vector(0), _vector(1)
    for layer in a.layers:
        assert torch.equal((a - a).directions[layer], torch.zeros(32))
        assert torch.equal((a + b).directions[layer], a.directions[layer] + b.directions[layer])
        assert torch.equal((2 * a).directions[layer], (a + a).directions[layer])
        assert torch.equal((-a).directions[layer], (a * -1).directions[layer])


def test_zero_vector_and_opposite_vectors_cancel(model, inputs):
    vector = _vector()
    logits = _logits(model, inputs)
    with attach_steering(model, vector - vector):
        assert torch.equal(_logits(model, inputs), logits)
    with attach_steering(model, vector), attach_steering(model, vector, strength=-1):
        torch.testing.assert_close(_logits(model, inputs), logits, atol=1e-3, rtol=0)


# what it computes


class _Reference(nn.Module):
    """The steered module written out, as a wrapper instead of a hook."""

    def __init__(self, module, shift, keep_norm):
        super().__init__()
        self.module, self.shift, self.keep_norm = module, shift, keep_norm

    def forward(self, hidden):
        output = self.module(hidden)
        moved = output + self.shift
        if self.keep_norm:
            moved = moved / moved.norm(dim=-1, keepdim=True) * output.norm(dim=-1, keepdim=True)
        return moved


@pytest.mark.parametrize("mode", ["add", "norm"])
def test_equals_the_formula_written_out(model, inputs, mode):
    vector = _vector(mode=mode)
    with attach_steering(model, vector, strength=0.7):
        steered = _logits(model, inputs)
    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp = _Reference(layer.mlp, 0.7 * vector.directions[index], mode == "norm")
    torch.testing.assert_close(_logits(model, inputs), steered, atol=1e-4, rtol=1e-4)


def test_only_the_chosen_layers_are_steered(model, inputs):
    vector = _vector()
    with attach_steering(model, vector, layers=[1]):
        one = _logits(model, inputs)
    with attach_steering(model, SteeringVector({1: vector.directions[1]})):
        assert torch.equal(_logits(model, inputs), one)
    with attach_steering(model, vector):
        assert not torch.equal(_logits(model, inputs), one)


def test_tuple_outputs_are_steered():
    model, vector = tiny_llava(), _vector(layers=[0])
    module = steered_modules(model)[0]
    hidden = torch.randn(2, 3, 32)
    plain = module(hidden)
    module.register_forward_hook(lambda m, a, out: (out, "kept"))
    with attach_steering(model, vector, strength=2.0):
        steered, rest = module(hidden)
    assert rest == "kept"
    torch.testing.assert_close(steered, plain + 2.0 * vector.directions[0])


def test_flat_outputs_are_steered():
    model, vector = tiny_llava(), _vector(layers=[0])
    module, hidden = steered_modules(model)[0], torch.randn(5, 32)
    plain = module(hidden)
    with attach_steering(model, vector):
        torch.testing.assert_close(module(hidden), plain + vector.directions[0])


# where it acts


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generate_is_steered_with_every_cache(model, inputs, settings):
    plain = _generate(model, inputs, **settings)
    with attach_steering(model, _vector()) as steering:
        steered = _generate(model, inputs, **settings)
        assert not torch.equal(steered, plain)
        assert torch.equal(_generate(model, inputs, use_cache=False, **settings), steered)
        if not settings:
            static = _generate(model, inputs, cache_implementation="static")
            assert torch.equal(static, steered)
        steering.strength = 0
        assert torch.equal(_generate(model, inputs, **settings), plain)


def test_a_batch_is_steered_like_its_rows(family, model):
    processor = tiny_processor(family)
    with attach_steering(model, _vector()):
        together = _generate(model, tiny_inputs(processor, QUESTIONS))
        alone = _generate(model, tiny_inputs(processor, QUESTIONS[:1]))
    assert torch.equal(together[0, -6:], alone[0, -6:])


def test_acts_through_peft(model, inputs):
    peft = pytest.importorskip("peft")
    vector = _vector()
    with attach_steering(model, vector):
        steered = _logits(model, inputs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    wrapped.eval()
    with attach_steering(wrapped, vector):
        assert torch.equal(_logits(wrapped, inputs), steered)


def test_acts_where_trainers_skip_forward(model, inputs):
    """TRL's trainers call the backbone and the head themselves."""
    vector = _vector()
    with attach_steering(model, vector), torch.no_grad():
        steered = _logits(model, inputs)
        fused = model.lm_head(model.model(**inputs).last_hidden_state)
    assert torch.equal(fused, steered)
    assert not torch.equal(fused, _logits(model, inputs))


def test_acts_in_a_compiled_model_and_its_strength_can_change():
    model, vector, hidden = tiny_llava(), _vector(layers=[0]), torch.randn(4, 32)
    module = steered_modules(model)[0]
    with torch.no_grad():
        plain = module(hidden)
        with attach_steering(model, vector, strength=0.25) as steering:
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            compiled(hidden)
            with torch.compiler.set_stance("fail_on_recompile"):
                for strength in (0.0, 1.0, -0.5):
                    steering.strength = strength
                    expected = plain + strength * vector.directions[0]
                    torch.testing.assert_close(compiled(hidden), expected)


def test_a_copied_model_keeps_its_own_steering(model, inputs):
    with attach_steering(model, _vector()) as steering:
        steered = _logits(model, inputs)
        twin = copy.deepcopy(model)
        steering.strength = 0
    assert torch.equal(_logits(twin, inputs), steered)


# files


def test_save_and_load_are_exact(tmp_path):
    vector = _vector(
        method="svd", base_model="org/model", strength=-0.3, mode="norm", pairs=7, seed=3, gate=0.2,
        vision={1: torch.randn(17, 24)},
    )  # fmt: skip
    vector.save_pretrained(tmp_path)
    loaded = SteeringVector.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "steering.safetensors",
        "steering_config.json",
    }
    assert loaded.layers == vector.layers
    assert all(torch.equal(loaded.directions[i], vector.directions[i]) for i in vector.layers)
    assert list(loaded.vision) == [1] and torch.equal(loaded.vision[1], vector.vision[1])
    plain = [{**vars(v), "directions": None, "vision": None} for v in (loaded, vector)]
    assert plain[0] == plain[1]


def test_the_card_is_complete(tmp_path):
    _vector(base_model="org/model", pairs=7).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/model" and card.data.library_name == "firsthand"
    assert "7 contrast pairs" in card.text and str(tmp_path) in card.text


def test_a_local_base_model_is_not_claimed_on_the_hub(tmp_path):
    _vector(base_model=str(tmp_path)).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_push_to_hub_and_back(hub):
    vector = _vector(base_model="org/model")
    vector.push_to_hub("tests/direction")
    loaded = SteeringVector.from_pretrained("tests/direction")
    assert all(torch.equal(loaded.directions[i], vector.directions[i]) for i in vector.layers)
    assert 'from_pretrained("tests/direction")' in ModelCard.load("tests/direction").text


# refusals


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_must_be_finite(strength):
    model = tiny_llava()
    with pytest.raises(ValueError, match="finite"):
        attach_steering(model, _vector(), strength=strength)
    with attach_steering(model, _vector()) as steering, pytest.raises(ValueError, match="finite"):
        steering.strength = strength


def test_what_does_not_fit_is_refused_before_any_hook():
    model = tiny_llava()
    for vector, layers, message in [
        (_vector(size=16), None, "length 16, the model's hidden size is 32"),
        (_vector(layers=[0, 5]), None, r"layers 0 to 1, not \[5\]"),
        (_vector(layers=[0]), [1], r"vector has layers \[0\], not \[1\]"),
        (_vector(), [], "layers is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach_steering(model, vector, layers=layers)
    assert not any(module._forward_hooks for module in steered_modules(model))


def test_malformed_vectors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one layer"):
        SteeringVector({})
    with pytest.raises(ValueError, match="finite vector"):
        SteeringVector({0: torch.tensor([math.nan])})
    with pytest.raises(ValueError, match="different lengths"):
        SteeringVector({0: torch.ones(2), 1: torch.ones(3)})
    with pytest.raises(ValueError, match="mode is 'rotate'"):
        SteeringVector({0: torch.ones(2)}, mode="rotate")
    with pytest.raises(ValueError, match="Cannot add"):
        _vector(layers=[0]) + _vector(layers=[1])
    for other in ({"mode": "turn"}, {"strength": 0.5}, {"gate": 0.3}):  # one of them would be lost
        with pytest.raises(ValueError, match="alike"):
            _vector() - _vector(**other)
        with pytest.raises(ValueError, match="alike"):
            _vector(layers=[0]) | _vector(layers=[1], **other)
    with pytest.raises(FileNotFoundError, match="holds no steering_config.json"):
        SteeringVector.from_pretrained(tmp_path)
