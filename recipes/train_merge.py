"""`firsthand train merge`: put a trained adapter into its model, as one plain checkpoint.

What it is: what every later step (a new round, serving, sharing) wants to load. What it is not:
training.

    firsthand train merge --adapter out --model llava-hf/llava-1.5-7b-hf --out merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

from firsthand.recipes.inputs import load_model


def run(args: argparse.Namespace) -> int:
    """The verb: load, merge, save model and processor."""
    from peft import PeftModel

    if not (Path(args.adapter) / "adapter_config.json").is_file():
        raise ValueError(
            f"{args.adapter} holds no adapter_config.json: give the folder that LoRA training wrote"
        )
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} is not empty; choose another folder for the merged model")
    model, processor = load_model(args.model)
    merged = PeftModel.from_pretrained(model, args.adapter).merge_and_unload()
    merged.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"merged model and processor: {args.out}")
    return 0
