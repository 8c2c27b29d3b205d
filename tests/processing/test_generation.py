"""Batched answers with shared image features: equal to asking one row at a time."""

import struct

import pytest
import torch
from PIL import Image
from tiny_models import PARTIAL, tiny_image, tiny_internvl, tiny_llava, tiny_processor

from firsthand.modeling.families import vision_layers
from firsthand.processing import generation
from firsthand.processing.generation import build_prompt, generate_answers

MODELS = {"llava": tiny_llava, "internvl": tiny_internvl}
QUESTIONS = ["Is there a dog?", "What is in the image?", "Describe the image.", "a"]
TOKENS = 8


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request):
    return MODELS[request.param](), tiny_processor(request.param)


def rows_of(images: int = 3) -> list[dict]:
    return [
        {"id": f"{i}/{j}", "image_id": i, "image": tiny_image(i), "question": question}
        for j, question in enumerate(QUESTIONS)
        for i in range(images)
    ]


def answers(pair, rows, batch_size=5) -> list[dict]:
    return list(generate_answers(*pair, rows, TOKENS, batch_size, progress=False))


def one_by_one(model, processor, row) -> str:
    inputs = processor(
        images=[row["image"]],
        text=[build_prompt(processor, row["question"])],
        return_tensors="pt",
    )
    said = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    new = said[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def encoded(model, ask) -> int:
    """Images that went through the vision tower while `ask` ran."""
    seen = []
    hook = vision_layers(model)[0].register_forward_hook(lambda m, a, o: seen.append(len(a[0])))
    ask()
    hook.remove()
    return sum(seen)


def test_equals_one_row_at_a_time(pair):
    rows = rows_of()
    got = answers(pair, rows)
    assert [g["id"] for g in got] == [r["id"] for r in rows]
    assert [g["prediction"] for g in got] == [one_by_one(*pair, r) for r in rows]
    assert len({g["prediction"] for g in got}) > 1
    assert all("image" not in g for g in got)


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_batch_composition_does_not_matter(pair, batch_size):
    rows = rows_of()
    expected = {g["id"]: g for g in answers(pair, rows)}
    again = answers(pair, rows[::-1], batch_size)
    assert again == [expected[r["id"]] for r in rows[::-1]]


def test_each_image_is_encoded_once(pair):
    assert encoded(pair[0], lambda: answers(pair, rows_of(3))) == 3


def test_another_condition_is_another_image(pair):
    rows = rows_of(1)[:1]
    rows.append({**rows[0], "image": tiny_image(5), "condition": "shuffled"})
    assert [g["prediction"] for g in answers(pair, rows)] == [one_by_one(*pair, r) for r in rows]
    assert encoded(pair[0], lambda: answers(pair, rows)) == 2


def test_a_full_cache_forgets_but_answers_the_same(pair, monkeypatch):
    expected = answers(pair, rows_of())
    monkeypatch.setattr(generation, "CACHED_BYTES", 600)
    assert answers(pair, rows_of(), 1) == expected
    assert encoded(pair[0], lambda: answers(pair, rows_of(), 1)) > 3


class Explodes(Image.Image):
    def load(self):
        raise struct.error("unpack requires a buffer of 4 bytes")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image": None}, "not a PIL image"),
        ({"image": Explodes()}, "unpack requires"),
        ({"question": " "}, "question is empty"),
        ({"image_id": None}, "no image_id"),
    ],
)
def test_a_bad_row_does_not_stop_the_others(pair, change, reason):
    rows = rows_of(1)
    expected = answers(pair, rows)
    rows.insert(1, {**rows[0], "id": "bad", **change})
    got = answers(pair, rows)
    bad = got.pop(1)
    assert bad["id"] == "bad" and "prediction" not in bad
    assert reason in bad["error"]
    assert got == expected


def test_a_truncated_file_is_reported(pair, tmp_path):
    tiny_image().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    row = {"id": "1", "image_id": "b", "image": Image.open(tmp_path / "b.png"), "question": "a?"}
    assert "cannot be read" in answers(pair, [row])[0]["error"]


def test_answers_come_window_by_window_and_rows_may_be_endless(pair):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield {"id": len(taken), "image_id": 0, "image": tiny_image(), "question": "a"}

    stream = generate_answers(*pair, endless(), TOKENS, 2, progress=False)
    assert [next(stream)["id"] for _ in range(3)] == [1, 2, 3]
    assert len(taken) == 2 * generation.WINDOW


def test_other_processor_outputs_go_to_generate_unshared(pair, monkeypatch):
    model, processor = pair
    seen, real = [], generation.prepare_inputs

    def with_more(*args):
        inputs = real(*args)
        inputs["use_cache"] = True
        return inputs

    def generate(**inputs):
        seen.append(inputs)
        return inputs["input_ids"]

    monkeypatch.setattr(generation, "prepare_inputs", with_more)
    monkeypatch.setattr(model, "generate", generate)
    answers(pair, rows_of(1)[:1])
    assert "pixel_values" in seen[0] and "mm_encoder_outputs" not in seen[0]
    assert torch.is_tensor(seen[0]["pixel_values"])


def test_training_mode_comes_back(pair):
    model, _ = pair
    model.train()
    assert all("prediction" in g for g in answers(pair, rows_of(1)))
    assert model.training
    model.eval()


def test_no_chat_template(pair):
    model, processor = pair
    bare = tiny_processor("llava")
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        build_prompt(bare, "a")


def test_a_model_with_a_q_former_is_shown_pixels():
    """Its `generate` knows no encoded images; it repeats the prompt's length in what it gives."""
    model, processor = PARTIAL["blip-2"](), tiny_processor("blip-2")
    rows = [row for row in rows_of(2) if row["question"] == QUESTIONS[0]]
    said = list(generate_answers(model, processor, rows, TOKENS, progress=False))
    assert [a["prediction"] for a in said] == [one_by_one(model, processor, r) for r in rows]
