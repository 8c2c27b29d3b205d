"""Backbones that transformers lacks through the Hub: a stranger loads, prepares and generates."""

import json

import pytest
import torch
from hub_fresh import run_fresh
from tiny_backbones import BACKBONES, CLASSES, tiny_backbone, tiny_backbone_processor
from tiny_models import tiny_image, tiny_prompt

SETTINGS = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
STRANGER = """
import json, torch, transformers
from PIL import Image
found = {}
for name in NAMES:
    repo = f"org/tiny-{name}"
    processor = transformers.AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}],
        add_generation_prompt=True,
    )
    image = Image.open(IMAGE)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    for auto in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, auto).from_pretrained(repo, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(**inputs).logits
        answer = model.generate(**inputs, **SETTINGS)
        found[f"{name} {auto}"] = (type(processor).__name__, type(model).__name__, logits, answer)
    model.save_pretrained(f"{OUT}-{name}")
torch.save(found, OUT)
"""


@pytest.fixture(scope="module")
def expected(hub):
    """{name: (processor's class, model's class, logits, answer)} of what was pushed."""
    made = {}
    for name in BACKBONES:
        model, processor = tiny_backbone(name), tiny_backbone_processor(name)
        prompt = tiny_prompt(processor, "Why?")
        inputs = processor(images=[tiny_image()], text=[prompt], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        answer = model.generate(**inputs, **SETTINGS)
        made[name] = (type(processor).__name__, CLASSES[name].__name__, logits, answer)
        model.push_to_hub(f"org/tiny-{name}")
        processor.push_to_hub(f"org/tiny-{name}")
    return made


def test_a_stranger_gets_the_same_model_processor_and_answers(expected, tmp_path):
    image, out = tmp_path / "image.png", tmp_path / "found.pt"
    tiny_image().save(image)
    known = dict(NAMES=BACKBONES, SETTINGS=SETTINGS, IMAGE=str(image), OUT=str(out))
    run_fresh("".join(f"{name} = {value!r}\n" for name, value in known.items()) + STRANGER)
    found = torch.load(out)
    assert len(found) == 3 * len(BACKBONES)
    for key, (processor, model, logits, answer) in found.items():
        wanted = expected[key.split()[0]]
        assert (processor, model) == wanted[:2]
        assert torch.equal(logits, wanted[2]) and torch.equal(answer, wanted[3])
    for name in BACKBONES:  # what is saved again brings its code along again
        folder = tmp_path / f"found.pt-{name}"
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForMultimodalLM"}
        for place in auto_map.values():
            assert (folder / f"{place.split('--')[-1].split('.')[0]}.py").is_file()


def test_the_code_of_a_backbone_is_all_that_travels(expected, hub):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.token)
    code = {
        n: {f for f in api.list_repo_files(f"org/tiny-{n}") if f.endswith(".py")} for n in BACKBONES
    }
    shared = {"exporting.py", "llava_shaped.py"}
    assert code["conv_llava"] == shared | {"configuration_conv_llava.py", "modeling_conv_llava.py"}
    assert code["minigpt4"] == {
        "exporting.py",
        "configuration_minigpt4.py",
        "modeling_minigpt4.py",
        "processing_segments.py",
    }
    owl = shared | {
        "configuration_mplug_owl.py",
        "modeling_mplug_owl.py",
        "visual_abstractor.py",
        "processing_segments.py",
    }
    assert code["mplug_owl"] == owl
    assert code["mplug_owl2"] == owl | {"configuration_mplug_owl2.py", "modeling_mplug_owl2.py"}
