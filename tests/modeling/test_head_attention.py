"""Captured attention rows against transformers' own eager maps, in every family."""

import pytest
import torch
from tiny_models import (
    TINY,
    tiny_image,
    tiny_inputs,
    tiny_llava,
    tiny_processor,
    tiny_prompt,
)

from firsthand.modeling.families import image_grids, image_mask
from firsthand.modeling.head_attention import NAME, head_attention
from firsthand.modeling.relevancy_attention import implementations


def eager_rows(model, inputs, positions):
    """The full maps of transformers' eager attention, and the wanted part of them."""
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = model.base_model(**inputs, output_attentions=True, use_cache=False).attentions
    image = image_mask(model, inputs["input_ids"])[0]
    rows = torch.stack(maps)[:, 0][:, :, positions][..., image]
    return rows.unflatten(-1, image_grids(model.config, inputs)[0])


@pytest.mark.parametrize("family", sorted(TINY))
def test_rows_are_those_of_eager_attention(family):
    model, inputs = TINY[family](), tiny_inputs(tiny_processor(family))
    last = inputs["input_ids"].shape[1] - 1
    positions = [last, last - 3]
    before = implementations(model.config)
    rows = head_attention(model, inputs, positions)
    assert implementations(model.config) == before != NAME
    expected = eager_rows(model, inputs, positions)
    assert rows.dtype == torch.float32 and rows.shape == expected.shape
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    assert rows.flatten(-2).sum(-1).max() < 1 and rows.std() > 0


def test_only_image_columns_of_wanted_rows_are_kept():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor("llava"))
    kept = []
    softmax = torch.softmax

    def counting(scores, dim):
        kept.append(scores.shape)
        return softmax(scores, dim=dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", counting)
        head_attention(model, inputs, [20])
    assert kept == [torch.Size([4, 1, inputs["input_ids"].shape[1]])] * 2


def test_mode_and_attention_are_restored_after_an_error():
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor("llava"))
    model.train()
    before = implementations(model.config)
    broken = {**inputs, "pixel_values": torch.zeros(1, 1)}
    with pytest.raises((ValueError, RuntimeError)):
        head_attention(model, broken, [20])
    assert implementations(model.config) == before
    assert model.training and all(m.training for m in model.modules())


def test_what_cannot_be_read_is_refused():
    model, processor = tiny_llava(), tiny_processor("llava")
    inputs = tiny_inputs(processor)
    with pytest.raises(ValueError, match="give some of 0 to"):
        head_attention(model, inputs, [inputs["input_ids"].shape[1]])
    with pytest.raises(ValueError, match="give some of 0 to"):
        head_attention(model, inputs, [])
    with pytest.raises(ValueError, match="2 rows and 2 images"):
        head_attention(model, tiny_inputs(processor, ["a", "a"]), [20])
    family = TINY["idefics3"]()
    splitting = tiny_processor("idefics3")
    splitting.image_processor.do_image_splitting = True
    big = tiny_image(0, 300, 200)
    text = tiny_prompt(splitting)
    tiles = splitting(images=[[big]], text=[text], return_tensors="pt")
    with pytest.raises(ValueError, match="image splitting off"):
        head_attention(family, tiles, [20])
