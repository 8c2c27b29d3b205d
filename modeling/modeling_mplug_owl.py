"""mPLUG-Owl (arXiv 2304.14178): CLIP ViT-L, a visual abstractor and Llama, in the shape of LLaVA.

Only the abstractor is new (`visual_abstractor.py`). An image takes 65 tokens: 64 queries and their
end. Not the video or the Bloom variants; `recipes/convert_checkpoint.py` reads the published
checkpoints.

    model = MPlugOwlForConditionalGeneration.from_pretrained("org/mplug-owl-7b")
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .configuration_mplug_owl import MPlugOwlConfig
from .llava_shaped import LlavaShaped
from .visual_abstractor import VisualAbstractor


class MPlugOwlModel(LlavaModel):
    """LlavaModel with the abstractor in place of the projector."""

    config: MPlugOwlConfig
    config_class = MPlugOwlConfig
    multi_modal_projector: Any

    def __init__(self, config: MPlugOwlConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VisualAbstractor(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VisualAbstractor):
            text: Any = self.config.text_config
            module.init_weights(text.initializer_range)
        else:
            super()._init_weights(module)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Image tokens of [N, 3, H, W] pixels.

        Returns:
            The encoder's normalised outputs [N, 1 + R * C, D] as `last_hidden_state`, and as
            `pooler_output` a list of N tensors [Q + 1, width of the language model].
        """
        encoded = self.vision_tower(pixel_values).last_hidden_state
        encoded = self.vision_tower.post_layernorm(encoded)
        tokens: Any = list(self.multi_modal_projector(encoded))  # what LlavaModel concatenates
        return BaseModelOutputWithPooling(last_hidden_state=encoded, pooler_output=tokens)


class MPlugOwlForConditionalGeneration(LlavaShaped):
    """mPLUG-Owl with its language head; inputs and outputs are those of LLaVA."""

    config: MPlugOwlConfig
    config_class = MPlugOwlConfig
    model_class = MPlugOwlModel
