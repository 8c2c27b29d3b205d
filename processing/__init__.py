"""Generation, masks, collators, overlays and the endpoint client; imported when first used."""

from importlib import import_module
from typing import Any

_WHERE = {
    "Endpoint": "endpoint",
    "VisionLabelCollator": "collator",
    "build_prompt": "generation",
    "generate_answers": "generation",
    "heatmap": "overlays",
    "patch_coverage": "masks",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
