"""The vision modeling loss against the textbook, under accumulation, and what it trains."""

import pytest
import torch
from tiny_models import tiny_inputs, tiny_internvl, tiny_llava, tiny_processor
from torch import nn
from torch.nn import functional as F

from firsthand.modeling.families import image_grid, image_mask
from firsthand.modeling.modeling_grounded_internvl import GroundedInternVLForConditionalGeneration
from firsthand.modeling.modeling_grounded_llava import GroundedLlavaForConditionalGeneration
from firsthand.modeling.vision_modeling import combined_loss, vision_logits, vision_modeling_loss

BUILDERS = {
    "llava": (tiny_llava, GroundedLlavaForConditionalGeneration),
    "internvl": (tiny_internvl, GroundedInternVLForConditionalGeneration),
}
QUESTIONS = ["What?", "Is there a dog?", "What is it?", "Describe.", "a", "b c", "cup", "a tree"]


@pytest.fixture(params=sorted(BUILDERS))
def family(request):
    return request.param


def _batch(family, model, count=2):
    """Inputs with language labels on all text and vision labels on some image positions."""
    inputs = dict(tiny_inputs(tiny_processor(family), QUESTIONS[:count]))
    mask = image_mask(model, inputs["input_ids"])
    padding = inputs["attention_mask"] == 0
    inputs["labels"] = inputs["input_ids"].masked_fill(mask | padding, -100)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, 200, mask.shape, generator=generator)
    chosen = mask & (torch.rand(mask.shape, generator=generator) < 0.6)
    inputs["vision_labels"] = torch.where(chosen, words, -100)
    assert 0 < int(chosen.sum()) < int(mask.sum())
    return inputs


def _textbook(model, head, batch):
    """Full-vocabulary logits at every position, then cross-entropy that ignores -100."""
    keep = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    logits = head(model.model(**keep).last_hidden_state)
    return F.cross_entropy(logits.flatten(0, 1), batch["vision_labels"].flatten())


@pytest.mark.parametrize("head", ["shared", "separate"])
@torch.no_grad()
def test_equals_the_textbook_loss(family, head):
    build, cls = BUILDERS[family]
    model = build(cls, vision_head=head)
    if head == "separate":
        model.vision_head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    batch = _batch(family, model)
    reader = model.vision_head if head == "separate" else model.lm_head
    result = combined_loss(model, batch, vision_weight=0.3)
    keep = {key: value for key, value in batch.items() if key != "vision_labels"}
    language = model(**keep).loss
    vision = _textbook(model, reader, batch)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(result.vision, vision, **close)
    torch.testing.assert_close(result.language, language, **close)
    torch.testing.assert_close(result.loss, 0.7 * language + 0.3 * vision, **close)


@torch.no_grad()
def test_serves_native_models_and_peft(family):
    peft = pytest.importorskip("peft")
    build, cls = BUILDERS[family]
    native, grounded = build(), build(cls)
    batch = _batch(family, native)
    expected = combined_loss(grounded, batch)
    assert torch.equal(combined_loss(native, batch).loss, expected.loss)
    wrapped = peft.get_peft_model(native, peft.LoraConfig(target_modules=["q_proj"])).eval()
    assert torch.equal(combined_loss(wrapped, batch).loss, expected.loss)


@torch.no_grad()
def test_weight_zero_is_the_language_loss(family):
    model = BUILDERS[family][0]()
    batch = _batch(family, model)
    result = combined_loss(model, batch, vision_weight=0.0)
    keep = {key: value for key, value in batch.items() if key != "vision_labels"}
    torch.testing.assert_close(result.loss, model(**keep).loss, atol=1e-6, rtol=1e-6)


def _gradients(model, batch, size):
    """Gradients of the eight rows taken `size` at a time, normalised over all of them."""
    model.zero_grad()
    items = int((batch["labels"][:, 1:] != -100).sum())
    vision_items = int((batch["vision_labels"] != -100).sum())
    total = 0.0
    for start in range(0, 8, size):
        part = {key: value[start : start + size] for key, value in batch.items()}
        loss = combined_loss(model, part, 0.3, items, vision_items).loss
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_one_batch_of_eight_equals_eight_batches_of_one(family):
    build, cls = BUILDERS[family]
    model = build(cls, vision_head="separate")
    batch = _batch(family, model, count=8)
    whole, whole_gradients = _gradients(model, batch, 8)
    parts, part_gradients = _gradients(model, batch, 1)
    assert abs(whole - parts) < 1e-5
    torch.testing.assert_close(whole_gradients, part_gradients, atol=1e-5, rtol=1e-4)
    mean = combined_loss(model, batch, 0.3).loss.item()
    assert abs(whole - mean) < 1e-5


