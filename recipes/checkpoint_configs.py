"""Configs, processors and chat templates for converted checkpoints.

What it is: what the published config.json files say, as our and transformers' configs, and the
prompts that the models were trained on. What it is not: weights (`checkpoint_keys.py`) or files
(`convert_checkpoint.py`).

    config = llava_config(json.loads(text), vision=None)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from firsthand.modeling.configuration_conv_llava import ConvLlavaConfig
from firsthand.modeling.configuration_minigpt4 import MiniGPT4Config
from firsthand.modeling.configuration_mplug_owl import MPlugOwlConfig
from firsthand.modeling.configuration_mplug_owl2 import MPlugOwl2Config
from firsthand.modeling.processing_segments import SegmentsProcessor
from firsthand.recipes.checkpoint_keys import Tensors

Raw = Mapping[str, Any]
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "layer_norm_eps", "hidden_act",
)  # fmt: skip
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
OWL_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
MINIGPT4_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)
SELECTED: dict[str, Any] = {"patch": "default", "cls_patch": "full"}


def _chosen(raw: Raw, fields: tuple[str, ...]) -> dict[str, Any]:
    return {field: raw[field] for field in fields if raw.get(field) is not None}


def text_config(raw: Raw) -> LlamaConfig:
    """LlamaConfig of a published config.json: that of a Llama, or of a model built on one.

    Raises:
        ValueError: where it is no Llama's.
    """
    if "hidden_size" not in raw or "num_attention_heads" not in raw:
        raise ValueError(f"The config of a {raw.get('model_type')!r} does not describe a Llama.")
    return LlamaConfig(**_chosen(raw, TEXT_FIELDS))


def clip_config(raw: Raw) -> CLIPVisionConfig:
    """CLIPVisionConfig of a CLIP's config.json, or of its vision half's."""
    return CLIPVisionConfig(**_chosen(raw.get("vision_config", raw), VISION_FIELDS))


def llava_config(raw: Raw, vision: Raw | None) -> LlavaConfig:
    """LlavaConfig of a `llava_llama` config.json (LLaVA-1.5, SIMA).

    Args:
        raw: the published config.json; of a Llama with the projector's fields absent, LLaVA-1.5's
            choices are taken.
        vision: config.json of the CLIP; None takes LLaVA-1.5's, ViT-L/14 at 336 pixels.

    Raises:
        ValueError: for a projector that is not LLaVA-1.5's.
    """
    _check_projector(raw)
    sizes: dict[str, Any] = {} if vision is None else {"vision_config": clip_config(vision)}
    feature = raw.get("mm_vision_select_feature", "patch")
    config: Any = LlavaConfig(
        text_config=text_config(raw),
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=SELECTED[feature],
        **sizes,
    )
    side = config.vision_config.image_size // config.vision_config.patch_size
    config.image_seq_length = side**2 + (feature == "cls_patch")
    return config


def conv_llava_config(raw: Raw, vision: Raw | None) -> ConvLlavaConfig:
    """ConvLlavaConfig of its config.json, which calls itself LLaVA's, and of its ConvNeXt's."""
    _check_projector(raw)
    text = text_config(raw)
    if vision is None:
        config: Any = ConvLlavaConfig(text_config=text)
        config.vision_config.image_size = raw.get("mm_vision_resolution", 768)
    else:
        config = ConvLlavaConfig(text_config=text, vision_config=ConvNextConfig(**vision))
    config.image_seq_length = (config.vision_config.image_size // total_stride(config)) ** 2
    return config


def total_stride(config: ConvLlavaConfig) -> int:
    """Pixels on each side of the square that one image token stands for."""
    vision: Any = config.vision_config
    return vision.patch_size * 2 ** (vision.num_stages - 1)


def _check_projector(raw: Raw) -> None:
    kind = raw.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise ValueError(
            f"mm_projector_type is {kind!r}; transformers' LLaVA has the two-layer projector of "
            "LLaVA-1.5 (mlp2x_gelu) only."
        )


def mplug_owl_config(raw: Raw, weights: Tensors) -> MPlugOwlConfig:
    """MPlugOwlConfig of a published config.json.

    Args:
        raw: the published config.json.
        weights: of the same checkpoint: some config.json give the abstractor's MLPs a width that
            the weights do not have.
    """
    return MPlugOwlConfig(
        vision_config=_owl_vision(raw["vision_config"]),
        text_config=text_config(raw["text_config"]),
        num_query_tokens=raw["num_query_tokens"],
        **_abstractor(raw["visual_abstractor_config"], weights),
    )


def mplug_owl2_config(raw: Raw, weights: Tensors) -> MPlugOwl2Config:
    """MPlugOwl2Config of a published config.json; see `mplug_owl_config`.

    Raises:
        ValueError: where the abstractor's grid is not the encoder's.
    """
    visual, abstractor = (raw["visual_config"][k] for k in ("visual_model", "visual_abstractor"))
    vision: Any = _owl_vision(visual)
    side = vision.image_size // vision.patch_size
    if (abstractor.get("grid_size") or side) != side:
        raise ValueError(
            f"The abstractor's grid is {abstractor['grid_size']} wide, the encoder's {side}."
        )
    return MPlugOwl2Config(
        vision_config=vision,
        text_config=text_config(raw),
        num_query_tokens=abstractor["num_learnable_queries"],
        **_abstractor(abstractor, weights),
    )


def _owl_vision(raw: Raw) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{"hidden_act": "quick_gelu", **_chosen(raw, VISION_FIELDS)})


def _abstractor(raw: Raw, weights: Tensors) -> dict[str, Any]:
    width = next((t.shape[0] for k, t in weights.items() if k.endswith("mlp.w1.weight")), None)
    fields = {
        "abstractor_layers": raw.get("num_hidden_layers"),
        "abstractor_heads": raw.get("num_attention_heads"),
        "abstractor_intermediate_size": width,
        "abstractor_norm_eps": raw.get("layer_norm_eps"),
        "abstractor_dropout": raw.get("attention_probs_dropout_prob"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def minigpt4_config(language: Raw, state: Tensors) -> MiniGPT4Config:
    """MiniGPT4Config of Vicuna's config.json and of the sizes of the other weights.

    Its heads are 88 wide in the ViT (ViT-g) and 64 in the Q-Former (BERT).

    Args:
        language: config.json of the Llama.
        state: the weights under their new names.

    Raises:
        ValueError: where the ViT or the Q-Former is missing.
    """
    sizes = ("vision_model.embeddings.position_embedding", "query_tokens")
    missing = [name for name in sizes if name not in state]
    if missing:
        raise ValueError(
            f"The files hold no {' and no '.join(missing)}. Give --vision (eva_vit_g.pth) and "
            "--qformer (blip2_pretrained_flant5xxl.pth) with MiniGPT-4's own --weights."
        )
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    patches, width = state[sizes[0]].shape[1] - 1, state[sizes[0]].shape[2]
    queries, inner = state[sizes[1]].shape[1:]
    vision = Blip2VisionConfig(
        hidden_size=width,
        num_attention_heads=width // 88,
        num_hidden_layers=_count(state, "vision_model.encoder.layers."),
        intermediate_size=state["vision_model.encoder.layers.0.mlp.fc1.bias"].shape[0],
        patch_size=patch,
        image_size=round(patches**0.5) * patch,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=inner,
        num_attention_heads=inner // 64,
        num_hidden_layers=_count(state, "qformer.encoder.layer."),
        intermediate_size=state["qformer.encoder.layer.0.intermediate_query.dense.bias"].shape[0],
    )
    return MiniGPT4Config(
        vision_config=vision,
        qformer_config=qformer,
        num_query_tokens=queries,
        text_config=text_config(language),
    )


def _count(state: Tensors, prefix: str) -> int:
    return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})


def _template(system: str, user: str, before: str, after: str, start: str) -> str:
    """A chat template: `user` opens a question, `before` and `after` enclose an answer."""
    content = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    turns = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + user.replace("CONTENT", content)
        + "{% else %}"
        + before
        + content.replace("IMAGE", "")
        + after
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + start
        + "{% endif %}"
    )
    return system + turns


TEMPLATES = {
    "llava": _template(
        VICUNA_SYSTEM + " ", "USER: CONTENT ", "ASSISTANT: ", "</s>", "ASSISTANT:"
    ).replace("IMAGE", "<image>{{ '\\n' }}"),
    "minigpt4": _template(
        MINIGPT4_SYSTEM, "###Human: CONTENT", "###Assistant: ", "", "###Assistant: "
    ).replace("IMAGE", "<Img><image></Img> "),
    "mplug-owl": _template(
        OWL_SYSTEM, "{{ '\\n' }}Human: CONTENT", "{{ '\\n' }}AI: ", "", "{{ '\\n' }}AI: "
    ).replace("IMAGE", "<image>{{ '\\n' }}Human: "),
    "mplug-owl2": _template("", "USER: CONTENT ", "ASSISTANT: ", "</s>", "ASSISTANT:").replace(
        "IMAGE", "<image>"
    ),
}


def processor_for(kind: str, config: Any, tokenizer: Any, raw: Raw) -> ProcessorMixin:
    """The processor of a converted model: LLaVA's own, or ours for models with query tokens.

    Args:
        kind: of checkpoint, as in `convert_checkpoint.KINDS`.
        config: of the model.
        tokenizer: which knows `<image>`.
        raw: the published config.json, which says whether images are padded to squares.
    """
    size = config.vision_config.image_size
    if kind not in ("llava", "llava-projector", "conv-llava"):
        square = {"height": size, "width": size}
        return SegmentsProcessor(
            CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False),
            tokenizer,
            num_image_tokens=_image_tokens(config),
            chat_template=TEMPLATES[kind],
        )
    images = LlavaImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_pad=raw.get("image_aspect_ratio", "pad") == "pad",
    )
    convolutional = kind == "conv-llava"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=total_stride(config) if convolutional else config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if convolutional else 1,
        chat_template=TEMPLATES["llava"],
    )


def _image_tokens(config: Any) -> int:
    """Of one image; mPLUG-Owl's end with one of their own."""
    return config.num_query_tokens + (not isinstance(config, MiniGPT4Config))
