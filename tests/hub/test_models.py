"""Grounded models through the Hub: loaded by strangers, with and without remote code."""

import json

import pytest
import torch
from hub_fresh import run_fresh
from tiny_models import tiny_image, tiny_internvl, tiny_llava, tiny_processor

from firsthand.modeling import (
    GroundedInternVLForConditionalGeneration,
    GroundedLlavaForConditionalGeneration,
    SteeringVector,
)

FAMILIES = {
    "llava": (tiny_llava, GroundedLlavaForConditionalGeneration),
    "internvl": (tiny_internvl, GroundedInternVLForConditionalGeneration),
}
LOAD = """
import io, json, sys, torch, transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
inputs = load_file(hf_hub_download({repo!r}, "inputs.safetensors"))
def logits(model):
    with torch.no_grad():
        return model(**inputs).logits
"""


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module", params=FAMILIES)
def pushed(request, hub, tmp_path_factory):
    """(repo, steered logits, plain logits, vision head) of a pushed grounded model."""
    from huggingface_hub import HfApi
    from safetensors.torch import save_file

    family = request.param
    build, grounded = FAMILIES[family]
    torch.manual_seed(0)
    stock = build()
    processor = tiny_processor(family)
    model = grounded.from_stock(stock, vision_head="separate").eval()
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}],
        add_generation_prompt=True,
    )
    batch = processor(images=[tiny_image()], text=[prompt], return_tensors="pt")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    plain = logits_of(model, inputs)
    width = model.config.get_text_config().hidden_size
    model.set_steering(SteeringVector({1: torch.randn(width)}), strength=1.5)
    steered = logits_of(model, inputs)
    assert not torch.equal(plain, steered)
    repo = f"org/tiny-{family}"
    model.push_to_hub(repo)
    processor.push_to_hub(repo)
    file = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    api = HfApi(endpoint=hub.url, token=hub.token)
    save_file(inputs, file)
    api.upload_file(path_or_fileobj=file, path_in_repo="inputs.safetensors", repo_id=repo)
    return repo, steered, plain, model.vision_head.weight.detach().clone()


@pytest.mark.parametrize(
    "auto", ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
)
def test_remote_code_gives_the_same_model(pushed, auto, tmp_path):
    repo, steered, plain, vision_head = pushed
    code = (
        LOAD.format(repo=repo)
        + f"""
model = transformers.{auto}.from_pretrained({repo!r}, trust_remote_code=True).eval()
found = [logits(model), model.vision_head.weight, model.steering_strength.clone()]
model.set_steering(strength=0.0)
found.append(logits(model))
torch.save(found, {str(tmp_path / "o")!r})
print(type(model).__name__)
"""
    )
    assert run_fresh(code).splitlines()[-1].startswith("Grounded")
    got, head, strength, off = torch.load(tmp_path / "o")
    assert torch.equal(got, steered)
    assert torch.equal(off, plain)
    assert torch.equal(head, vision_head)
    assert float(strength) == 1.5


def test_the_stock_class_reads_the_same_repo_without_remote_code(pushed, tmp_path):
    repo, _, plain, _ = pushed
    code = (
        LOAD.format(repo=repo)
        + f"""
model = transformers.AutoModelForImageTextToText.from_pretrained({repo!r}, trust_remote_code=False)
torch.save(logits(model.eval()), {str(tmp_path / "o")!r})
print(json.dumps([type(model).__module__.split(".")[0], type(model).__name__]))
"""
    )
    module, name = json.loads(run_fresh(code).splitlines()[-1])
    assert module == "transformers" and not name.startswith("Grounded")
    assert torch.equal(torch.load(tmp_path / "o"), plain)


def test_the_processor_is_stock(pushed):
    code = (
        LOAD.format(repo=pushed[0])
        + f"""
processor = transformers.AutoProcessor.from_pretrained({pushed[0]!r})
print(type(processor).__name__)
"""
    )
    assert run_fresh(code).splitlines()[-1] == "LlavaProcessor"
