"""`firsthand measure visual-reliance`: ask with and without the key regions, and score the drop.

What it is: FiVL's visual reliance (arXiv 2412.14672) from grounded samples: each question under
five conditions, answered in batches, scored with intervals. What it is not: the score itself
(`metrics/visual_reliance`) or the making of regions (`firsthand augment fivl`).

    firsthand measure visual-reliance --data scenes --split test --predictions answers.jsonl \
        --out results.json

The predictions file is written as answers come; the same call goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from firsthand.metrics import visual_reliance
from firsthand.processing import perturb
from firsthand.recipes.inputs import load_model, read_rows

Row = dict[str, Any]
SCENES = "scenes"


def run(args: argparse.Namespace) -> int:
    """Answer (with --data), then score --predictions as every measure does."""
    from firsthand.recipes import measure

    if args.data is not None:
        answer(args)
    elif args.model is not None:
        raise ValueError("--model answers the questions of --data: give both, or neither")
    code = measure.run(args)
    print(area_table(read_rows(args.predictions)))
    return code


def answer(args: argparse.Namespace) -> None:
    """Write a prediction row for every question and condition that --predictions lacks."""
    from firsthand.processing.generation import generate_answers

    samples = list(questions(args.data, args.split, args.count))
    accepted = json.loads(Path(args.answers).read_text("utf-8")) if args.answers else {}
    out = Path(args.predictions)
    done = {(r["id"], r["condition"]) for r in kept_rows(out)}
    model, processor = load_model(args.model)
    colour = perturb.mean_colour(processor)
    asked = rows_of(samples, args.region, args.fill, args.seed, colour, accepted)
    todo = (row for row in asked if (row["id"], row["condition"]) not in done)
    with out.open("a", encoding="utf-8") as file:

        def keep(row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

        def askable() -> Iterator[Row]:
            for row in todo:
                if "error" in row:
                    keep(row)
                else:
                    yield row

        for said in generate_answers(
            model, processor, askable(), args.max_new_tokens, args.batch_size
        ):
            keep(said)


def kept_rows(path: Path) -> list[Row]:
    """The rows of an unfinished predictions file; a half-written last line is cut off.

    Raises ValueError where another line is no JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        aside = path.with_name(path.name + ".aside")
        aside.write_bytes(whole)
        aside.replace(path)
    return read_rows(path)


def questions(data: str, split: str, count: int | None) -> Iterator[Row]:
    """`{id, image, question, answer, expressions}` of grounded samples that have regions.

    Of the scenes, one existence question about each object, to be answered with yes.
    """
    from firsthand.recipes.demo_data import SCENES as FOLDER
    from firsthand.recipes.demo_data import load_scenes
    from firsthand.recipes.train_vision_modeling import load_samples

    folder = Path(FOLDER if data == SCENES else data)
    if (folder / split).is_dir():
        from firsthand.datasets_scripts.scenes import scenes

        for row in load_scenes(split, count, folder):
            for number, thing in enumerate(row["objects"]):
                yield {
                    "id": f"{row['id']}/{number}",
                    "image_id": row["id"],
                    "image": row["image"],
                    "question": scenes.existence_question(thing["noun"]),
                    "answer": "yes",
                    "expressions": [{"boxes": [thing["box"]], "mask": thing["mask"]}],
                }
        return
    samples = load_samples(data, split)
    for index in range(min(len(samples), count or len(samples))):
        sample = samples[index]
        for number, turn in enumerate(sample["turns"]):
            if sample["image"] is not None and turn["expressions"]:
                yield {
                    "id": f"{sample['id']}/{number}",
                    "image_id": sample.get("record_key", sample["id"]),
                    **{key: turn[key] for key in ("question", "answer", "expressions")},
                    "image": sample["image"],
                }


def rows_of(
    samples: Iterable[Row],
    region: perturb.Region,
    fill: perturb.Fill,
    seed: int,
    colour: tuple[int, int, int],
    accepted: dict[str, list[str]],
) -> Iterator[Row]:
    """Each question under `plain, masked, control, outside, blank`, with its image.

    `control` is missing where the regions have no room elsewhere. A sample whose image or regions
    cannot be read gives one row with an `error`.
    """
    for sample in samples:
        kept = {k: sample[k] for k in ("id", "image_id", "question", "answer")}
        if (answers := accepted.get(str(sample["id"]).rsplit("/", 1)[0])) is not None:
            kept["answers"] = answers
        try:
            image = sample["image"].convert("RGB")
            key = perturb.region_of(sample["expressions"], image.size, region)
        except Exception as error:  # decoders raise nearly anything
            yield {**kept, "condition": "plain", "error": f"{type(error).__name__}: {error}"}
            continue
        if not key.any():
            continue
        other = perturb.elsewhere(key, f"{seed}/{sample['id']}")
        everything = np.ones_like(key)
        regions = {"plain": ~everything, "masked": key, "outside": ~key, "blank": everything}
        if other is not None:
            regions["control"] = other
        for condition, hidden in regions.items():
            drawn = "mean" if condition == "blank" and fill == "blur" else fill
            view = perturb.perturb(image, hidden, drawn, seed, colour)
            area = {"area": float(key.mean())} if condition == "masked" else {}
            yield {**kept, **area, "condition": condition, "image": view}


def area_table(rows: list[Row]) -> str:
    """The reliance by area of the regions, as Markdown."""
    lines = [
        "| area of the regions | visual reliance | control-adjusted | n |",
        "|---|---|---|---|",
    ]
    for line in visual_reliance.by_area(rows):
        figures = (line["visual_reliance"], line["control_adjusted"])
        shown = ["" if np.isnan(x) else f"{x:.3f}" for x in figures]
        lines.append(f"| {line['low']:g} to {line['high']:g} | {' | '.join(shown)} | {line['n']} |")
    return "\n".join(lines)
