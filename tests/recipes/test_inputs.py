"""Loading a model for a command: over accelerators where there are any, never so for trainers.

What is drawn, read and skipped is tested with the commands themselves.
"""

import pytest
import torch
from tiny_models import TINY, tiny_image, tiny_processor
from transformers import AutoModelForImageTextToText

from firsthand.processing.generation import generate_answers
from firsthand.recipes.inputs import load_model


@pytest.fixture
def checkpoint(tmp_path):
    processor = tiny_processor("llava")
    TINY["llava"]().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def layouts(monkeypatch):
    """The `device_map` of each load, on a machine that believes in an accelerator."""
    found, load = [], AutoModelForImageTextToText.from_pretrained

    def recorded(name, device_map=None, **settings):
        found.append(device_map)
        return load(name, device_map=device_map, **settings)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", recorded)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    return found


def test_a_model_is_laid_out_over_accelerators(checkpoint, layouts):
    """The layout is accelerate's own; here it finds the CPU alone."""
    model, processor = load_model(checkpoint)
    row = {"id": "1", "image_id": "a", "image": tiny_image(), "question": "What is it?"}
    (said,) = generate_answers(model, processor, [row], max_new_tokens=2, progress=False)
    assert "prediction" in said and layouts == ["auto"]


def test_trainers_and_machines_without_get_it_on_the_cpu(checkpoint, layouts, monkeypatch):
    load_model(checkpoint, place=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    load_model(checkpoint)
    assert layouts == [None, None]
