"""Where the tokens of base view and tiles lie, against what one changed patch moves."""

import pytest
import torch
from tiny_models import PARTIAL, PATCH_SIZE, cut_attention, tiny_image, tiny_inputs, tiny_processor

from firsthand.modeling.families import vision_layers, vision_prefix_tokens
from firsthand.modeling.relevancy import explain
from firsthand.modeling.relevancy_layout import Layout, layout_of, shares

TILED = ("llava_next", "llava_onevision")


@torch.no_grad()
@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("size", [(80, 60), (50, 130), (112, 112)])
def test_a_patch_moves_the_tokens_of_its_place(family, size):
    model, processor = PARTIAL[family](), tiny_processor(family)
    cut_attention(vision_layers(model))
    inputs = tiny_inputs(processor, images=[tiny_image(1, *size)])
    layout = layout_of(model, inputs)
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    before = model.get_image_features(pixels, sizes).pooler_output[0]
    assert len(before) == len(layout.places) and layout.encoded % len(pixels[0]) == 0
    each, prefix = layout.encoded // len(pixels[0]), vision_prefix_tokens(model.config)
    for view in range(len(pixels[0])):
        for row, column in [(0, 0), (1, 3), (3, 2)]:
            changed = pixels.clone()
            top, left = row * PATCH_SIZE, column * PATCH_SIZE
            changed[0, view, :, top : top + PATCH_SIZE, left : left + PATCH_SIZE] += 1
            after = model.get_image_features(changed, sizes).pooler_output[0]
            moved = ((after - before).abs().amax(-1) > 1e-6).nonzero().flatten()
            place = view * each + prefix + row * 4 + column
            assert moved.tolist() == (layout.places == place).nonzero().flatten().tolist()


def test_values_are_shared_out_by_area():
    found = shares(2, 3)
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]) / 3)
    layout = Layout((1, 2), base=(1, 1), places=torch.tensor([0, 1, 2, -1]), encoded=3)
    found = layout.over_image(torch.tensor([4.0, 1.0, 0.0, 9.0]))  # base, two patches, newline
    assert found.tolist() == [[3.0, 2.0]]


def test_blended_patches_are_refused():
    """More tiles than the model keeps apart: it interpolates their features."""
    model, processor = PARTIAL["llava_onevision"](), tiny_processor("llava_onevision")
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_1"
    with pytest.raises(ValueError, match="blends the patches"):
        explain(model, processor, tiny_image(), "What?", "a dog")
