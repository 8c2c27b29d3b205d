"""Grounded classes: the stock model with a head and steering, and nothing else changed."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_image, tiny_inputs, tiny_internvl, tiny_llava, tiny_processor
from transformers import AutoModelForImageTextToText, LlavaConfig

from firsthand.modeling.modeling_grounded_internvl import GroundedInternVLForConditionalGeneration
from firsthand.modeling.modeling_grounded_llava import GroundedLlavaForConditionalGeneration
from firsthand.modeling.steering import SteeringVector, attach_steering

BUILDERS = {
    "llava": (tiny_llava, GroundedLlavaForConditionalGeneration),
    "internvl": (tiny_internvl, GroundedInternVLForConditionalGeneration),
}
EXTRA = {"vision_head.weight", "steering_direction", "steering_strength"}


@pytest.fixture(params=sorted(BUILDERS))
def family(request):
    return request.param


@pytest.fixture
def inputs(family):
    return tiny_inputs(tiny_processor(family), ["What?", "Is there a dog in the image?"])


def _vector(layers=(0, 1), **kwargs) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({i: torch.randn(32, generator=generator) for i in layers}, **kwargs)


def _grounded(family, **config):
    build, cls = BUILDERS[family]
    return build(cls, **config)


@torch.no_grad()
def _logits(model, inputs):
    return model(**inputs).logits


def _keys(folder) -> set[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return set(file.keys())


# loading


def test_without_extras_it_is_the_stock_model(family, inputs):
    stock, grounded = BUILDERS[family][0](), _grounded(family)
    assert set(stock.state_dict()) == set(grounded.state_dict())
    assert torch.equal(_logits(stock, inputs), _logits(grounded, inputs))
    assert grounded.config.model_type == stock.config.model_type == family


def test_extras_leave_the_stock_keys(family):
    stock = BUILDERS[family][0]()
    grounded = _grounded(family, vision_head="separate", steering_layers=[1])
    assert set(grounded.state_dict()) - set(stock.state_dict()) == EXTRA


def test_loads_a_stock_checkpoint_without_loss(family, inputs, tmp_path):
    build, cls = BUILDERS[family]
    stock = build()
    stock.save_pretrained(tmp_path)
    model, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_logits(model, inputs), _logits(stock, inputs))


def test_extras_missing_from_a_stock_checkpoint_are_initialised(family, inputs, tmp_path):
    """The head starts as a copy of the language head, steering as none: no leftover memory."""
    build, cls = BUILDERS[family]
    stock = build()
    stock.save_pretrained(tmp_path)
    model, report = cls.from_pretrained(
        tmp_path, vision_head="separate", steering_layers=[0, 1], output_loading_info=True
    )
    assert report["missing_keys"] == EXTRA and not report["unexpected_keys"]
    assert torch.equal(model.vision_head.weight, model.lm_head.weight)
    assert model.vision_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert torch.equal(model.steering_direction, torch.zeros(2, 32))
    assert model.steering_strength.item() == 0
    assert torch.equal(_logits(model, inputs), _logits(stock, inputs))


def test_a_new_head_starts_as_the_language_head(family):
    model = _grounded(family, vision_head="separate")
    assert torch.equal(model.vision_head.weight, model.lm_head.weight)


LEGACY = [
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
]


def test_checkpoints_with_older_llava_names_load_without_loss(tmp_path):
    stock, inputs = tiny_llava(), tiny_inputs(tiny_processor("llava"))
    stock.save_pretrained(tmp_path)
    tensors = {}
    for key, tensor in stock.state_dict().items():
        old, new = next(pair for pair in LEGACY if key.startswith(pair[0]))
        tensors[new + key.removeprefix(old)] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "language_model.lm_head.weight" in _keys(tmp_path)
    model, report = GroundedLlavaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    assert torch.equal(_logits(model, inputs), _logits(stock, inputs))


def test_a_saved_checkpoint_has_the_stock_layout(family, tmp_path):
    build, _ = BUILDERS[family]
    build().save_pretrained(tmp_path / "stock")
    _grounded(family, vision_head="separate").save_pretrained(tmp_path / "grounded")
    assert _keys(tmp_path / "grounded") - _keys(tmp_path / "stock") == {"vision_head.weight"}
    assert not _keys(tmp_path / "stock") - _keys(tmp_path / "grounded")


def test_round_trip_is_exact(family, inputs, tmp_path):
    model = _grounded(family, vision_head="separate")
    model.vision_head.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    model.set_steering(_vector(mode="norm"), strength=0.7)
    logits, vision = _logits(model, inputs), model.vision_logits(**inputs)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_logits(again, inputs), logits)
    assert torch.equal(again.vision_logits(**inputs), vision)
    assert (again.config.steering_layers, again.config.steering_mode) == ([0, 1], "norm")


def test_the_stock_class_loads_the_repo_and_ignores_the_extras(family, inputs, tmp_path):
    stock = BUILDERS[family][0]()
    model = _grounded(family, vision_head="separate")
    model.set_steering(_vector())
    model.save_pretrained(tmp_path)
    loaded, report = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and report["unexpected_keys"] == EXTRA
    assert torch.equal(_logits(loaded, inputs), _logits(stock, inputs))
    automatic = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(automatic) is type(stock)


@pytest.mark.parametrize("changes", [{}, {"vision_head": "separate", "steering_layers": [1]}])
def test_from_stock_shares_the_weights(family, inputs, changes):
    build, cls = BUILDERS[family]
    stock = build()
    model = cls.from_stock(stock, **changes)
    assert torch.equal(_logits(model, inputs), _logits(stock, inputs))
    assert model.lm_head.weight is stock.lm_head.weight and not model.training
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    if changes:
        assert torch.equal(model.vision_head.weight, model.lm_head.weight)
        model.set_steering(_vector(), strength=1.0)
        assert not torch.equal(_logits(model, inputs), _logits(_grounded(family), inputs))


def test_the_attention_implementation_is_kept(family):
    build, cls = BUILDERS[family]
    stock = build()
    stock.set_attn_implementation("eager")
    model = cls.from_stock(stock)
    assert model.config._attn_implementation == "eager"
    assert model.config is model.model.config
    assert model.config.text_config is model.model.language_model.config
    assert cls(stock.config).config._attn_implementation == "eager"


def test_a_tied_model_stays_tied(tmp_path):
    model = _grounded("internvl", vision_head="separate")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in _keys(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert again.vision_head.weight is not again.lm_head.weight


def test_config_fields_are_checked():
    with pytest.raises(Exception, match="vision_head"):
        _grounded("llava", vision_head="third")
    with pytest.raises(ValueError, match=r"layers 0 to 1, not \[9\]"):
        _grounded("llava", steering_layers=[9])
    config = LlavaConfig.from_dict(tiny_llava().config.to_dict())
    model = GroundedLlavaForConditionalGeneration(config)
    assert model.config.vision_head == "shared" and type(config) is LlavaConfig


# steering inside


def test_steering_inside_equals_attached_steering(family, inputs):
    model, stock = _grounded(family), BUILDERS[family][0]()
    model.set_steering(_vector(), strength=0.5)
    with attach_steering(stock, _vector(), strength=0.5):
        assert torch.equal(_logits(model, inputs), _logits(stock, inputs))
        settings = {"max_new_tokens": 5, "do_sample": False}
        expected = stock.generate(**inputs, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    with torch.no_grad():
        fused = model.lm_head(model.model(**inputs).last_hidden_state)
    assert torch.equal(fused, _logits(model, inputs))
    assert not torch.equal(fused, _logits(stock, inputs))


@torch.no_grad()
def test_trl_trains_the_steered_model(tmp_path):
    """Its trainers replace `forward`; the loss must still be that of the steered model."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = _grounded("llava", steering_layers=[0, 1])
    row = {
        "images": [tiny_image()],
        "prompt": [{"role": "user", "content": "What?"}],
        "completion": [{"role": "assistant", "content": "a dog top left."}],
    }
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), max_length=None, report_to="none", use_cpu=True),
        train_dataset=datasets.Dataset.from_list([row, row]),
        processing_class=tiny_processor("llava"),
    )
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    plain = trainer.compute_loss(trainer.model, batch)
    model.set_steering(_vector(), strength=1.0)
    assert abs(trainer.compute_loss(trainer.model, batch) - plain) > 1e-3
    model.set_steering(strength=0)
    assert torch.equal(trainer.compute_loss(trainer.model, batch), plain)


