"""Models that differ from LLaVA only below its head: in the vision encoder, projector or decoder.

A base class, not a model: `forward`, `generate`, losses and checkpoints are those of
LlavaForConditionalGeneration; a subclass names its own LlavaModel.

    class MyForConditionalGeneration(LlavaShaped):
        config_class, model_class = MyConfig, MyModel
"""

from typing import Any

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .exporting import name_auto_classes


class LlavaShaped(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration around `model_class`, exported with its own code."""

    _auto_class = "AutoModelForImageTextToText"  # type: ignore[assignment]
    model_class: type[LlavaModel]

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        name_auto_classes(self)
