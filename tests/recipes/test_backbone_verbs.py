"""The front doors on saved checkpoints of the backbones that transformers lacks."""

import json
import re

import pytest
import torch
from tiny_backbones import BACKBONES, CLASSES, tiny_backbone, tiny_backbone_processor
from tiny_models import tiny_image

from firsthand.modeling import Explanation, SteeringVector
from firsthand.modeling.families import decoder_layers
from firsthand.recipes.cli import main
from firsthand.recipes.inputs import load_model
from firsthand.recipes.trainers.vision_modeling import language_linear

MAPS = {"conv_llava": ((2, 2), None)} | dict.fromkeys(
    ["minigpt4", "mplug_owl", "mplug_owl2"], ((1, 5), (4, 4))
)


@pytest.fixture(scope="module", params=BACKBONES)
def saved(request, tmp_path_factory):
    """Name and folder of a checkpoint, an image and pairs beside it; its copied code is broken."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_backbone(request.param).save_pretrained(folder / "model")
    tiny_backbone_processor(request.param).save_pretrained(folder / "model")
    for code in (folder / "model").glob("*.py"):
        code.write_text("raise AssertionError('code of the checkpoint was run')")
    for index in range(3):
        tiny_image(index).save(folder / f"{index}.png")
    pair = {
        "positive": {"image": "0.png", "question": "What?", "answer": "a dog."},
        "negative": {"image": "1.png", "question": "What?", "answer": "a dog."},
    }
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return request.param, folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_installed_classes_load_it_without_its_code(saved, capsys):
    name, folder = saved
    model, processor = load_model(str(folder / "model"))
    assert type(model) is CLASSES[name] and not model.training
    assert type(processor) is type(tiny_backbone_processor(name))
    assert "custom code" not in capsys.readouterr().out  # transformers asked for no leave
    for key, tensor in tiny_backbone(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_lora_reaches_every_linear_layer_of_the_decoder(saved):
    peft = pytest.importorskip("peft")
    model = tiny_backbone(saved[0])
    linear = [m for layer in decoder_layers(model) for m in layer.modules()]
    count = sum(isinstance(m, torch.nn.Linear) for m in linear)
    assert count == 2 * (9 if saved[0] == "mplug_owl2" else 7)  # keys and values of both ways
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=language_linear(model)))
    adapted = [m for m in tuned.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == count and not {m.base_layer for m in adapted} - set(linear)


def test_explain_tokens(saved, capsys):
    name, folder = saved
    asked = ("--image", folder / "0.png", "--question", "What is it?", "--answer", "a dog, a cup.")
    out = folder / "explanation"
    assert run("explain", "tokens", "--model", folder / "model", *asked, "--out", out) == 0
    words = re.findall(r"^  (\w+) .*against blank [+-]\d", capsys.readouterr().out, re.M)
    assert words == ["a", "dog", "a", "cup"] and (out / "words.png").is_file()
    found, (grid, patches) = Explanation.load(out), MAPS[name]
    assert found.image.shape[1:] == grid and 0 < float(found.visual_contribution.min()) < 1
    assert (found.patches is None) if patches is None else found.patches.shape[1:] == patches


def test_steer_fit_and_apply(saved, capsys):
    _, folder = saved
    model = ("--model", folder / "model")
    pairs = ("--pairs", folder / "pairs.jsonl", "--out", folder / "vector")
    assert run("steer", "fit", *model, *pairs, "--batch-size", 1) == 0
    vector = SteeringVector.from_pretrained(folder / "vector")
    assert vector.pairs == 1 and float(vector.directions[1].norm()) > 0
    asked = ("--image", folder / "2.png", "--max-new-tokens", 4, "--strength", 40)
    capsys.readouterr()
    assert run("steer", "apply", *model, "--vector", folder / "vector", *asked) == 0
    said = re.fullmatch(
        r"plain:   (.*)\nsteered: (.*)  \(strength 40\)\n", capsys.readouterr().out, re.S
    )
    assert said and said[1] != said[2]
