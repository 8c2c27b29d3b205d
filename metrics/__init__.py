"""Metrics as modules of plain functions: `chair.score(rows, objects)`; imported when first used."""

from importlib import import_module
from typing import Any

_WHERE = {
    "amber": "amber.scoring",
    "chair": "chair.scoring",
    "gavie": "gavie.scoring",
    "mementos": "mementos.scoring",
    "mmhal": "mmhal.scoring",
    "pope": "pope.scoring",
    "results": "results",
    "visual_reliance": "visual_reliance.scoring",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{_WHERE[name]}")


def __dir__() -> list[str]:
    return __all__
