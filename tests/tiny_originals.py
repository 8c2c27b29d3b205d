"""Tiny checkpoints in the files and under the names in which the originals are published.

The names are written out here and come from no rule of `recipes/checkpoint_keys.py`.

    from tiny_originals import write_original
    model, options = write_original("mplug-owl2", folder)  # options of `firsthand train convert`
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_backbones import tiny_backbone, tiny_backbone_config
from tiny_models import IMAGE_SIZE, PATCH_SIZE, _build, tiny_llava, tiny_tokenizer
from transformers import Blip2QFormerConfig, Blip2VisionConfig, PreTrainedModel

from firsthand.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration

Names = list[tuple[str, str]]
LLAVA: Names = [
    (r"model\.language_model\.(.+)", r"model.\1"),
    (r"model\.vision_tower\.(.+)", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.linear_1\.(.+)", r"model.mm_projector.0.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(.+)", r"model.mm_projector.2.\1"),
    (r"(lm_head\.weight)", r"\1"),
]


def _owl(vision: str, abstractor: str) -> Names:
    """What both Owls share, below what each calls its vision encoder and its abstractor."""
    ours = r"model\.multi_modal_projector\.layers\.(\d+)\."
    layer = r"encoder.layers.\1.crossattention"
    tower = r"model\.vision_tower\."
    return [
        (r"model\.multi_modal_projector\.(visual_fc\..+|vit_eos)", rf"{abstractor}.\1"),
        (ours + r"((?:query|key|value)\..+)", rf"{abstractor}.{layer}.attention.\2"),
        (ours + r"((?:norm1|normk)\..+)", rf"{abstractor}.{layer}.\2"),
        (ours + r"((?:norm2|out_proj|mlp)\..+)", rf"{abstractor}.{layer}.output.\2"),
        (tower + r"embeddings\.class_embedding", f"{vision}.embeddings.cls_token"),
        (tower + r"embeddings\.patch_embedding(.+)", rf"{vision}.embeddings.patch_embed\1"),
        (tower + r"(embeddings\.position_embedding)\.weight", rf"{vision}.\1"),
        (tower + r"pre_layrnorm(.+)", rf"{vision}.embeddings.pre_layernorm\1"),
        (tower + r"(.+)layer_norm1(.+)", rf"{vision}.\1input_layernorm\2"),
        (tower + r"(.+)layer_norm2(.+)", rf"{vision}.\1post_attention_layernorm\2"),
        (tower + r"(.+)out_proj(.+)", rf"{vision}.\1dense\2"),
        (tower + r"(.+)", rf"{vision}.\1"),
    ]


OWL1: Names = [
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.weight", r"language_model.lm_head.weight"),
    (r"model\.multi_modal_projector\.query_tokens", r"query_tokens"),
    *_owl("vision_model", "abstractor"),
]
OWL2: Names = [
    (r"model\.language_model\.(.+)", r"model.\1"),
    (r"(lm_head\.weight)", r"\1"),
    (r"model\.multi_modal_projector\.query_tokens", r"model.visual_abstractor.query_embeds"),
    *_owl("model.vision_model", "model.visual_abstractor"),
]
BLOCK = r"vision_model\.encoder\.layers\.(\d+)\."
MINIGPT4: Names = [  # the first word says which of the four files has it
    (r"language_model\.(.+)", r"language \1"),
    (r"language_projection\.(.+)", r"weights llama_proj.\1"),
    (r"vision_model\.embeddings\.class_embedding", "vision cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "vision pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding(.+)", r"vision patch_embed.proj\1"),
    (BLOCK + r"layer_norm([12])(.+)", r"vision blocks.\1.norm\2\3"),
    (BLOCK + r"self_attn\.qkv(.+)", r"vision blocks.\1.attn.qkv\2"),
    (BLOCK + r"self_attn\.projection(.+)", r"vision blocks.\1.attn.proj\2"),
    (BLOCK + r"(mlp.+)", r"vision blocks.\1.\2"),
    (r"vision_model\.post_layernorm(.+)", r"qformer ln_vision\1"),
    (r"query_tokens", "qformer query_tokens"),
    (r"qformer\.layernorm(.+)", r"qformer Qformer.bert.embeddings.LayerNorm\1"),
    (r"qformer\.(.+attention)\.attention(.+)", r"qformer Qformer.bert.\1.self\2"),
    (r"qformer\.(.+)", r"qformer Qformer.bert.\1"),
]


def renamed(state: Mapping[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """Every tensor under the name that the first pattern of its whole key gives it."""
    found = {}
    for key, tensor in state.items():
        pattern, name = next(pair for pair in names if re.fullmatch(pair[0], key))
        found[re.sub(pattern, name, key)] = tensor.contiguous()
    assert len(found) == len(state)
    return found


def plain_tokenizer(folder: Path) -> None:
    """A tokenizer as published: without `<image>`, so that a row must be added for it."""
    tiny_tokenizer(photo_token="<image>").save_pretrained(folder)
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<image>", "<photo>"))


def write_folder(folder: Path, config: dict, state: Mapping[str, torch.Tensor]) -> Path:
    """A folder with config.json and the weights in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    items = list(state.items())
    half = len(items) // 2
    for number, part in enumerate((items[:half], items[half:]), 1):
        torch.save(dict(part), folder / f"pytorch_model-0000{number}-of-00002.bin")
    return folder