def test_strength_zero_inside_is_bit_identical(family, inputs):
    model, plain = _grounded(family), _grounded(family)
    model.set_steering(_vector(mode="norm"), strength=0)
    assert torch.equal(_logits(model, inputs), _logits(plain, inputs))
    model.set_steering(strength=2)
    assert not torch.equal(_logits(model, inputs), _logits(plain, inputs))
    model.set_steering(strength=0)
    assert torch.equal(_logits(model, inputs), _logits(plain, inputs))


def test_a_new_vector_replaces_the_old_one(family, inputs):
    model, other = _grounded(family), _grounded(family)
    model.set_steering(_vector(layers=[0, 1]))
    model.set_steering(_vector(layers=[1]), strength=0.5)
    other.set_steering(_vector(layers=[1]), strength=0.5)
    assert torch.equal(_logits(model, inputs), _logits(other, inputs))
    assert model.steering_direction.shape == (1, 32)


def test_a_copy_has_steering_of_its_own(family, inputs):
    model = _grounded(family)
    model.set_steering(_vector())
    steered = _logits(model, inputs)
    twin = copy.deepcopy(model)
    model.set_steering(strength=0)
    assert torch.equal(_logits(twin, inputs), steered)
    assert not torch.equal(_logits(model, inputs), steered)


