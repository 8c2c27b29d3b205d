"""ConvLLaVA (arXiv 2405.15738): LLaVA with a ConvNeXt of five stages instead of a CLIP encoder.

Everything but the step from feature map to image tokens is LlavaForConditionalGeneration: a map of
H/64 x W/64 cells gives one token a cell, row by row, so 768 pixels make 144 tokens. Not a copy of
the published code; `recipes/convert_checkpoint.py` reads its checkpoints.

    model = ConvLlavaForConditionalGeneration(ConvLlavaConfig())
"""

from typing import Any

import torch
from torch import nn
from transformers import LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_conv_llava import ConvLlavaConfig
from .llava_shaped import LlavaShaped


class ConvLlavaModel(LlavaModel):
    """LlavaModel whose image tokens are the cells of the last feature map."""

    config: ConvLlavaConfig
    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig):
        super().__init__(config)
        self.vision_tower.layernorm = nn.Identity()  # of a classifier; image tokens do not meet it

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Image tokens of [N, 3, H, W] pixels, H and W multiples of the total stride.

        Returns:
            The last feature map [N, C, H/64, W/64] as `last_hidden_state`, and as `pooler_output` a
            list of N tensors [H/64 * W/64, D].
        """
        features = self.vision_tower(pixel_values).last_hidden_state
        cells = features.flatten(2).transpose(1, 2)
        tokens: Any = list(self.multi_modal_projector(cells))  # what LlavaModel concatenates
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)


class ConvLlavaForConditionalGeneration(LlavaShaped):
    """ConvLLaVA with its language head; inputs and outputs are those of LLaVA."""

    config: ConvLlavaConfig
    config_class = ConvLlavaConfig
    model_class = ConvLlavaModel
