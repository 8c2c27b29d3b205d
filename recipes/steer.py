"""`firsthand steer fit` and `firsthand steer apply`: vectors from contrast pairs, and their effect.

firsthand steer fit --out vector                     # the demo model, from its validation scenes
firsthand steer apply --vector vector --image photo.jpg --strength 1.0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.processing.support import blank
from firsthand.recipes.inputs import load_model, open_image, read_rows


def scene_pairs(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One contrast pair a scene: its true caption with the image, and with a blank one.

    The direction is what seeing adds to saying the same words (the contrast that VaLSe, arXiv
    2505.17812, makes in the image, at its extreme).
    """
    pairs = []
    for row in rows:
        said = {"question": scenes.CAPTION_QUESTION, "answer": row["caption"]}
        image = row["image"].convert("RGB")
        seen, unseen = {**said, "image": image}, {**said, "image": blank(image)}
        pairs.append({"positive": seen, "negative": unseen})
    return pairs


def read_pairs(path: str) -> list[dict[str, Any]]:
    """Contrast pairs from JSONL; image paths are relative to the file."""
    rows, folder = read_rows(path), Path(path).parent
    for number, row in enumerate(rows, 1):
        for side in ("positive", "negative"):
            if not {"image", "question", "answer"} <= set(row.get(side, {})):
                raise ValueError(
                    f"{path}, row {number}: {side} needs image, question and answer, has "
                    f"{sorted(row.get(side, {}))}"
                )
            row[side]["image"] = open_image(folder / row[side]["image"])
    return rows


def run(args: argparse.Namespace) -> int:
    """Fit or apply, as `args.action` says."""
    return fit(args) if args.action == "fit" else apply(args)


def fit(args: argparse.Namespace) -> int:
    """Fit a vector and save it as a steering repo."""
    from firsthand.modeling import fit_steering
    from firsthand.recipes.demo_data import load_scenes

    pairs = read_pairs(args.pairs) if args.pairs else scene_pairs(load_scenes("validation"))
    model, processor = load_model(args.model)
    vector = fit_steering(model, processor, pairs, method=args.method)
    vector.save_pretrained(args.out)
    print(f"{vector.method} vector of {len(pairs)} pairs, {len(vector.layers)} layers: {args.out}")
    return 0


def apply(args: argparse.Namespace) -> int:
    """Print the plain and the steered answer."""
    from firsthand.modeling import SteeringVector, attach_steering
    from firsthand.processing.generation import generate_answers

    image = open_image(args.image)
    vector = SteeringVector.from_pretrained(args.vector)
    model, processor = load_model(args.model)
    row = {"id": "0", "image_id": "0", "image": image, "question": args.question}

    def answer() -> str:
        return next(iter(generate_answers(model, processor, [row], progress=False)))["prediction"]

    print(f"plain:   {answer()}")
    with attach_steering(model, vector, args.strength) as steering:
        print(f"steered: {answer()}  (strength {steering.strength:g})")
    return 0