def test_steering_and_head_survive_peft(family, inputs):
    peft = pytest.importorskip("peft")
    model = _grounded(family, vision_head="separate")
    model.set_steering(_vector())
    steered = _logits(model, inputs)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["vision_head"])
    wrapped = peft.get_peft_model(model, config).eval()
    assert torch.equal(_logits(wrapped, inputs), steered)
    wrapped.set_steering(strength=0)
    assert torch.equal(_logits(wrapped, inputs), _logits(_grounded(family), inputs))
    assert wrapped.vision_logits(**inputs).shape[0] == 2
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("vision_head" in name for name in names)


def test_what_cannot_be_set_is_refused():
    model = _grounded("llava")
    with pytest.raises(ValueError, match="Nothing to set"):
        model.set_steering(strength=1.0)
    with pytest.raises(ValueError, match=r"layers 0 to 1, not \[4\]"):
        model.set_steering(_vector(layers=[4]))
    with pytest.raises(ValueError, match="finite"):
        model.set_steering(_vector(), strength=float("nan"))
    assert not model.config.steering_layers and "steering_strength" not in model.state_dict()


def test_forward_refuses_vision_labels_that_it_would_ignore(family, inputs):
    with pytest.raises(ValueError, match="combined_loss"):
        _grounded(family)(**inputs, vision_labels=inputs["input_ids"])


# exported code


LOAD = """
import json, sys
sys.modules["firsthand"] = None  # not importable here
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
result = {}
for folder in sys.argv[1:]:
    inputs = load_file(f"{folder}/../inputs.safetensors")
    expected = load_file(f"{folder}/../expected.safetensors")
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            same = torch.equal(model(**inputs).logits, expected["logits"])
            same &= torch.equal(model.vision_logits(**inputs), expected["vision"])
        key = f"{model.config.model_type} {auto.__name__}"
        result[key] = [type(model).__name__, type(model.config).__name__, same]
    model.save_pretrained(f"{folder}/../again")
print(json.dumps(result))
"""


def test_exported_checkpoints_load_in_a_fresh_process_without_firsthand(tmp_path):
    folders = []
    for family in sorted(BUILDERS):
        inputs = dict(tiny_inputs(tiny_processor(family)))
        model = _grounded(family, vision_head="separate")
        model.set_steering(_vector(), strength=0.5)
        folder = tmp_path / family / "repo"
        model.save_pretrained(folder)
        folders.append(str(folder))
        expected = {"logits": _logits(model, inputs), "vision": model.vision_logits(**inputs)}
        save_file({k: v.detach() for k, v in expected.items()}, folder / "../expected.safetensors")
        save_file(inputs, folder / "../inputs.safetensors")
    result = _run(LOAD, folders, tmp_path)
    names = {"llava": "Llava", "internvl": "InternVL"}
    for family, name in names.items():
        for auto in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            expected = [f"Grounded{name}ForConditionalGeneration", f"Grounded{name}Config", True]
            assert result[f"{family} {auto}"] == expected
        saved = [{p.name for p in (tmp_path / family / f).iterdir()} for f in ("repo", "again")]
        assert saved[0] == saved[1]
        same = [load_file(tmp_path / family / f / "model.safetensors") for f in ("repo", "again")]
        assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])


def _run(script: str, arguments: list[str], folder: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "HF_HOME"}}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
