"""Names of the weights in published checkpoints, and where our and transformers' classes have them.

What it is: tables of rules and pure functions from state dict to state dict, strict in both
directions: a key that no rule knows, a key that has no source and a wrong shape are errors that
name them all. What it is not: files, configs or models (`convert_checkpoint.py` has them).

    state = rename(tensors, LLAVA, "llava-v1.5-7b"); check(state, expected_shapes)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]
INDEX = r"(\d+)"


@dataclass(frozen=True)
class Layout:
    """How one kind of file names its weights.

    Attributes:
        rules: (pattern of a whole key, its new name), the first match wins.
        dropped: patterns of keys that hold nothing a model needs, or what the published loaders
            ignore as well.
    """

    rules: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...] = ()


COMPUTED = (r".*\.rotary_emb\.inv_freq", r".*embeddings\.position_ids")  # of older transformers


def _llama(target: str, head: str) -> tuple[tuple[str, str], ...]:
    return ((r"model\.(embed_tokens|layers|norm)\.(.+)", rf"{target}.\1.\2"),
            (r"lm_head\.weight", rf"{head}.weight"))  # fmt: skip


TEXT = _llama("model.language_model", "lm_head")
PROJECTOR_RULES = (
    (r"(?:model\.)?mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
)
LLAMA = Layout(TEXT, COMPUTED)
PROJECTOR = Layout(PROJECTOR_RULES)
# LLaVA-1.5's, SIMA's and ConvLLaVA's files; the vision encoder is inside some of them
LLAVA = Layout(
    (
        *TEXT,
        *PROJECTOR_RULES,
        (
            r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?"
            r"((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
            r"model.vision_tower.\1",
        ),
    ),
    (*COMPUTED, r"model\.vision_tower\.vision_tower\.layernorm\.(weight|bias)"),
)
# the whole CLIP, or its vision half; LLaVA needs that alone
CLIP = Layout(
    ((r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
      r"model.vision_tower.\1"),),
    (*COMPUTED, r"text_model\..+", r"logit_scale", r"(text|visual)_projection\.weight"),
)  # fmt: skip
# the norm is a classifier's: no image token meets it, and its width may be that of four stages
CONVNEXT = Layout(
    ((r"((?:embeddings|encoder)\..+)", r"model.vision_tower.\1"),), (r"layernorm\.(weight|bias)",)
)

# MiniGPT-4: what its own files hold, and the four files that a whole model is put together from
EVA = (
    (r"cls_token", r"vision_model.embeddings.class_embedding"),
    (r"pos_embed", r"vision_model.embeddings.position_embedding"),
    (r"patch_embed\.proj\.(.+)", r"vision_model.embeddings.patch_embedding.\1"),
    (rf"blocks\.{INDEX}\.norm([12])\.(.+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (rf"blocks\.{INDEX}\.attn\.qkv\.(.+)", r"vision_model.encoder.layers.\1.self_attn.qkv.\2"),
    (rf"blocks\.{INDEX}\.attn\.proj\.(.+)",
     r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (rf"blocks\.{INDEX}\.mlp\.(fc[12])\.(.+)", r"vision_model.encoder.layers.\1.mlp.\2.\3"),
)  # fmt: skip
QFORMER_RULES = (
    (r"query_tokens", r"query_tokens"),
    (r"ln_vision\.(.+)", r"vision_model.post_layernorm.\1"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(.+)", r"qformer.layernorm.\1"),
    (rf"Qformer\.bert\.encoder\.layer\.{INDEX}\.(attention|crossattention)\.self\.(.+)",
     r"qformer.encoder.layer.\1.\2.attention.\3"),
    (rf"Qformer\.bert\.encoder\.layer\.{INDEX}\.((?:attention|crossattention)\.output\..+)",
     r"qformer.encoder.layer.\1.\2"),
    (rf"Qformer\.bert\.encoder\.layer\.{INDEX}\.((?:intermediate|output)_query\..+)",
     r"qformer.encoder.layer.\1.\2"),
)  # fmt: skip
# LAVIS reads 39 blocks and no head, whatever else the file holds
EVA_VIT = Layout(EVA, (r"blocks\.(39|[4-9]\d)\..+", r"(norm|fc_norm|head)\..+"))
QFORMER = Layout(QFORMER_RULES, (*COMPUTED, r"(t5|opt)_proj\.(weight|bias)"))
VICUNA = Layout(_llama("language_model.model", "language_model.lm_head"), COMPUTED)
MINIGPT4 = Layout(
    (
        *((rf"visual_encoder\.{pattern}", name) for pattern, name in EVA),
        *QFORMER_RULES,
        (r"llama_proj\.(.+)", r"language_projection.\1"),
        (r"llama_model\.(.+)", r"language_model.\1"),
    ),
    COMPUTED,
)

# mPLUG-Owl and mPLUG-Owl2
OWL_VISION = (
    (r"vision_model\.embeddings\.cls_token", r"embeddings.class_embedding"),
    (r"vision_model\.embeddings\.patch_embed\.weight", r"embeddings.patch_embedding.weight"),
    (r"vision_model\.embeddings\.position_embedding", r"embeddings.position_embedding.weight"),
    (r"vision_model\.embeddings\.pre_layernorm\.(.+)", r"pre_layrnorm.\1"),
    (rf"vision_model\.encoder\.layers\.{INDEX}\.input_layernorm\.(.+)",
     r"encoder.layers.\1.layer_norm1.\2"),
    (rf"vision_model\.encoder\.layers\.{INDEX}\.post_attention_layernorm\.(.+)",
     r"encoder.layers.\1.layer_norm2.\2"),
    (rf"vision_model\.encoder\.layers\.{INDEX}\.self_attn\.dense\.(.+)",
     r"encoder.layers.\1.self_attn.out_proj.\2"),
    (rf"vision_model\.encoder\.layers\.{INDEX}\.(self_attn\.[qkv]_proj|mlp\.fc[12])\.(.+)",
     r"encoder.layers.\1.\2.\3"),
    (r"vision_model\.post_layernorm\.(.+)", r"post_layernorm.\1"),
)  # fmt: skip
OWL_ABSTRACTOR = (
    (r"(visual_fc\..+|vit_eos)", r"\1"),
    (rf"encoder\.layers\.{INDEX}\.crossattention\.attention\.(query|key|value)\.(.+)",
     r"layers.\1.\2.\3"),
    (rf"encoder\.layers\.{INDEX}\.crossattention\.(norm1|normk)\.(.+)", r"layers.\1.\2.\3"),
    (rf"encoder\.layers\.{INDEX}\.crossattention\.output\.(out_proj|norm2|mlp\..+)\.(.+)",
     r"layers.\1.\2.\3"),
)  # fmt: skip


def _under(prefix: str, rules: Iterable[tuple[str, str]], target: str) -> list[tuple[str, str]]:
    return [(re.escape(prefix) + pattern, f"{target}.{name}") for pattern, name in rules]


MPLUG_OWL = Layout(
    (
        *_under("", OWL_VISION, "model.vision_tower"),
        *_under("abstractor.", OWL_ABSTRACTOR, "model.multi_modal_projector"),
        (r"query_tokens", r"model.multi_modal_projector.query_tokens"),
        *_under("language_model.", [(TEXT[0][0], r"\1.\2")], "model.language_model"),
        (r"language_model\.lm_head\.weight", r"lm_head.weight"),
    ),
    COMPUTED,
)
MPLUG_OWL2 = Layout(
    (
        *_under("model.", OWL_VISION, "model.vision_tower"),
        *_under("model.visual_abstractor.", OWL_ABSTRACTOR, "model.multi_modal_projector"),
        (
            r"model\.visual_abstractor\.query_embeds",
            r"model.multi_modal_projector.query_tokens",
        ),
        *TEXT,
    ),
    (*COMPUTED, r".*\.crossattention\.attention\.[qk]_pos_embed"),  # fixed sines
)


def rename(tensors: Tensors, layout: Layout, source: str) -> dict[str, torch.Tensor]:
    """The tensors under their new names.

    Args:
        tensors: of one file or folder.
        layout: of its names.
        source: what to call it in errors.

    Raises:
        ValueError: for keys that no rule knows, all of them, or two keys for one place.
    """
    renamed: dict[str, torch.Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in layout.dropped):
            continue
        name = _new_name(key, layout)
        if name is None:
            unknown.append(key)
        elif name in renamed:
            raise ValueError(f"{source} holds {name} twice, once as {key}.")
        else:
            renamed[name] = tensor
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} keys that are not of this kind of checkpoint: "
            f"{', '.join(sorted(unknown))}. Is it another model, or another of its files?"
        )
    return renamed


def _new_name(key: str, layout: Layout) -> str | None:
    for pattern, name in layout.rules:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(name)
    return None


def check(state: Tensors, expected: Mapping[str, torch.Size]) -> None:
    """Nothing missing, nothing left over, every shape right.

    Raises:
        ValueError: with all the keys that are not so.
    """
    faults = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(expected[key])}"
            for key in sorted(expected.keys() & state.keys())
            if state[key].shape != expected[key]
        ],
    }
    if any(faults.values()):
        told = (f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"The weights do not make up the model. {'; '.join(told)}.")


def split_interleaved(tensors: Tensors, heads: int) -> dict[str, torch.Tensor]:
    """mPLUG-Owl's vision encoder: each joint query_key_value as q_proj, k_proj and v_proj.

    Its rows lie head by head, [head, (q, k, v), head size], so a plain cut in three would mix them.

    Args:
        tensors: as in the file; others pass as they are.
        heads: attention heads of the vision encoder.
    """
    split = {}
    for key, tensor in tensors.items():
        stem, joint, kind = key.partition("self_attn.query_key_value.")
        if not joint:
            split[key] = tensor
            continue
        parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
        for name, part in zip("qkv", parts, strict=True):
            split[f"{stem}self_attn.{name}_proj.{kind}"] = part.flatten(0, 1)
    return split


def flatten_embeddings(state: Tensors) -> dict[str, torch.Tensor]:
    """mPLUG-Owl's class [1, 1, D] and position [1, P, D] embeddings as CLIP's [D] and [P, D]."""
    place, flat = "model.vision_tower.embeddings", dict(state)
    for name, last in (("class_embedding", 2), ("position_embedding.weight", 1)):
        if f"{place}.{name}" in flat:
            flat[f"{place}.{name}"] = flat[f"{place}.{name}"].flatten(0, last)
    return flat


def join_biases(tensors: Tensors) -> dict[str, torch.Tensor]:
    """EVA's q_bias and v_bias as one bias of queries, keys (zero) and values."""
    joined = {k: v for k, v in tensors.items() if not k.endswith((".q_bias", ".v_bias"))}
    for key, query in tensors.items():
        if key.endswith(".q_bias"):
            stem = key.removesuffix("q_bias")
            if f"{stem}v_bias" not in tensors:
                raise ValueError(f"{key} has no {stem}v_bias beside it.")
            value = tensors[f"{stem}v_bias"]
            joined[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined


def lora_weights(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The adapter inside LRV V2's file, with the names that PEFT gives it on our mPLUG-Owl.

    The file is the whole state dict of a model in an old PEFT: the base model's weights are in it
    too, and are left to the base model.

    Raises:
        ValueError: for keys of another model, one half of a pair without the other, or no adapter.
    """
    adapter, base = {}, {}
    for key, tensor in tensors.items():
        bare = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        found = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", bare)
        if found:
            adapter[f"{found[1]}.weight", found[2]] = tensor
        else:
            base[bare] = tensor
    rename(base, WITH_JOINT_QKV, "The file")
    modules = {module: torch.empty(0) for module, _ in adapter}
    places = {m: next(iter(rename({m: t}, MPLUG_OWL, "The file"))) for m, t in modules.items()}
    halved = sorted(m for m in modules if {(m, "lora_A"), (m, "lora_B")} - adapter.keys())
    if halved or not adapter:
        raise ValueError(
            f"The file holds {len(modules)} adapted modules; without their other half: "
            f"{', '.join(halved) or 'none'}. Give the file of LRV's LoRA model."
        )
    return {
        f"base_model.model.{places[module].removesuffix('.weight')}.{half}.weight": tensor
        for (module, half), tensor in adapter.items()
    }


WITH_JOINT_QKV = Layout(
    (*MPLUG_OWL.rules, (r"(vision_model\..+\.query_key_value\..+)", r"\1")), MPLUG_OWL.dropped
)
