"""`firsthand steer fit` and `firsthand steer apply`: vectors from contrast pairs, and their effect.

firsthand steer fit --out vector                     # the demo model, from its validation scenes
firsthand steer apply --vector vector --image photo.jpg --strength 1.0
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.recipes.inputs import load_model, open_image, read_rows


def scene_pairs(rows: Iterable[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One contrast pair a scene: its true caption, against one that names a likely absent object.

    The absent noun is of the same theme as the one that it replaces: the hallucination that the
    co-occurrence prior would make (the contrast of VTI's text side, arXiv 2410.15778).
    """
    rng, pairs = random.Random(seed), []
    for row in rows:
        objects = [dict(o) for o in row["objects"]]
        present = {o["noun"] for o in objects}
        wrong = rng.choice(objects)
        theme = scenes.NOUNS[wrong["noun"]]
        likely = [n for n in scenes.NOUNS if scenes.NOUNS[n] == theme and n not in present]
        truth = scenes.caption(objects)
        wrong["noun"] = rng.choice(likely or [n for n in scenes.NOUNS if n not in present])
        side = {"image": row["image"], "question": scenes.CAPTION_QUESTION}
        pairs.append(
            {
                "positive": {**side, "answer": truth},
                "negative": {**side, "answer": scenes.caption(objects)},
            }
        )
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
