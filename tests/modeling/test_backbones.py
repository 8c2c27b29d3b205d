"""MiniGPT-4, ConvLLaVA, mPLUG-Owl and mPLUG-Owl2: what each must do, and what each consists of."""

import numpy as np
import pytest
import torch
from tiny_backbones import (
    BACKBONES,
    CLASSES,
    IMAGE_TOKENS,
    tiny_backbone,
    tiny_backbone_config,
    tiny_backbone_processor,
)
from tiny_models import tiny_image, tiny_inputs, tiny_prompt, tiny_tokenizer
from torch import nn
from transformers import Blip2ForConditionalGeneration, LlamaModel

from firsthand.modeling.processing_segments import SegmentsProcessor
from firsthand.modeling.visual_abstractor import VisualAbstractor, waves

QUESTIONS = ["What?", "Is there a dog in the image?"]


@pytest.fixture(params=BACKBONES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return tiny_backbone(name)


@pytest.fixture
def inputs(name):
    return tiny_inputs(tiny_backbone_processor(name), QUESTIONS)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def one_row(inputs, row):
    """Row `row` of a left-padded batch, alone and without padding."""
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row : row + 1, real],
        "attention_mask": inputs["attention_mask"][row : row + 1, real],
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }


def test_left_padding_changes_nothing(name, model, inputs):
    together = logits_of(model, inputs)
    assert (inputs["attention_mask"][0] == 0).sum() > 0
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = logits_of(model, one_row(inputs, row))[0]
        torch.testing.assert_close(together[row, real], alone, atol=1e-4, rtol=1e-4)


def test_cached_steps_are_the_whole_sequence(name, model, inputs):
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    start, ids = inputs["input_ids"].shape[1], out.sequences
    assert ids.shape == (2, start + 6)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    whole = logits_of(model, {**inputs, "input_ids": ids, "attention_mask": mask})
    stepwise = torch.stack(out.logits, 1)
    torch.testing.assert_close(stepwise, whole[:, start - 1 : -1], atol=1e-4, rtol=1e-4)
    uncached = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(uncached, ids)


def test_a_batch_answers_as_its_rows_do(name, model, inputs):
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    together = model.generate(**inputs, **settings)[:, -5:]
    alone = [model.generate(**one_row(inputs, row), **settings)[0, -5:] for row in range(2)]
    assert torch.equal(together, torch.stack(alone))


def test_the_image_is_seen_and_takes_its_tokens(name, model, inputs):
    ids = inputs["input_ids"]
    assert (ids == model.config.image_token_id).sum(1).tolist() == [IMAGE_TOKENS[name]] * 2
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [tuple(one.shape) for one in features] == [(IMAGE_TOKENS[name], 32)] * 2
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert (logits_of(model, inputs) - logits_of(model, other)).abs().max() > 1e-3


