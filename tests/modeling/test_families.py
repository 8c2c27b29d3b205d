"""Every row of the families table against an oracle that does not use the table's knowledge."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbones import tiny_backbone, tiny_backbone_processor
from tiny_models import (
    PARTIAL,
    PATCH_SIZE,
    TINY,
    cut_attention,
    tiny_image,
    tiny_inputs,
    tiny_internvl,
    tiny_llava,
    tiny_llava_config,
    tiny_processor,
    tiny_prompt,
)
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    InstructBlipVideoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
)

from firsthand.modeling.families import (
    FAMILIES,
    STEERED_MODULES,
    VISION_TOWERS,
    check_causal,
    decoder_layers,
    family_of,
    image_grid,
    image_grids,
    image_mask,
    image_token_id,
    patch_grid,
    patch_order,
    projector,
    query_layers,
    steered_modules,
    unwrap,
    vision_layers,
    vision_prefix_tokens,
)
from firsthand.modeling.relevancy import explain

PORTED = ("conv_llava", "mplug_owl", "mplug_owl2")  # MiniGPT-4 is of BLIP-2's row
MODELS = TINY | PARTIAL | {name: partial(tiny_backbone, name) for name in PORTED}
QUERIES = ("blip-2", "instructblip")  # a Q-Former's, without places in the image
OWLS = ("mplug_owl", "mplug_owl2")  # an abstractor's, and their end
TILED = ("llava_next", "llava_onevision")  # base view and tiles: test_relevancy_layout.py
CELLS = ("conv_llava",)  # of a convolutional encoder: test_backbones.py, by its own pixels
PLACED = sorted(set(MODELS) - {*QUERIES, *OWLS, *TILED, *CELLS})
FIXED = [name for name in PLACED if FAMILIES[name].grids is None]


def _model(family: str, vision: str):
    if family != "llava":
        return MODELS[family]()
    config = tiny_llava_config()
    if vision != "clip_vision_model":
        config.vision_config = AutoConfig.for_model(
            vision,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        )
        prefix = VISION_TOWERS[vision].prefix_tokens
        config.vision_feature_select_strategy = "default" if prefix else "full"
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


PLACES = [
    ("llava", "clip_vision_model"),
    ("llava", "siglip_vision_model"),
    ("llava", "dinov2"),
    ("internvl", "internvl_vision"),
    ("qwen2_vl", "qwen2_vl_vision"),
    ("qwen2_5_vl", "qwen2_5_vl_vision"),
    ("qwen3_vl", "qwen3_vl_vision"),
    ("gemma3", "siglip_vision_model"),
    ("paligemma", "siglip_vision_model"),
    ("idefics3", "idefics3_vision"),
    ("smolvlm", "smolvlm_vision"),
]


def test_every_row_is_tested():
    others = (*QUERIES, *OWLS, *TILED, *CELLS)
    assert {family for family, _ in PLACES} | set(others) == set(FAMILIES) == set(MODELS)
    queried = {MODELS[family]().config.vision_config.model_type for family in others}
    assert {vision for _, vision in PLACES} | queried == set(VISION_TOWERS)


@pytest.mark.parametrize(("family", "vision"), PLACES)
def test_a_patch_moves_the_token_that_the_grid_names(family, vision):
    """With attention between patches cut, one changed patch changes exactly one image token."""
    model = _model(family, vision)
    cut_attention(vision_layers(model))
    merge = family_of(model).merge(model.config)
    height, width = (4, 6) if family.startswith("qwen") else (4, 4)
    image = np.random.default_rng(0).integers(0, 100, (height * 14, width * 14, 3), dtype=np.uint8)
    before, encoded = _features(family, model, image)
    rows, columns = height // merge, width // merge
    assert len(before) == rows * columns
    order = patch_order(model.config, (rows, columns)).tolist()
    assert sorted(order) == list(range(height * width))
    for row, column in [(0, 0), (1, 2), (3, 1), (2, 3)]:
        changed = image.copy()
        top, left = row * PATCH_SIZE, column * PATCH_SIZE
        changed[top : top + PATCH_SIZE, left : left + PATCH_SIZE] += 100
        after, moved = _features(family, model, changed)
        assert _moved(after, before) == [(row // merge) * columns + column // merge]
        prefix = vision_prefix_tokens(model.config)
        assert _moved(moved, encoded) == [prefix + order.index(row * width + column)]


def _moved(after, before):
    return ((after - before).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()


@torch.no_grad()
def _features(family, model, image):
    """Image tokens, and the encoder's, of an image [H, W, 3] of exactly the model's patches."""
    if family.startswith("qwen"):
        prepared = tiny_processor(family).image_processor(
            Image.fromarray(image), return_tensors="pt"
        )
    else:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 50 - 1
        prepared = {
            "pixel_values": pixels[:, None] if hasattr(model.model, "connector") else pixels
        }
    found = model.get_image_features(**prepared)
    features = torch.cat(list(found.pooler_output))
    encoded = found.last_hidden_state.flatten(0, -2)
    return features.reshape(-1, model.config.text_config.hidden_size), encoded


@pytest.mark.parametrize("family", FIXED)
def test_fixed_grids(family):
    config = MODELS[family]().config
    merge, (rows, columns) = family_of(config).merge(config), image_grid(config)
    assert (rows * merge, columns * merge) == patch_grid(config) == (4, 4)


@pytest.mark.parametrize(("family", "vision"), [p for p in PLACES if p[0] in FIXED])
def test_prefix_tokens_are_what_the_encoder_adds(family, vision):
    model = _model(family, vision)
    tower = model.base_model.get_submodule(family_of(model).vision_tower)
    with torch.no_grad():
        hidden = tower(torch.zeros(1, 3, 56, 56)).last_hidden_state
    assert hidden.shape[1] - 16 == vision_prefix_tokens(model.config)


TEXTS = [(family, None) for family in sorted(FAMILIES)]
TEXTS += [("llava", text) for text in ("llama", "mistral", "qwen2", "qwen3")]
TEXTS += [("paligemma", "gemma2")]
TEXTS += [("internvl", text) for text in ("llama", "mistral", "qwen2", "qwen3")]


def test_every_text_model_is_tested():
    types = {text or MODELS[family]().config.text_config.model_type for family, text in TEXTS}
    assert types == set(STEERED_MODULES)


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_steered_modules_write_into_the_residual_stream(family, text):
    """A shift of a steered module's output is a shift of its layer's output: no norm in between."""
    model = MODELS[family](text=text) if text else MODELS[family]()
    inputs = tiny_inputs((tiny_backbone_processor if family in PORTED else tiny_processor)(family))
    shift = torch.linspace(-1, 1, 32)
    plain = _layer_output(model, inputs)
    handle = steered_modules(model)[0].register_forward_hook(lambda m, a, out: out + shift)
    shifted = _layer_output(model, inputs)
    handle.remove()
    torch.testing.assert_close(shifted - plain, shift.expand_as(plain), atol=1e-5, rtol=0)
    assert len(steered_modules(model)) == len(decoder_layers(model)) == 2


@torch.no_grad()
def _layer_output(model, inputs):
    kept = []
    handle = decoder_layers(model)[0].register_forward_hook(lambda m, a, out: kept.append(out))
    model(**inputs)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


@pytest.mark.parametrize("family", PLACED)
def test_image_tokens(family):
    model, processor = MODELS[family](), tiny_processor(family)
    inputs = tiny_inputs(processor, ["What?", "Is there a dog in the image?"])
    mask = image_mask(model, inputs["input_ids"])
    grids = image_grids(model.config, inputs)
    assert mask.dtype == torch.bool and mask.shape == inputs["input_ids"].shape
    assert mask.sum(1).tolist() == [rows * columns for rows, columns in grids]
    assert image_token_id(model.config) == processor.tokenizer.image_token_id
    assert projector(model) in set(model.base_model.modules())
    last = int(mask[0].nonzero().max())
    inputs["input_ids"] = inputs["input_ids"][:, :last]  # cut in the middle of the image
    with pytest.raises(ValueError, match="image tokens, which are not those of grids"):
        image_grids(model.config, inputs)


def test_grids_follow_the_image():
    model, processor = TINY["qwen2_5_vl"](), tiny_processor("qwen2_5_vl")
    images = [[Image.new("RGB", size)] for size in ((56, 84), (84, 56), (28, 28))]
    prompt = tiny_prompt(processor)
    inputs = processor(images=images, text=[prompt] * 3, padding=True, return_tensors="pt")
    assert image_grids(model.config, inputs) == [(3, 2), (2, 3), (1, 1)]
    assert image_grids(model.config, {"input_ids": torch.tensor([[1, 2]])}) == []
    with pytest.raises(ValueError, match="a grid of its own shape.*image_grids"):
        image_grid(model.config)


class MyConfig(LlavaConfig):
    model_type = "my_llava"


class MyModel(LlavaForConditionalGeneration):
    config_class = MyConfig


def test_a_row_is_all_that_a_new_family_needs(monkeypatch):
    """The block of docs/your_own_model.md, on a family that nothing else knows."""
    page = Path(__file__).parents[2] / "docs" / "your_own_model.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    settings = tiny_llava_config().to_dict()
    settings.pop("model_type")
    torch.manual_seed(0)
    model = MyModel(MyConfig(**settings)).eval()
    with pytest.raises(ValueError, match="'my_llava' is not supported.*row into FAMILIES"):
        decoder_layers(model)
    monkeypatch.setitem(FAMILIES, "my_llava", FAMILIES["llava"])  # so that the row goes afterwards
    del FAMILIES["my_llava"]
    names = {"model": model, "processor": tiny_processor("llava"), "image": tiny_image(3)}
    exec(compile(block, page.name, "exec"), names)
    plain, steered = names["explanation"], names["steered"]
    assert plain.patches.shape[1:] == (4, 4) and float(plain.patches.max()) > 0
    assert not torch.allclose(steered.probability, plain.probability, rtol=1e-4)
    again = explain(model, names["processor"], names["image"], "What is in the image?", "a dog")
    assert torch.equal(again.probability, plain.probability)


def test_works_through_wrappers():
    peft = pytest.importorskip("peft")
    model = tiny_llava()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert unwrap(wrapped) is model and unwrap(torch.compile(model)) is model
    assert decoder_layers(wrapped) is decoder_layers(model)
    assert family_of(wrapped).model_type == "llava"


def test_only_a_prompt_of_one_direction_is_causal():
    for family in MODELS:
        if family != "paligemma":
            check_causal(MODELS[family]().config, "anything")
    with pytest.raises(ValueError, match="anything does not cover 'paligemma'"):
        check_causal(MODELS["paligemma"](), "anything")


def test_an_unknown_family_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'bert' is not supported.*row into FAMILIES"):
        family_of(BertConfig())
    with pytest.raises(ValueError, match="no transformers model"):
        unwrap(nn.Linear(1, 1))


@pytest.mark.parametrize("family", QUERIES)
def test_queries_have_no_places(family):
    model, processor = MODELS[family](), tiny_processor(family)
    inputs = tiny_inputs(processor)
    assert int(image_mask(model, inputs["input_ids"]).sum()) == model.config.num_query_tokens == 6
    assert projector(model) is model.language_projection
    assert len(query_layers(model)) == 3 and not len(query_layers(tiny_llava()))
    with torch.no_grad():
        encoded = model.vision_model(inputs["pixel_values"]).last_hidden_state.shape[1]
    assert encoded == vision_prefix_tokens(model.config) + 16 and patch_grid(model.config) == (4, 4)
    with pytest.raises(ValueError, match="queries of a Q-Former"):
        image_grids(model.config, inputs)
    with pytest.raises(ValueError, match="queries of a Q-Former"):
        image_grid(model.config)


@pytest.mark.parametrize("family", OWLS)
def test_an_abstractor_writes_its_queries_and_their_end(family):
    model = MODELS[family]()
    inputs = tiny_inputs(tiny_backbone_processor(family))
    tokens = int(image_mask(model, inputs["input_ids"]).sum())
    assert tokens == model.config.num_query_tokens + 1 == 6
    assert len(query_layers(model)) == model.config.abstractor_layers == 2
    with torch.no_grad():
        encoded = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state.shape[1]
    assert encoded == vision_prefix_tokens(model.config) + 16 and patch_grid(model.config) == (4, 4)
    assert not {*query_layers(model).modules()} - {*projector(model).modules()}


def test_what_cannot_be_served_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="'instructblipvideo' is not supported.*frames of a video"):
        family_of(InstructBlipVideoConfig())
    for family in TILED:
        config = MODELS[family]().config
        with pytest.raises(ValueError, match=f"{family}.*base view and as tiles"):
            image_grids(config, tiny_inputs(tiny_processor(family)))
        with pytest.raises(ValueError, match=f"{family}.*base view and as tiles"):
            image_grid(config)
    seq2seq = MODELS["blip-2"]()
    seq2seq.config.text_config = T5Config()
    with pytest.raises(ValueError, match="text model 't5' is not supported; supported: llama, opt"):
        decoder_layers(seq2seq)


def test_image_tokens_with_a_class_token_are_no_grid():
    config = tiny_llava_config()
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="Use 'default'"):
        image_grid(config)


def test_patches_that_do_not_merge_are_refused():
    model = tiny_internvl()
    model.config.downsample_ratio = 1 / 3
    with pytest.raises(ValueError, match="cannot be merged by 3 x 3"):
        image_grid(model.config)
