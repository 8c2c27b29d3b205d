"""A folded checkpoint behind `transformers serve`, asked by the `openai` client on loopback."""

import base64
import io

import pytest
import torch
from tiny_models import tiny_image, tiny_llava, tiny_processor

from firsthand.modeling import SteeringVector, attach_steering
from firsthand.processing.generation import generate_answers
from firsthand.recipes import cli

openai = pytest.importorskip("openai")
QUESTION, NEW = "What is in the image?", 8


def test_a_stock_server_answers_as_the_hooks_do(tmp_path, serve):
    model, processor = tiny_llava(), tiny_processor()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    directions = {i: torch.linspace(-1, 1, 32).roll(i) for i in (0, 1)}
    vector = SteeringVector(directions, strength=2.0)
    vector.save_pretrained(tmp_path / "vector")
    row = {"id": "0", "image_id": "0", "image": tiny_image(1), "question": QUESTION}

    def said():
        return next(iter(generate_answers(model, processor, [row], NEW, progress=False)))

    plain = said()["prediction"]
    with attach_steering(model, vector):
        steered = said()["prediction"]
    assert steered != plain
    words = ["steer", "fold", "--model", "model", "--vector", "vector", "--out", "folded"]
    assert (
        cli.main([str(tmp_path / w) if w in ("model", "vector", "folded") else w for w in words])
        == 0
    )
    client = openai.OpenAI(base_url=serve(tmp_path / "folded"), api_key="none", timeout=120)
    file = io.BytesIO()
    tiny_image(1).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    reply = client.chat.completions.create(
        model=str(tmp_path / "folded"), messages=[{"role": "user", "content": content}],
        max_tokens=NEW, temperature=0,
    )  # fmt: skip
    assert reply.choices[0].message.content.strip() == steered
