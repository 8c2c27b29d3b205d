"""`firsthand env`: what is installed here, for bug reports.

firsthand env
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib import metadata

from firsthand.recipes.demo_model import WHEELS, cache_folder

LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "trl", "peft", "gradio", "evaluate")


def version(package: str) -> str:
    """The installed version of a package, or `not installed`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run(args: argparse.Namespace) -> int:
    """Print one `name: value` line each."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = {
        "firsthand": version("firsthand"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "accelerator": accelerator,
        **{name: version(name) for name in LIBRARIES},
        **{
            name: "installed" if importlib.util.find_spec(name) else "not installed"
            for name in WHEELS
        },
        "cache": str(cache_folder()),
    }
    for name, value in rows.items():
        print(f"{name}: {value}")
    return 0
