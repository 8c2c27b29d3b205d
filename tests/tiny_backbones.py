"""Tiny random models of the backbones that transformers lacks, with their processors.

    from tiny_backbones import BACKBONES, tiny_backbone, tiny_backbone_processor
    model, processor = tiny_backbone("mplug_owl"), tiny_backbone_processor("mplug_owl")

Images are 56 x 56 pixels (ConvLLaVA: 128, which make 2 x 2 tokens); MiniGPT-4 has 5 image tokens,
mPLUG-Owl and mPLUG-Owl2 5 and their end. Text as in `tiny_models`.
"""

import torch
from tiny_models import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    PATCH_SIZE,
    _build,
    _text_config,
    tiny_tokenizer,
)
from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from firsthand.modeling.configuration_conv_llava import ConvLlavaConfig
from firsthand.modeling.configuration_minigpt4 import MiniGPT4Config
from firsthand.modeling.configuration_mplug_owl import MPlugOwlConfig
from firsthand.modeling.configuration_mplug_owl2 import MPlugOwl2Config
from firsthand.modeling.modeling_conv_llava import ConvLlavaForConditionalGeneration
from firsthand.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from firsthand.modeling.modeling_mplug_owl import MPlugOwlForConditionalGeneration
from firsthand.modeling.modeling_mplug_owl2 import MPlugOwl2ForConditionalGeneration
from firsthand.modeling.processing_segments import SegmentsProcessor

QUERIES = 5
IMAGE_TOKENS = {"minigpt4": 5, "conv_llava": 4, "mplug_owl": 6, "mplug_owl2": 6}
CLASSES: dict[str, type[PreTrainedModel]] = {
    "minigpt4": MiniGPT4ForConditionalGeneration,
    "conv_llava": ConvLlavaForConditionalGeneration,
    "mplug_owl": MPlugOwlForConditionalGeneration,
    "mplug_owl2": MPlugOwl2ForConditionalGeneration,
}
BACKBONES = sorted(CLASSES)
VIT = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    initializer_range=0.2,
)


def tiny_backbone_config(name: str) -> PreTrainedConfig:
    """The config of `tiny_backbone`."""
    common = dict(
        text_config=_text_config("llama", 2, tie=False),
        image_token_index=tiny_tokenizer().image_token_id,
    )
    if name == "minigpt4":
        qformer = Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
        )
        vision = Blip2VisionConfig(**VIT)
        return MiniGPT4Config(
            vision_config=vision, qformer_config=qformer, num_query_tokens=QUERIES, **common
        )
    if name == "conv_llava":
        vision = ConvNextConfig(
            num_stages=5,
            depths=[1, 1, 1, 1, 2],
            hidden_sizes=[8, 8, 12, 16, 24],
            image_size=128,
            layer_scale_init_value=1.0,
            initializer_range=0.2,
        )
        return ConvLlavaConfig(vision_config=vision, image_seq_length=4, **common)
    config_class = {"mplug_owl": MPlugOwlConfig, "mplug_owl2": MPlugOwl2Config}[name]
    return config_class(
        vision_config=CLIPVisionConfig(initializer_factor=5.0, layer_norm_eps=1e-6, **VIT),
        num_query_tokens=QUERIES,
        image_seq_length=QUERIES + 1,
        abstractor_layers=2,
        abstractor_heads=4,
        abstractor_intermediate_size=32,
        **common,
    )


@torch.no_grad()
def tiny_backbone(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode."""
    model = _build(CLASSES[name], tiny_backbone_config(name), seed)
    if name == "minigpt4":  # zeros, as transformers starts them
        generator = torch.Generator().manual_seed(seed)
        model.query_tokens.normal_(generator=generator)
    return model


def tiny_backbone_processor(name: str) -> ProcessorMixin:
    """The stock processor of LLaVA for ConvLLaVA, ours for the others."""
    side = 128 if name == "conv_llava" else IMAGE_SIZE
    image_processor = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False
    )
    if name == "conv_llava":
        return LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tiny_tokenizer(),
            patch_size=64,
            vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )
    return SegmentsProcessor(
        image_processor,
        tiny_tokenizer(),
        num_image_tokens=IMAGE_TOKENS[name],
        chat_template=CHAT_TEMPLATE,
    )
