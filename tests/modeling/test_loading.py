"""Models as users load them: offloaded, on two devices, in half precision, quantised."""

import importlib.util
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import PARTIAL, TINY, tiny_image, tiny_inputs, tiny_llava, tiny_processor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from firsthand.modeling.contrastive import CONTRASTS
from firsthand.modeling.head_attention import head_attention
from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.modeling.steering_fit import fit_steering
from firsthand.modeling.steering_weights import cut_directions, fold_steering
from firsthand.processing.contrast_inputs import both_branches

QUESTION, ANSWER = "What is in the image?", "a dog top left, a cup."
MODELS = TINY | PARTIAL
QUANTISED = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
}


def fully(model, processor):
    """What the package says about one image with this model: tensors by name."""
    image = tiny_image(3)
    found = explain(model, processor, image, QUESTION, ANSWER, layers=True, baseline="blank")
    names = ("image", "patches", "answer_layers", "lens_normed_probability", "log_likelihood_ratio")
    own = explain(model, processor, image, QUESTION, max_new_tokens=4, tokens=[0])
    tensors = {name: getattr(found, name) for name in names}
    return {**tensors, "said": torch.tensor(own.token_ids)}


def reloaded(model, folder, **options):
    model.save_pretrained(folder / "model")
    return AutoModelForImageTextToText.from_pretrained(folder / "model", **options)


def spilled(model, folder):
    """As device_map="auto" lays it out where the memory holds its vision encoder only."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    return reloaded(
        model, folder, device_map="auto", max_memory={"cpu": int(size * 0.7)},
        offload_folder=folder / "weights",
    )  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_a_model_that_spills_to_disk_says_the_same(family, tmp_path):
    model, processor = MODELS[family](), tiny_processor(family)
    expected, away = fully(model, processor), spilled(model, tmp_path)
    assert any(parameter.is_meta for parameter in away.parameters())
    found = fully(away, processor)
    for name, tensor in expected.items():
        if tensor is None:  # a family without a map over patches
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-5)


def test_weights_of_offloaded_layers_do_not_pile_up(tmp_path, monkeypatch):
    """Neither in the graph nor after it; here those of the last linear layers of the MLPs."""
    places = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector"), "cpu")
    places |= dict.fromkeys(("model.language_model", "lm_head"), "disk")
    model = reloaded(
        tiny_llava(layers=6), tmp_path, device_map=places, offload_folder=tmp_path / "weights"
    )
    seen, most, linear = [], 0, F.linear

    def alive():
        return len({id(weight) for one in seen if (weight := one()) is not None})

    def watched(states, weight, bias=None):
        nonlocal most
        if weight.shape == (32, 48):
            seen.append(weakref.ref(weight))
            most = max(most, alive())
        return linear(states, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    explain(model, tiny_processor("llava"), tiny_image(3), QUESTION, ANSWER, tokens=[0, 1])
    assert len(seen) == 6 * 3 and 1 <= most <= 2 and alive() == 0


def used(model, processor):
    """What steering, contrastive decoding and head statistics make of a model."""
    image, inputs = tiny_image(3), tiny_inputs(processor)
    row = {"image": image, "question": QUESTION}
    pair = {"positive": {**row, "answer": "a dog"}, "negative": {**row, "answer": "a red cup"}}
    vector = fit_steering(model, processor, [pair], progress=False)
    found = {f"direction {layer}": one for layer, one in vector.directions.items()}
    for gate in (None, 0.5):
        with attach_steering(model, SteeringVector(vector.directions, strength=3.0, gate=gate)):
            found[f"steered {gate}"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            explained = explain(model, processor, image, QUESTION, ANSWER, [1])
            found[f"explained {gate}"] = explained.patches
    both = both_branches(processor, [{"id": "0", "image_id": "0", **row}], method="vcd")
    found["contrast"] = model.generate(**both, custom_generate=CONTRASTS["vcd"], max_new_tokens=4)
    found["heads"] = head_attention(model, inputs, [inputs["input_ids"].shape[1] - 1])
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_model_that_spills_to_disk_is_used_the_same(family, tmp_path):
    model, processor = TINY[family](), tiny_processor(family)
    expected, found = used(model, processor), used(spilled(model, tmp_path), processor)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_offloaded_weights_are_not_edited(tmp_path):
    model, vector = spilled(tiny_llava(), tmp_path), SteeringVector({0: torch.ones(32)})
    with pytest.raises(ValueError, match="offloaded.*attach_steering"):
        fold_steering(model, vector)
    with pytest.raises(ValueError, match="offloaded"):
        cut_directions(model, {0: F.normalize(torch.ones(1, 32))})


def test_layers_on_a_second_device_say_the_same():
    """In a process of its own: the made-up device is registered for good."""
    script = Path(__file__).parents[1] / "second_device.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    for line in lines:
        assert line["devices"] == ["cpu", "far"]
        assert max(line["apart"].values()) < 1e-5, line


def least_cosine(found, expected):
    return float(torch.cosine_similarity(found.flatten(1), expected.flatten(1)).min())


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.98), ("float16", 0.999)])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "gemma3", "blip-2"])
def test_half_precision_gives_nearly_the_same(family, dtype, least, tmp_path):
    model, processor, image = MODELS[family](), tiny_processor(family), tiny_image(3)
    whole = explain(model, processor, image, QUESTION, ANSWER)
    half = explain(
        reloaded(model, tmp_path, dtype=getattr(torch, dtype)), processor, image, QUESTION, ANSWER
    )
    assert half.image.dtype == torch.float32
    assert least_cosine(half.image, whole.image) > least
    assert float((half.visual_contribution - whole.visual_contribution).abs().max()) < 0.02


@torch.no_grad()
def plain(quantised, model):
    """`model` with the weights that the quantised one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in quantised.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kind == "Linear8bitLt":
            weight = module.weight.data * module.weight.SCB[:, None] / 127
        else:
            continue
        model.get_submodule(name).weight.copy_(weight)
    return model


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_quantised_model_says_what_its_weights_say(family, bits, tmp_path):
    config = BitsAndBytesConfig(**QUANTISED[bits])
    model, processor = TINY[family](), tiny_processor(family)
    quantised = reloaded(model, tmp_path, quantization_config=config, device_map="cpu")
    expected, image = plain(quantised, model), tiny_image(3)
    vector = SteeringVector({0: torch.linspace(-1, 1, 32)})
    for strength in (0.0, 2.0):
        rows = []
        for one in (quantised, expected):
            with attach_steering(one, vector, strength):
                rows.append(explain(one, processor, image, QUESTION, ANSWER))
        assert least_cosine(rows[0].image, rows[1].image) > 0.99
        assert least_cosine(rows[0].patches, rows[1].patches) > 0.99
        torch.testing.assert_close(rows[0].probability, rows[1].probability, atol=1e-3, rtol=1e-2)
    with pytest.raises(ValueError, match="quantised layers"):
        cut_directions(quantised, {0: F.normalize(torch.ones(1, 32))})


def test_layers_without_gradients_are_refused():
    """As 4-bit weights are on a CPU once bitsandbytes has packed them: the map would be 0."""
    model = tiny_llava()
    layer = model.model.language_model.layers[1]
    layer.register_forward_pre_hook(lambda layer, args: (args[0].detach(), *args[1:]))
    with pytest.raises(ValueError, match=r"layers \[1\].*load the model anew"):
        explain(model, tiny_processor("llava"), tiny_image(3), QUESTION, ANSWER)
