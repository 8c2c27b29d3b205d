"""Which code a saved checkpoint brings along: `config.auto_map` for the classes of this package.

Not a registry: a checkpoint names its own files, and whoever loads it with `trust_remote_code=True`
needs nothing of ours installed.

    name_auto_classes(model)  # at the end of its __init__; its class sets `_auto_class`
"""

from transformers import PreTrainedModel

AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def name_auto_classes(model: PreTrainedModel) -> None:
    """Let checkpoints of `model` load through AutoConfig and each of `AUTO_CLASSES`."""
    name, config = _place(type(model)), _place(type(model.config))
    model.config.auto_map = {"AutoConfig": config, **dict.fromkeys(AUTO_CLASSES, name)}


def _place(cls: type) -> str:
    """ "file.Class", also where the file was imported as part of somebody's remote code."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
