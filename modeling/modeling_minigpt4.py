"""MiniGPT-4 (arXiv 2304.10592): BLIP-2's ViT-g and Q-Former, one linear layer, and Llama.

It is Blip2ForConditionalGeneration with a Llama text model; the one difference is the epsilon of
the normalisation after the ViT, which the stock class (it loads the same checkpoints) takes from
the encoder's layers. Not MiniGPT-v2 and not the Llama-2 variant: these have no Q-Former.

    model = MiniGPT4ForConditionalGeneration.from_pretrained("org/minigpt4-7b")
"""

from transformers import Blip2ForConditionalGeneration

from .configuration_minigpt4 import MiniGPT4Config
from .exporting import name_auto_classes

VISION_NORM_EPS = 1e-5


class MiniGPT4ForConditionalGeneration(Blip2ForConditionalGeneration):
    """BLIP-2 as MiniGPT-4 uses it: 32 image tokens stand wherever the prompt has `<image>`."""

    config: MiniGPT4Config
    config_class = MiniGPT4Config
    _auto_class = "AutoModelForImageTextToText"  # type: ignore[assignment]

    def __init__(self, config: MiniGPT4Config):
        super().__init__(config)
        self.vision_model.post_layernorm.eps = VISION_NORM_EPS
        name_auto_classes(self)
