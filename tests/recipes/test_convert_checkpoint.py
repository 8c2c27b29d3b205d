"""Published checkpoints: key lists at full size, strictness, and whole conversions at tiny size."""

import re
from pathlib import Path

import pytest
import torch
from tiny_backbones import tiny_backbone
from tiny_models import tiny_image, tiny_tokenizer
from tiny_originals import write_original
from transformers import AutoProcessor, LlavaForConditionalGeneration

from firsthand.recipes import checkpoint_keys as keys
from firsthand.recipes import cli
from firsthand.recipes.checkpoint_configs import TEMPLATES, processor_for
from firsthand.recipes.convert_checkpoint import convert

LISTS = Path(__file__).parent / "original_keys"
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
VIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
ABSTRACTOR = {"num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 4096}
OWL = {
    "vision_config": {**VIT, "image_size": 224},
    "visual_abstractor_config": ABSTRACTOR,
    "text_config": LLAMA,
    "num_query_tokens": 64,
}
OWL2 = {
    **LLAMA,
    "visual_config": {
        "visual_model": {**VIT, "image_size": 448},
        "visual_abstractor": {**ABSTRACTOR, "num_learnable_queries": 64, "grid_size": 32},
    },
}
CONVNEXT = {
    "num_stages": 5,
    "depths": [3, 3, 27, 3, 6],
    "hidden_sizes": [192, 384, 768, 1536, 3072],
    "image_size": 768,
}
RAWS = {
    "llava": {"weights": {**LLAMA, "mm_projector_type": "mlp2x_gelu"}},
    "conv-llava": {"weights": {**LLAMA, "model_type": "llava"}, "vision": CONVNEXT},
    "minigpt4": {"language": LLAMA},
    "mplug-owl": {"weights": OWL},
    "mplug-owl2": {"weights": OWL2},
}
FILES = {
    "llava": {"weights": "llava"},
    "conv-llava": {"weights": "conv_llava", "vision": "conv_llava_vision"},
    "minigpt4": {"weights": "minigpt4"},
    "mplug-owl": {"weights": "mplug_owl"},
    "mplug-owl2": {"weights": "mplug_owl2"},
}


def frozen(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a list, on the meta device; {0-10:2} stands for 0, 2, ... 10."""
    tensors = {}
    for line in (LISTS / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        key, sizes = line.split()
        shape = [int(size) for size in sizes.split("x")]
        run = re.search(r"\{(\d+)-(\d+)(?::(\d))?\}", key)
        numbers = range(int(run[1]), int(run[2]) + 1, int(run[3] or 1)) if run else [None]
        for number in numbers:
            full = key if number is None else key.replace(run[0], str(number))
            tensors[full] = torch.empty(shape, device="meta")
    return tensors


def parts_of(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    return {argument: frozen(name) for argument, name in FILES[kind].items()}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_the_published_keys_make_up_the_model_at_full_size(kind):
    config, state = convert(kind, parts_of(kind), RAWS[kind])
    assert all(tensor.is_meta for tensor in state.values())
    if kind.startswith("mplug"):
        assert config.abstractor_intermediate_size == 2816  # of the weights, not of the config
    tokens = {"llava": 576, "conv-llava": 144, "minigpt4": 32, "mplug-owl": 64, "mplug-owl2": 64}
    found = config.image_seq_length if "llava" in kind else config.num_query_tokens
    assert found == tokens[kind]


@pytest.mark.parametrize("kind", sorted(FILES))
def test_missing_and_unknown_keys_are_named(kind):
    parts = parts_of(kind)
    parts["weights"] |= {"model.extra.weight": torch.empty(1), "another": torch.empty(1)}
    with pytest.raises(ValueError, match=r"--weights holds 2 keys .*another, model.extra.weight"):
        convert(kind, parts, RAWS[kind])
    parts = parts_of(kind)
    third = next(k for k in parts["weights"] if k.endswith("layers.3.mlp.up_proj.weight"))
    parts["weights"][third.replace(".3.", ".4.")] = torch.empty(2, 3, device="meta")
    del parts["weights"][third]
    with pytest.raises(ValueError) as error:
        convert(kind, parts, RAWS[kind])
    assert re.search(r"1 missing: \S+layers\.3\.mlp\.up_proj\.weight; ", str(error.value))
    wrong = r"1 of another shape: \S+layers\.4\.mlp\.up_proj\.weight \[2, 3\] instead of \[11008,"
    assert re.search(wrong, str(error.value))


def test_a_layer_too_many_is_named():
    parts = parts_of("llava")
    extra = {k.replace("layers.31", "layers.32"): v for k, v in parts["weights"].items()}
    parts["weights"] |= {k: v for k, v in extra.items() if "layers.32" in k}
    with pytest.raises(ValueError, match=r"9 unexpected: model.language_model.layers.32"):
        convert("llava", parts, RAWS["llava"])


def test_minigpt4_is_put_together_from_four_files():
    whole = frozen("minigpt4")
    stems = {"vision": "visual_encoder.", "language": "llama_model."}
    parts = {
        name: {k.removeprefix(stem): v for k, v in whole.items() if k.startswith(stem)}
        for name, stem in stems.items()
    }
    parts["weights"] = {k: v for k, v in whole.items() if k.startswith("llama_proj.")}
    left = {k: v for k, v in whole.items() if k.startswith(("Qformer", "query", "ln_vision"))}
    parts["qformer"] = {**left, "t5_proj.weight": torch.empty(0), "t5_proj.bias": torch.empty(0)}
    parts["vision"]["blocks.39.norm1.weight"] = torch.empty(0)  # LAVIS stops before it
    _, state = convert("minigpt4", parts, RAWS["minigpt4"])
    _, expected = convert("minigpt4", {"weights": whole}, RAWS["minigpt4"])
    assert state.keys() == expected.keys()
    del parts["qformer"]
    with pytest.raises(ValueError, match="hold no query_tokens. Give --vision"):
        convert("minigpt4", parts, RAWS["minigpt4"])


def test_a_bare_projector_needs_its_llama_and_clip():
    whole = frozen("llava")
    prefix = "model.vision_tower.vision_tower."
    clip = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    text = {k: v for k, v in whole.items() if "vision_tower" not in k and "mm_proj" not in k}
    parts = {"weights": frozen("mm_projector"), "vision": clip, "language": text}
    parts["vision"] |= {"text_model.final_layer_norm.weight": torch.empty(0)}
    parts["vision"] |= {"logit_scale": torch.empty(0)}
    _, state = convert("llava-projector", parts, {"language": LLAMA})
    _, expected = convert("llava", {"weights": whole}, RAWS["llava"])
    assert state.keys() == expected.keys()
    linear = {"model.mm_projector.weight": torch.empty(4096, 1024)}
    with pytest.raises(ValueError, match="--weights holds 1 keys .*model.mm_projector.weight"):
        convert("llava-projector", {**parts, "weights": linear}, {"language": LLAMA})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llava", {"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ("conv-llava", {"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
    ],
)
def test_other_projectors_are_refused(kind, change, message):
    raws = {**RAWS[kind], "weights": {**RAWS[kind]["weights"], **change}}
    with pytest.raises(ValueError, match=message):
        convert(kind, parts_of(kind), raws)


# what the values become


def test_joint_queries_keys_and_values_lie_head_by_head():
    heads, size = 3, 2
    rows = [(h, j, i) for h in range(heads) for j in range(3) for i in range(size)]
    joint = torch.tensor([100 * j + 10 * h + i for h, j, i in rows]).float()
    stem = "vision_model.encoder.layers.0.self_attn."
    split = keys.split_interleaved({f"{stem}query_key_value.bias": joint}, heads)
    for index, name in enumerate("qkv"):
        wanted = [100 * index + 10 * h + i for h in range(heads) for i in range(size)]
        assert split[f"{stem}{name}_proj.bias"].tolist() == wanted
    assert len(split) == 3


def test_eva_has_no_bias_of_keys():
    q, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    joined = keys.join_biases({"blocks.0.attn.q_bias": q, "blocks.0.attn.v_bias": v, "other": q})
    assert joined.keys() == {"blocks.0.attn.qkv.bias", "other"}
    assert joined["blocks.0.attn.qkv.bias"].tolist() == [1, 2, 0, 0, 3, 4]
    with pytest.raises(ValueError, match="q_bias has no a.v_bias"):
        keys.join_biases({"a.q_bias": q})


def test_two_keys_for_one_place_are_refused():
    twice = {"mm_projector.0.bias": torch.empty(1), "model.mm_projector.0.bias": torch.empty(1)}
    with pytest.raises(ValueError, match="twice, once as model.mm_projector.0.bias"):
        keys.rename(twice, keys.PROJECTOR, "it")


# whole conversions through the front door


def convert_by_command(**options) -> int:
    return cli.main(
        ["train", "convert", *(w for k, v in options.items() for w in (f"--{k}", str(v)))]
    )


def test_a_llava_whose_tokenizer_knows_images_stays_as_it_is(tmp_path):
    """Every kind, and with a new token: test_converted_checkpoints.py."""
    model, options = write_original("llava", tmp_path)
    tiny_tokenizer().save_pretrained(options["weights"])
    out = tmp_path / "out"
    assert convert_by_command(kind="llava", **options, out=out) == 0
    again, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    processor = AutoProcessor.from_pretrained(out)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nWhy? ASSISTANT:")
    inputs = processor(images=[tiny_image()], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert convert_by_command(kind="llava", **options, out=out) == 2  # not empty


def test_arguments_are_checked_before_anything_is_read(tmp_path, capsys):
    out = tmp_path / "out"
    assert convert_by_command(kind="mplug-owl", weights="x", vision="y", out=out) == 2
    assert "does not read --vision" in capsys.readouterr().err
    assert convert_by_command(kind="minigpt4", weights="x", out=out) == 2
    assert "needs --language" in capsys.readouterr().err
    assert convert_by_command(kind="mplug-owl", weights=tmp_path, out=out) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert not out.exists()


def test_lrv_lora_is_read_strictly():
    whole = frozen("lrv_lora")
    assert len(keys.lora_weights(whole)) == 32 * 2 * 2
    one = next(iter(whole))
    with pytest.raises(ValueError, match=r"other half: language_model.model.layers.0"):
        keys.lora_weights({k: v for k, v in whole.items() if k != one})
    with pytest.raises(ValueError, match="holds 1 keys .*vision.weird"):
        keys.lora_weights({**whole, "base_model.model.vision.weird": torch.empty(1)})
    with pytest.raises(ValueError, match="0 adapted modules"):
        keys.lora_weights({})


@pytest.mark.parametrize("kind", ["conv-llava", "minigpt4", "mplug-owl", "mplug-owl2"])
def test_the_processor_writes_as_many_tokens_as_the_model_makes(kind):
    model = tiny_backbone(kind.replace("-", "_"))
    processor = processor_for(kind, model.config, tiny_tokenizer(), {})
    inputs = processor(images=[tiny_image()], text=["<image> Why?"], return_tensors="pt")
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == len(tokens)
    model(**inputs)


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_templates_write_the_prompts_of_training(kind):
    tokenizer = tiny_tokenizer()
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "B."}]},
        {"role": "user", "content": "C?"},
    ]
    text = tokenizer.apply_chat_template(
        talk, chat_template=TEMPLATES[kind], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith(
        {
            "llava": "USER: <image>\nA? ASSISTANT: B.</s>USER: C? ASSISTANT:",
            "minigpt4": "###Human: <Img><image></Img> A?###Assistant: B.###Human: C?###Assistant: ",
            "mplug-owl": "\nHuman: <image>\nHuman: A?\nAI: B.\nHuman: C?\nAI: ",
            "mplug-owl2": "USER: <image>A? ASSISTANT: B.</s>USER: C? ASSISTANT:",
        }[kind]
    )
