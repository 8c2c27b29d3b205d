"""Config of ConvLLaVA: LlavaConfig around a ConvNeXt of five stages.

ConvLlavaConfig(vision_config={"model_type": "convnext", "image_size": 1024, ...})
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class ConvLlavaConfig(LlavaConfig):
    """LlavaConfig whose vision encoder is convolutional, with the sizes of ConvLLaVA-768-7B.

    `vision_feature_layer` and `vision_feature_select_strategy` name the last stage, whole: there is
    no other choice.
    """

    model_type = "conv_llava"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="convnext",
            init_kwargs={
                "num_stages": 5,
                "depths": [3, 3, 27, 3, 6],
                "hidden_sizes": [192, 384, 768, 1536, 3072],
                "image_size": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    image_seq_length: int = 144
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"

    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # where LlavaModel looks for the width of what it projects
        vision: Any = self.vision_config
        vision.hidden_size = vision.hidden_sizes[-1]