def test_a_separate_head_moves_and_stays(tmp_path, family):
    build, cls = BUILDERS[family]
    model = build(cls, vision_head="separate").train()
    batch = _batch(family, model)
    start = model.vision_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = combined_loss(model, batch).vision.item()
    for _ in range(3):
        optimizer.zero_grad()
        combined_loss(model, batch, vision_weight=0.9).loss.backward()
        optimizer.step()
    assert not torch.equal(model.vision_head.weight, start)
    assert combined_loss(model, batch).vision.item() < before
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again.vision_head.weight, model.vision_head.weight)


def test_the_vision_loss_alone_leaves_the_language_head(family):
    build, cls = BUILDERS[family]
    model = build(cls, vision_head="separate")
    batch = _batch(family, model)
    combined_loss(model, batch, vision_weight=1.0).vision.backward()
    assert model.vision_head.weight.grad.abs().sum() > 0
    if not model.config.tie_word_embeddings:
        assert model.lm_head.weight.grad is None
    shared = build(cls)
    combined_loss(shared, batch, vision_weight=1.0).vision.backward()
    assert shared.lm_head.weight.grad.abs().sum() > 0


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("head", ["shared", "separate"])
def test_distributed_data_parallel_sees_every_gradient(family, head, process_group):
    """It rejects parameters that are used outside of its own forward call."""
    build, cls = BUILDERS[family]
    model, plain = build(cls, vision_head=head), build(cls, vision_head=head)
    batch = _batch(family, model)
    combined_loss(plain, batch).loss.backward()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        combined_loss(wrapped, batch).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_labels_give_zero_and_finite_gradients(family):
    model = BUILDERS[family][0]()
    batch = _batch(family, model)
    batch["vision_labels"] = torch.full_like(batch["vision_labels"], -100)
    result = combined_loss(model, batch, vision_weight=0.3)
    assert result.vision.item() == 0
    assert torch.equal(result.loss, 0.7 * result.language)
    result.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_works_under_autocast(family):
    model = BUILDERS[family][0]()
    batch = _batch(family, model)
    exact = combined_loss(model, batch).loss
    forward = model.forward  # Trainer wraps only the forward pass; the loss runs outside
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    mixed = combined_loss(model, batch).loss
    model.forward = forward
    assert 0 < abs(mixed - exact) < 0.1


def test_the_head_may_have_another_dtype_than_the_states():
    head = nn.Linear(4, 9, bias=False)
    hidden, labels = torch.randn(1, 3, 4).bfloat16(), torch.tensor([[1, -100, 2]])
    expected = vision_modeling_loss(hidden.float(), labels, head.weight)
    assert torch.equal(vision_modeling_loss(hidden, labels, head), expected)
    assert torch.equal(vision_modeling_loss(hidden, labels, head.weight), expected)


@torch.no_grad()
def test_vision_logits_are_the_logits_at_image_positions(family):
    build, cls = BUILDERS[family]
    model = build(cls)
    inputs = tiny_inputs(tiny_processor(family), QUESTIONS[:2])
    rows, columns = image_grid(model.config)
    logits = model.vision_logits(**inputs)
    full = model(**inputs).logits
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == model.config.image_token_id).nonzero().flatten()
        torch.testing.assert_close(logits[row], full[row, places])
    assert logits.shape[:2] == (2, rows * columns)
    assert torch.equal(vision_logits(build(), **inputs), logits)


def test_vision_logits_need_one_image_a_row(family):
    model = BUILDERS[family][0]()
    inputs = tiny_inputs(tiny_processor(family))
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 2)
    with pytest.raises(ValueError, match="Pass one image a row"):
        vision_logits(model, **inputs)
    inputs["input_ids"][0, 0] = model.config.image_token_id
    with pytest.raises(ValueError, match="not those of grids"):
        vision_logits(model, **inputs)


def test_bad_batches_are_refused(family):
    model = BUILDERS[family][0]()
    batch = _batch(family, model)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        combined_loss(model, batch, vision_weight=1.5)
    with pytest.raises(ValueError, match="lacks .*vision_labels"):
        combined_loss(model, {k: v for k, v in batch.items() if k != "vision_labels"})
    shifted = batch | {"vision_labels": batch["vision_labels"].roll(1, dims=1)}
    with pytest.raises(ValueError, match="without image token"):
        combined_loss(model, shifted)
    with pytest.raises(ValueError, match="one label"):
        vision_modeling_loss(torch.zeros(1, 3, 2), torch.zeros(1, 4).long(), torch.zeros(5, 2))
