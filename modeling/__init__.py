"""Model classes, steering and relevancy; names are imported when first used."""

from importlib import import_module
from typing import Any

_WHERE = {
    "Contrast": "contrastive",
    "Explanation": "explanation",
    "GroundedInternVLForConditionalGeneration": "modeling_grounded_internvl",
    "GroundedLlavaForConditionalGeneration": "modeling_grounded_llava",
    "SteeringVector": "steering",
    "attach_steering": "steering",
    "explain": "relevancy",
    "fit_steering": "steering_fit",
    "fold_steering": "steering_weights",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
