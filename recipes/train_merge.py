"""`firsthand train merge`: put trained adapters into their model, as one plain checkpoint.

What it is: what every later step (a new round, serving, sharing) wants to load. What it is not:
training.

    firsthand train merge --adapter out --model llava-hf/llava-1.5-7b-hf --out merged
    firsthand train merge --adapter round1 --adapter round2 --model ... --out merged
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firsthand.recipes.inputs import load_model


def check_adapters(folders: Sequence[str]) -> None:
    """Raise ValueError for a folder that holds no adapter."""
    for folder in folders:
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} holds no adapter_config.json: give the folder that LoRA training wrote"
            )


def merge(model: Any, folders: Sequence[str]) -> Any:
    """The model with the adapters of some rounds put into its weights, the first round first."""
    from peft import PeftModel

    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


def run(args: argparse.Namespace) -> int:
    """The verb: load, merge, save model and processor."""
    check_adapters(args.adapter)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} is not empty; choose another folder for the merged model")
    model, processor = load_model(args.model, place=False)
    merge(model, args.adapter).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"merged model and processor: {args.out}")
    return 0
