"""Captured rows equal the eager full maps; nothing else of the model changes."""

import pytest
import torch
from tiny_models import TINY, tiny_image, tiny_inputs, tiny_processor, tiny_prompt

from firsthand.modeling.families import image_grids, image_mask
from firsthand.modeling.head_attention import head_attention
from firsthand.modeling.relevancy_attention import implementations


@pytest.fixture(params=sorted(TINY))
def parts(request):
    model = TINY[request.param]()
    return model, dict(tiny_inputs(tiny_processor(request.param), ["Is there a dog?"]))


def eager_rows(model, inputs, positions):
    """The oracle: full maps of eager attention, cut afterwards."""
    before = implementations(model.config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    columns = image_mask(model, inputs["input_ids"])[0]
    whole = torch.stack([layer[0] for layer in maps])  # [L, H, n, n]
    return whole[:, :, positions][..., columns]


def test_rows_equal_the_full_maps(parts):
    model, inputs = parts
    length = inputs["input_ids"].shape[1]
    positions = [length - 1, length - 3, length - 2]
    rows = head_attention(model, inputs, positions)
    (grid,) = image_grids(model.config, inputs)
    assert rows.shape == (2, 4, 3, *grid) and rows.dtype == torch.float32
    expected = eager_rows(model, inputs, positions)
    torch.testing.assert_close(rows.flatten(-2), expected.float(), atol=1e-6, rtol=0)
    assert 0 < rows.flatten(-2).sum(-1).max() <= 1


def test_positions_before_the_image_see_nothing_of_it(parts):
    model, inputs = parts
    first = int(image_mask(model, inputs["input_ids"])[0].nonzero()[0])
    assert not head_attention(model, inputs, [first - 1]).any()


def test_the_model_is_left_as_it_was(parts):
    model, inputs = parts
    model.train()
    before, implementation = model(**inputs).logits, implementations(model.config)
    head_attention(model, inputs, [1])
    assert model.training and implementations(model.config) == implementation
    model.eval()
    assert torch.equal(model(**inputs).logits, TINY[model.config.model_type]()(**inputs).logits)
    assert before.shape == model(**inputs).logits.shape


def test_it_works_through_peft_and_under_steering():
    peft = pytest.importorskip("peft")
    from firsthand.modeling import SteeringVector, attach_steering

    model, inputs = TINY["internvl"](), dict(tiny_inputs(tiny_processor("internvl")))
    plain = head_attention(model, inputs, [5])
    with attach_steering(model, SteeringVector({0: torch.ones(32)}), strength=5.0):
        assert not torch.allclose(head_attention(model, inputs, [5])[1], plain[1])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(head_attention(wrapped, inputs, [5]), plain)


def test_one_row_with_one_image_is_needed(parts):
    model, inputs = parts
    length = inputs["input_ids"].shape[1]
    for wrong in ([], [length], [-1]):
        with pytest.raises(ValueError, match=f"give some of 0 to {length - 1}"):
            head_attention(model, inputs, wrong)
    two = tiny_inputs(tiny_processor(model.config.model_type), ["What?", "What?"])
    with pytest.raises(ValueError, match="2 rows and 2 images"):
        head_attention(model, two, [3])


def test_tiles_are_refused():
    processor = tiny_processor("idefics3")
    processor.image_processor.do_image_splitting = True
    prompt = tiny_prompt(processor)
    inputs = processor(images=[[tiny_image()]], text=[prompt], return_tensors="pt")
    with pytest.raises(ValueError, match="switch image splitting off"):
        head_attention(TINY["idefics3"](), inputs, [3])


def test_an_error_restores_the_model(parts):
    model, inputs = parts
    before = implementations(model.config)
    broken = {**inputs, "attention_mask": torch.ones(1, 3, 5, 7, 9)}
    with pytest.raises(Exception):  # noqa: B017
        head_attention(model, broken, [3])
    assert implementations(model.config) == before
