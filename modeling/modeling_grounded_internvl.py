"""InternVL with a vision head and steering inside.

The stock class and a mixin (`grounding.py`): logits, state-dict keys and `model_type` are those of
the stock class, which loads the same checkpoints without remote code.

    model = GroundedInternVLForConditionalGeneration.from_pretrained(path, vision_head="separate")
"""

from transformers import InternVLForConditionalGeneration

from .configuration_grounded import GroundedInternVLConfig
from .grounding import GroundedMixin, share_conversion_mapping


class GroundedInternVLForConditionalGeneration(GroundedMixin, InternVLForConditionalGeneration):
    """`InternVLForConditionalGeneration` with `vision_logits` and `set_steering`.

    Loads any InternVL checkpoint; `vision_head` and `steering_layers` of its config (see
    `GroundedInternVLConfig`) say what it holds beyond the stock class.
    """

    config: GroundedInternVLConfig
    config_class = GroundedInternVLConfig


share_conversion_mapping(GroundedInternVLForConditionalGeneration, InternVLForConditionalGeneration)
