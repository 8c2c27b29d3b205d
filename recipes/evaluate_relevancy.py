"""Does a relevancy map point at the object that its word names? On scenes, against masks.

What it is: pointing game and energy in the mask of the true object words of the model's own
captions: relevancy on patches and on image tokens, against raw attention (the mean of all heads
and layers at the same position) and, as the control, against the mask of an object of the scene
before (arm `shuffled`). What it is not: a choice of heads (`firsthand explain heads`).

    python -m firsthand.recipes.evaluate_relevancy --split test --split test_unseen \
        --scenes_folder photo_scenes --split test_photo --out docs/results/relevancy.csv

A split that is not committed is read from `--scenes_folder`.

It reads the same words as `evaluate_warning.py`, and in the same `--work` reads them once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.processing.head_statistics import statistics
from firsthand.processing.masks import decode, frame_of
from firsthand.recipes.demo_data import load_split
from firsthand.recipes.demo_measure import LEXICON
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS, write_csv
from firsthand.recipes.grounded import seen_coverage
from firsthand.recipes.inputs import load_model
from firsthand.recipes.labelled_words import labelled_words

MAPS = {"relevancy": "map", "relevancy_tokens": "token_map", "attention": "attention_map"}
METRICS = ("pointing_game", "energy_in_mask", "energy_ratio")
Row = dict[str, Any]


def mask_of(row: Row, noun: str) -> np.ndarray:
    """bool [H, W]: every object of that noun in a scene."""
    return np.any([decode(o["mask"]) for o in row["objects"] if o["noun"] == noun], axis=0)


def pointed(values: Any, mask: np.ndarray, frame: Any) -> list[float] | None:
    """The METRICS of one map [R][C] and mask; None where the model saw nothing of the mask."""
    shown = np.array(values, dtype=float)
    coverage = seen_coverage(mask, (shown.shape[0], shown.shape[1]), frame)
    if coverage is None or shown.sum() == 0:
        return None
    found = statistics(shown.reshape(1, -1), coverage.ravel())
    ratio = float(found["energy_ratio"][0])
    return [float(found["pointing_game"][0]), ratio * float(coverage.mean()), ratio]


def compared(words: list[Row], rows: list[Row], frame: Any) -> dict[str, tuple[list, list]]:
    """Arm -> ([n][METRICS], scene of each) of the true words that every arm can be judged on."""
    by_id = {row["id"]: row for row in rows}
    before = {a["id"]: b for a, b in zip(rows, [rows[-1], *rows[:-1]], strict=True)}
    arms: dict[str, tuple[list, list]] = {arm: ([], []) for arm in (*MAPS, "shuffled")}
    for word in words:
        if not word["true"] or "map" not in word:
            continue
        mask = mask_of(by_id[word["scene"]], word["node"])
        found = {arm: pointed(word[key], mask, frame) for arm, key in MAPS.items()}
        other = before[word["scene"]]["objects"][0]
        found["shuffled"] = pointed(word["map"], decode(other["mask"]), frame)
        if all(found.values()):
            for arm, values in found.items():
                arms[arm][0].append(values)
                arms[arm][1].append(word["scene"])
    return arms


def measure(arms: dict[str, tuple[list, list]], split: str, protocol: Row) -> list[Row]:
    """Result rows of every arm, and of the paired difference of relevancy and attention."""
    found = []
    for column, metric in enumerate(METRICS):
        values = {arm: np.array(rows)[:, column] for arm, (rows, _) in arms.items()}
        groups = arms["relevancy"][1]
        shown = {arm: results.bootstrap(v, groups=groups) for arm, v in values.items()}
        for other in ("attention", "shuffled"):
            shown[f"relevancy - {other}"] = results.paired_difference(
                values["relevancy"], values[other], groups=groups
            )
        found += [
            results.result_row(metric, v, len(groups), arm=arm, split=split, protocol=protocol)
            for arm, v in shown.items()
        ]
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure relevancy maps against masks.")
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument("--count", type=int, default=60, help="scenes a split")
    parser.add_argument("--scenes_folder", type=Path, help="where splits are, if not committed")
    parser.add_argument("--work", type=Path, default=Path("warning-work"))
    parser.add_argument("--out", type=Path, required=True, help="CSV; JSON goes beside it")
    args = parser.parse_args(argv)
    if args.count < 2:
        raise ValueError(f"--count {args.count}: the shuffled control needs at least 2 scenes")
    model, processor = load_model(None)
    found: list[Row] = []
    for split in args.split:
        rows = load_split(split, args.count, args.scenes_folder)
        words = labelled_words(args.work, model, processor, split, rows, "own")
        protocol = results.protocol(
            [row["id"] for row in rows], prompt=scenes.CAPTION_QUESTION,
            max_new_tokens=MAX_NEW_TOKENS, lexicon_hash=LEXICON.hash, variant=f"scenes/{split}",
        )  # fmt: skip
        found += measure(compared(words, rows, frame_of(processor)), split, protocol)
        write_csv(args.out, found)
        results.write_results(args.out.with_suffix(".json"), found)
    print(results.table(found))


if __name__ == "__main__":
    main()