def test_gradients_reach_every_weight(name, model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    dead = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not dead


def test_checkpointing_gives_the_same_gradients(name, model, inputs):
    model.train()
    wanted = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        wanted.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.activation_checkpointing_enable()
    for plain, checkpointed in zip(*wanted, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_saves_and_loads(name, model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    again, report = CLASSES[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_missing_weights_are_drawn_not_left_over(name):
    """On meta first, as from_pretrained does: every parameter must be filled by `_init_weights`."""
    config = tiny_backbone_config(name)
    with torch.device("meta"):
        model = CLASSES[name](config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.apply(lambda module: setattr(module, "_is_hf_initialized", False))
    model.init_weights()
    left = [k for k, p in model.named_parameters() if p.isnan().any()]
    assert not left


def test_recorded_outputs(name, model, inputs):
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    text = out.language_model_outputs if name == "minigpt4" else out
    assert len(text.attentions) == 2 and len(text.hidden_states) == 3


# what each consists of


def test_minigpt4_is_blip2_up_to_an_epsilon(tmp_path):
    model = tiny_backbone("minigpt4")
    inputs = tiny_inputs(tiny_backbone_processor("minigpt4"), QUESTIONS)
    model.save_pretrained(tmp_path)
    stock, report = Blip2ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    assert model.vision_model.post_layernorm.eps == 1e-5
    stock.vision_model.post_layernorm.eps = 1e-5
    assert torch.equal(logits_of(stock, inputs), logits_of(model, inputs))


@torch.no_grad()
def test_conv_llava_tokens_lie_row_by_row():
    """With convolutions over space cut, one changed cell changes exactly one token."""
    model = tiny_backbone("conv_llava")
    for stage in model.model.vision_tower.encoder.stages:
        for layer in stage.layers:
            nn.init.zeros_(layer.dwconv.weight)
    before = torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    tokens = model.get_image_features(before).pooler_output[0]
    assert tokens.shape == (2 * 3, 32)
    for row, column in [(0, 0), (0, 2), (1, 1)]:
        pixels = before.clone()
        pixels[..., row * 64 : row * 64 + 64, column * 64 : column * 64 + 64] += 1
        moved = (model.get_image_features(pixels).pooler_output[0] - tokens).abs().amax(-1) > 1e-6
        assert moved.nonzero().flatten().tolist() == [row * 3 + column]


@torch.no_grad()
def test_only_the_second_owl_knows_where_patches_lie():
    encoded = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([encoded[:, :1], encoded[:, 1:].flip(1)], 1)
    for fixed in (False, True):
        torch.manual_seed(0)
        abstractor = VisualAbstractor(tiny_backbone_config("mplug_owl"), fixed).eval()
        abstractor.init_weights(1.0)
        tokens = abstractor(encoded)
        same = torch.allclose(tokens, abstractor(shuffled), atol=1e-5)
        assert same is not fixed
        assert torch.equal(tokens[:, -1], abstractor.vit_eos[:, 0])


def test_positions_are_sines_of_columns_then_rows():
    table = VisualAbstractor(tiny_backbone_config("mplug_owl2"), True)._positions(
        torch.zeros(1, 17, 24)
    )
    assert table.shape == (5 + 1 + 16, 24)
    assert torch.equal(table[5], torch.zeros(24))  # the CLS token
    line = np.arange(5)
    np.testing.assert_allclose(table[:5, 0], np.sin(line), atol=1e-6)
    np.testing.assert_allclose(table[:5, 23], np.cos(line / 10000 ** (11 / 12)), atol=1e-6)
    row, column = 2, 3
    patch = table[6 + row * 4 + column].numpy()
    np.testing.assert_allclose(patch[:12], waves(np.array([column]), 12)[0], atol=1e-6)
    np.testing.assert_allclose(patch[12:], waves(np.array([row]), 12)[0], atol=1e-6)


@torch.no_grad()
def test_owl2_with_equal_ways_is_llama():
    model = tiny_backbone("mplug_owl2")
    decoder = model.model.language_model
    stock = LlamaModel(decoder.config).eval()
    state = {k.replace(".multiway.0", ""): v for k, v in decoder.state_dict().items()}
    stock.load_state_dict({k: v for k, v in state.items() if ".multiway.1" not in k})
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(2, 7, 1, dtype=torch.bool)
    image[:, 2:5] = True
    expected = stock(inputs_embeds=embeds).last_hidden_state
    text = decoder(inputs_embeds=embeds).last_hidden_state
    assert torch.equal(text, expected)
    routed = decoder(inputs_embeds=embeds, image_positions=image).last_hidden_state
    assert (routed - expected)[:, 2:].abs().max() > 1e-2
    assert torch.equal(routed[:, :2], expected[:, :2])  # causal: before the first image token
    for layer in decoder.layers:
        for module in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            module.multiway[1].load_state_dict(module.multiway[0].state_dict())
    equal = decoder(inputs_embeds=embeds, image_positions=image).last_hidden_state
    assert torch.equal(equal, expected)  # the norms start equal, with weights of one


@torch.no_grad()
def test_owl2_routes_exactly_the_image_positions():
    model = tiny_backbone("mplug_owl2")
    inputs = tiny_inputs(tiny_backbone_processor("mplug_owl2"), QUESTIONS)
    layer = model.model.language_model.layers[0]
    seen = []
    layer.register_forward_pre_hook(
        lambda m, a, k: seen.append(k.get("image_positions")), with_kwargs=True
    )
    expected = inputs["input_ids"] == model.config.image_token_id
    model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = model(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"],
    )
    assert torch.equal(by_embeds.logits, logits_of(model, inputs))
    for positions in seen:
        assert torch.equal(positions.squeeze(-1), expected)
    seen.clear()
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert [p is None for p in seen] == [False, True, True]


# the processor of three of them


def test_segments_are_tokenised_apart():
    tokenizer = tiny_tokenizer()
    processor = tiny_backbone_processor("mplug_owl")
    before, between, after = "Is there", " in the image? ", " Yes."
    ids = processor(
        images=[tiny_image(0), tiny_image(1)], text=f"{before}<image>{between}<image>{after}"
    )["input_ids"][0]
    pieces = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in (between, after)]
    image = [tokenizer.image_token_id] * 6
    expected = tokenizer(before)["input_ids"] + image + pieces[0] + image + pieces[1]
    assert ids == expected


def test_the_processor_pads_and_keeps_special_tokens_once():
    processor = tiny_backbone_processor("minigpt4")
    prompts = [tiny_prompt(processor, question) for question in QUESTIONS]
    images = [[tiny_image()], [tiny_image(1)]]
    batch = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    right = processor(
        images=images, text=prompts, padding=True, padding_side="right", return_tensors="pt"
    )
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    alone = processor(images=images[0], text=prompts[0])["input_ids"][0]
    assert right["input_ids"][0, : len(alone)].tolist() == alone
    assert processor(text="Yes.")["input_ids"] == [processor.tokenizer("Yes.")["input_ids"]]
    assert "input_ids" not in processor(images=tiny_image(), return_tensors="pt")


def test_the_processor_refuses_what_cannot_work(tmp_path):
    processor = tiny_backbone_processor("minigpt4")
    with pytest.raises(ValueError, match="hold 2 <image>, but there are 1 images"):
        processor(images=tiny_image(), text="<image> <image>")
    with pytest.raises(ValueError, match="hold 0 <image>, but there are 1 images"):
        processor(images=tiny_image(), text="What?")
    with pytest.raises(ValueError, match="truncation would cut images"):
        processor(images=tiny_image(), text="<image>", truncation=True, max_length=3)
    with pytest.raises(ValueError, match="does not know '<picture>'"):
        SegmentsProcessor(processor.image_processor, tiny_tokenizer(), image_token="<picture>")
    processor.save_pretrained(tmp_path)
    assert SegmentsProcessor.from_pretrained(tmp_path).num_image_tokens == 5
