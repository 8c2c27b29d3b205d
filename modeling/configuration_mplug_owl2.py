"""Config of mPLUG-Owl2: that of mPLUG-Owl at 448 pixels.

MPlugOwl2Config(text_config={"model_type": "llama", ...})
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_mplug_owl import VIT_L, MPlugOwlConfig


@strict
class MPlugOwl2Config(MPlugOwlConfig):
    """MPlugOwlConfig of the sizes of mPLUG-Owl2 7B."""

    model_type = "mplug_owl2"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={**VIT_L, "image_size": 448},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    abstractor_dropout: float = 0.0