def joined_qkv(state: Mapping[str, torch.Tensor], stem: str, heads: int) -> dict[str, torch.Tensor]:
    """q, k and v below `stem` as one projection, head by head; embeddings as [1, P, D]."""
    joint = dict(state)
    for key in [k for k in state if k.startswith(stem) and ".q_proj." in k]:
        parts = [joint.pop(key.replace(".q_proj.", f".{n}_proj.")) for n in "qkv"]
        split = [part.unflatten(0, (heads, -1)) for part in parts]
        joint[key.replace(".q_proj.", ".query_key_value.")] = torch.stack(split, 1).flatten(0, 2)
    for name in ("cls_token", "position_embedding"):
        key = f"{stem}embeddings.{name}"
        joint[key] = joint[key].reshape(1, -1, joint[key].shape[-1])
    return joint


def write_original(kind: str, folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """A tiny model, and what `firsthand train convert` is given of it: argument -> file or folder.

    The model knows `<image>` as the token that the published tokenizer calls `<photo>`.
    """
    return WRITERS[kind](folder)


def _text(model: PreTrainedModel) -> dict:
    return model.config.text_config.to_dict()


def write_llava(folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """LLaVA-1.5's, with its vision encoder inside and a CLIP of which only the config is read."""
    model = tiny_llava()
    raw = {**_text(model), "model_type": "llava_llama", "mm_vision_select_layer": -2}
    weights = write_folder(folder / "llava", raw, renamed(model.state_dict(), LLAVA))
    plain_tokenizer(weights)
    vision = model.config.vision_config.to_dict()
    clip = write_folder(folder / "clip", vision, {"logit_scale": torch.ones(1)})
    return model, {"weights": weights, "vision": clip}


def write_projector(folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """A bare mm_projector.bin beside a whole CLIP and a Llama."""
    model = tiny_llava()
    parts: dict[str, dict] = {"language": {}, "vision": {}, "weights": {}}
    for key, tensor in renamed(model.state_dict(), LLAVA).items():
        part = "vision" if "vision_tower" in key else "weights" if "mm_" in key else "language"
        parts[part][key.removeprefix("model.vision_tower.vision_tower.")] = tensor
    parts["vision"] |= {"logit_scale": torch.ones(1), "visual_projection.weight": torch.ones(2, 2)}
    clip = folder / "clip"
    clip.mkdir(parents=True)
    save_file(parts["vision"], clip / "model.safetensors")
    raw = {"model_type": "clip", "vision_config": model.config.vision_config.to_dict()}
    (clip / "config.json").write_text(json.dumps(raw))
    llama = write_folder(folder / "llama", _text(model), parts["language"])
    plain_tokenizer(llama)
    torch.save(parts["weights"], folder / "mm_projector.bin")
    return model, {"weights": folder / "mm_projector.bin", "vision": clip, "language": llama}


def write_conv_llava(folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """LLaVA's names beside a ConvNeXt whose last norm is one stage behind."""
    model = tiny_backbone("conv_llava")
    place = "model.vision_tower."
    whole = model.state_dict()
    vision = {k.removeprefix(place): v for k, v in whole.items() if k.startswith(place)}
    vision |= {"layernorm.weight": torch.ones(16), "layernorm.bias": torch.zeros(16)}
    rest = {k: v for k, v in whole.items() if not k.startswith(place)}
    raw = {**_text(model), "model_type": "llava", "mm_projector_type": "mlp2x_gelu"}
    weights = write_folder(folder / "conv", raw, renamed(rest, LLAVA))
    plain_tokenizer(weights)
    tower = write_folder(folder / "convnext", model.config.vision_config.to_dict(), vision)
    return model, {"weights": weights, "vision": tower}


def write_minigpt4(folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """Four files, and in those of EVA and BLIP-2 what MiniGPT-4 does not read."""
    config = tiny_backbone_config("minigpt4")
    sizes = dict(num_hidden_layers=2, intermediate_size=48, initializer_range=0.2)
    image = dict(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    # heads are 88 and 64 wide, as in ViT-g and BERT
    config.vision_config = Blip2VisionConfig(
        hidden_size=176, num_attention_heads=2, **image, **sizes
    )
    config.qformer_config = Blip2QFormerConfig(
        hidden_size=128, num_attention_heads=2, encoder_hidden_size=176, **sizes
    )
    model = _build(MiniGPT4ForConditionalGeneration, config, 0)
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[176:352] = 0  # EVA's keys have none
    parts: dict[str, dict] = {"language": {}, "vision": {}, "qformer": {}, "weights": {}}
    for key, tensor in renamed(model.state_dict(), MINIGPT4).items():
        part, name = key.split()
        if name.endswith("qkv.bias"):
            query, _, value = tensor.clone().chunk(3)
            stem = name.removesuffix("qkv.bias")
            parts[part] |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        else:
            parts[part][name] = tensor
    parts["vision"] |= {"blocks.39.norm1.weight": torch.ones(176), "head.bias": torch.ones(3)}
    parts["qformer"] |= {"t5_proj.weight": torch.ones(8, 128), "t5_proj.bias": torch.ones(8)}
    language = write_folder(folder / "vicuna", _text(model), parts["language"])
    plain_tokenizer(language)
    torch.save(parts["vision"], folder / "eva_vit_g.pth")
    torch.save({"model": parts["qformer"]}, folder / "blip2.pth")
    torch.save({"model": parts["weights"]}, folder / "minigpt4.pth")
    files = {"weights": "minigpt4.pth", "vision": "eva_vit_g.pth", "qformer": "blip2.pth"}
    return model, {"language": language, **{k: folder / name for k, name in files.items()}}


def write_mplug_owl(folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """mPLUG-Owl's, q, k and v interleaved."""
    model = tiny_backbone("mplug_owl")
    state = joined_qkv(renamed(model.state_dict(), OWL1), "vision_model.", 4)
    raw = {
        "vision_config": model.config.vision_config.to_dict(),
        "visual_abstractor_config": _abstractor(),
        "text_config": _text(model),
        "num_query_tokens": 5,
    }
    weights = write_folder(folder / "owl", raw, state)
    plain_tokenizer(weights)
    return model, {"weights": weights}


def write_mplug_owl2(folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """mPLUG-Owl2's, with the positions that are computed here."""
    model = tiny_backbone("mplug_owl2")
    state = joined_qkv(renamed(model.state_dict(), OWL2), "model.vision_model.", 4)
    for index in range(2):
        stem = f"model.visual_abstractor.encoder.layers.{index}.crossattention.attention."
        state |= {f"{stem}q_pos_embed": torch.ones(5, 24), f"{stem}k_pos_embed": torch.ones(17, 24)}
    visual = {
        "visual_model": model.config.vision_config.to_dict(),
        "visual_abstractor": {**_abstractor(), "num_learnable_queries": 5, "grid_size": 4},
    }
    raw = {**_text(model), "model_type": "mplug_owl2", "visual_config": visual}
    weights = write_folder(folder / "owl2", raw, state)
    plain_tokenizer(weights)
    return model, {"weights": weights}


def _abstractor() -> dict:
    """What a published config.json says; the MLPs' width in it is not that of the weights."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4096}
    return {**sizes, "layer_norm_eps": 1e-6, "attention_probs_dropout_prob": 0.0}


def write_lora(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """LRV V2's file over the tiny mPLUG-Owl, and the merged weights under our names."""
    model = tiny_backbone("mplug_owl")
    state = renamed(model.state_dict(), OWL1)
    generator = torch.Generator().manual_seed(0)
    merged = {}
    for key, weight in model.state_dict().items():
        if "language_model" in key and key.endswith(("q_proj.weight", "v_proj.weight")):
            a = torch.randn(8, weight.shape[1], generator=generator) / 10
            b = torch.randn(weight.shape[0], 8, generator=generator) / 10
            old = key.replace("model.language_model.", "language_model.model.")
            state[old.replace(".weight", ".lora_A.weight")] = a
            state[old.replace(".weight", ".lora_B.default.weight")] = b
            merged[key] = weight + 32 / 8 * b @ a
    file = folder / "pytorch_model.bin"
    torch.save({f"base_model.model.{k}": v for k, v in state.items()}, file)
    return merged, {"weights": file}


WRITERS = {
    "llava": write_llava,
    "llava-projector": write_projector,
    "conv-llava": write_conv_llava,
    "minigpt4": write_minigpt4,
    "mplug-owl": write_mplug_owl,
    "mplug-owl2": write_mplug_owl2,
}
