"""Scenes as SIMA's prompts: images, `{image, text, ground_truth}` and the objects that they show.

What it is: the demo's stand-in for COCO images and LLaVA-Instruct prompts, with exact ground truth.
What it is not: responses or preferences.

    python -m firsthand.recipes.demo_prompts --out prompts --scenes scenes --split train --count 300
    python -m firsthand.datasets_scripts.sima.sima prompts --source prompts/prompts.jsonl \
        --images prompts/images --out prompts/rows
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.demo_rows import objects_of
from firsthand.recipes.inputs import write_rows


def write_prompts(rows: list[dict[str, Any]], out: Path) -> None:
    """`prompts.jsonl`, `images/<id>.png`, `objects.json` ({id: nouns}) and `nouns.txt` in `out`."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    prompts = []
    for row in rows:
        name = f"{row['id'].replace('/', '_')}.png"
        row["image"].save(out / "images" / name)
        prompts.append(
            {"image": name, "text": scenes.CAPTION_QUESTION, "ground_truth": row["caption"]}
        )
    write_rows(out / "prompts.jsonl", prompts)
    shown = {i.replace("/", "_"): nouns for i, nouns in objects_of(rows).items()}
    (out / "objects.json").write_text(json.dumps(shown), "utf-8")
    (out / "nouns.txt").write_text("\n".join(scenes.NOUNS) + "\n", "utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write scenes as prompts.")
    parser.add_argument("--scenes", type=Path, help="folder of splits; the committed if absent")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--start", type=int, default=0, help="the first scene")
    parser.add_argument("--count", type=int, help="scenes; all if absent")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    end = None if args.count is None else args.start + args.count
    rows = load_scenes(args.split, end, args.scenes)[args.start :]
    write_prompts(rows, args.out)
    print(f"{len(rows)} prompts: {args.out}")


if __name__ == "__main__":
    main()
