"""Llava with a vision head and steering inside.

The stock class and a mixin (`grounding.py`): logits, state-dict keys and `model_type` are those of
the stock class, which loads the same checkpoints without remote code.

    model = GroundedLlavaForConditionalGeneration.from_pretrained(path, vision_head="separate")
"""

from transformers import LlavaForConditionalGeneration

from .configuration_grounded import GroundedLlavaConfig
from .grounding import GroundedMixin, share_conversion_mapping


class GroundedLlavaForConditionalGeneration(GroundedMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with `vision_logits` and `set_steering`.

    Loads any Llava checkpoint; `vision_head` and `steering_layers` of its config (see
    `GroundedLlavaConfig`) say what it holds beyond the stock class.
    """

    config: GroundedLlavaConfig
    config_class = GroundedLlavaConfig


share_conversion_mapping(GroundedLlavaForConditionalGeneration, LlavaForConditionalGeneration)
