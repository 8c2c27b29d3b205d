"""Config of mPLUG-Owl: LlavaConfig with a visual abstractor for a projector.

MPlugOwlConfig(text_config={"model_type": "llama", ...}, num_query_tokens=64)
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig
from transformers.configuration_utils import SubConfigSpec

VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}


@strict
class MPlugOwlConfig(LlavaConfig):
    """LlavaConfig of the sizes of mPLUG-Owl 7B.

    `vision_feature_layer` and `vision_feature_select_strategy` name the encoder's normalised
    output, CLS token included: there is no other choice.

    Attributes:
        num_query_tokens: image tokens that the abstractor makes; one more marks their end.
        abstractor_layers: of cross-attention.
        abstractor_heads: of each layer.
        abstractor_intermediate_size: of its gated MLPs.
        abstractor_norm_eps: of the normalisation inside these MLPs.
        abstractor_dropout: of attention weights, in training.
    """

    model_type = "mplug_owl"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={**VIT_L, "image_size": 224},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    image_seq_length: int = 65
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    num_query_tokens: int = 64
    abstractor_layers: int = 6
    abstractor_heads: int = 16
    abstractor_intermediate_size: int = 2816
    abstractor_norm_eps: float = 1e-6
    abstractor_dropout: float = 0.1

    _auto_class = "AutoConfig"
