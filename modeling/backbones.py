"""Which classes of this package wrote a checkpoint, for the backbones that transformers lacks.

With firsthand installed, its own code loads them, not the copy that lies in the checkpoint: nobody
has to trust remote code. Not a registry of transformers' auto classes, which it leaves alone.

    found = backbone_classes("org/mplug-owl-7b")  # None for a model of transformers' own
    model, processor = (one.from_pretrained("org/mplug-owl-7b") for one in found)
"""

from typing import Any

from transformers import LlavaProcessor, PreTrainedConfig

from .modeling_conv_llava import ConvLlavaForConditionalGeneration
from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from .modeling_mplug_owl import MPlugOwlForConditionalGeneration
from .modeling_mplug_owl2 import MPlugOwl2ForConditionalGeneration
from .processing_segments import SegmentsProcessor

PROCESSORS: dict[type, type] = {
    ConvLlavaForConditionalGeneration: LlavaProcessor,
    MiniGPT4ForConditionalGeneration: SegmentsProcessor,
    MPlugOwlForConditionalGeneration: SegmentsProcessor,
    MPlugOwl2ForConditionalGeneration: SegmentsProcessor,
}


def backbone_classes(name: str) -> tuple[Any, Any] | None:
    """Model and processor class of a checkpoint that one of the classes here saved, else None.

    Args:
        name: Hub id or folder.

    Raises:
        OSError: where there is no such checkpoint.
    """
    architectures = PreTrainedConfig.get_config_dict(name)[0].get("architectures") or ()
    for model, processor in PROCESSORS.items():
        if model.__name__ in architectures:
            return model, processor
    return None
