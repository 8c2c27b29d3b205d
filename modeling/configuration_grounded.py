"""Configs of the grounded model classes: the stock ones plus vision head and steering fields.

`model_type` stays that of the stock class, so stock classes load our checkpoints and ignore these
fields. Not a new architecture: nothing of the backbone is configured here.

    GroundedLlavaConfig.from_pretrained("llava-hf/llava-1.5-7b-hf", vision_head="separate")
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import InternVLConfig, LlavaConfig, PreTrainedConfig


@strict
class GroundedLlavaConfig(LlavaConfig):
    """LlavaConfig with the fields of a grounded model.

    Attributes:
        vision_head: "shared" reads vision logits with `lm_head`; "separate" adds a linear head of
            its own, `vision_head` [V, D], which starts as a copy of `lm_head`.
        steering_layers: decoder layers that have a steering direction inside the checkpoint.
        steering_mode: one of `steering.MODES`, see `steering.steer`.
    """

    vision_head: Literal["shared", "separate"] = "shared"
    steering_layers: list[int] | tuple[int, ...] = ()
    steering_mode: Literal["add", "norm", "turn", "vista"] = "add"

    _auto_class = "AutoConfig"


@strict
class GroundedInternVLConfig(InternVLConfig):
    """InternVLConfig with the fields of a grounded model; see `GroundedLlavaConfig`."""

    vision_head: Literal["shared", "separate"] = "shared"
    steering_layers: list[int] | tuple[int, ...] = ()
    steering_mode: Literal["add", "norm", "turn", "vista"] = "add"

    _auto_class = "AutoConfig"


def as_grounded(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """`config` itself if it is a `config_class`, else a `config_class` around its sub-configs.

    Classes are compared by name: with remote code, config and model files are imported under two
    module names, so the same class exists twice.

    Raises:
        ValueError: where `config` is of another family.
    """
    if type(config).__name__ == config_class.__name__:
        return config
    if config.model_type != config_class.model_type:
        raise ValueError(
            f"{config_class.__name__} is for {config_class.model_type!r} and cannot be made of "
            f"{config.model_type!r}. Vision modeling and attach_steering need no grounded class."
        )
    grounded = config_class.from_dict(config.to_dict())
    for name in config.sub_configs:
        setattr(grounded, name, getattr(config, name))
    grounded._attn_implementation = config._attn_implementation
    grounded.name_or_path = config.name_or_path
    return grounded
