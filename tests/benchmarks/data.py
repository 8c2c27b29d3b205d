"""How much room masks take and how fast rows with masks are read, against FiVL's published layout.

What it is: two figures on the same rows. Ours is grounded Parquet with masks as RLE of the whole
image; theirs is the published layout that `export_fivl` writes: a JSON list and one saved 24 x 24
tensor a mask, which the original data loader reads file by file. Both sides end with the coverage
of 24 x 24 patches of every mask. What it is not: a test of training speed.

    python tests/benchmarks/data.py [--quick] [--rows 400]
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch

from firsthand.datasets_scripts.fivl import fivl
from firsthand.processing.masks import decode, patch_coverage
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.export_fivl import export
from firsthand.recipes.import_fivl import FULL, GRID
from firsthand.recipes.train_vision_modeling import scene_to_sample

Coverage = list[list[np.ndarray]]  # [row][mask], each [24, 24] in 0..1


def make(folder: Path, rows: int) -> tuple[Path, Path]:
    """The same rows in both layouts: scenes, whose masks are exact."""
    scenes = [row for split in ("validation", "test", "test_prior") for row in load_scenes(split)]
    samples = (scene_to_sample(row) for row in (scenes * (rows // len(scenes) + 1))[:rows])
    grounded = fivl.build(folder / "grounded", samples)
    export(grounded, folder / "published")
    with tarfile.open(folder / "published" / "dataset_grounded.tar") as tar:
        tar.extractall(folder / "published", filter="data")
    return grounded, folder / "published"


def read_ours(grounded: Path) -> Coverage:
    """Rows of Parquet, masks decoded to the whole image, then their patches' coverage."""
    found: Coverage = []
    for file in sorted((grounded / "data").glob("*.parquet")):
        for row in parquet.read_table(file, columns=["id", "turns"]).to_pylist():
            masks = [e["mask"] for turn in row["turns"] for e in turn["expressions"]]
            found.append([patch_coverage(decode(m), (GRID, GRID), "pad") for m in masks])
    return found


def read_theirs(published: Path) -> Coverage:
    """The JSON list, and a saved tensor from disk for every prompt of every segment."""
    found: Coverage = []
    folder = published / "dataset_grounded"
    for record in json.loads((published / "fivl_instruct.json").read_text("utf-8")):
        names = [p["mask_rel"] for s in record["segment"] for p in s["prompts"]]
        tensors = [torch.load(folder / name, weights_only=True) for name in names]
        found.append([tensor.numpy() / FULL for tensor in tensors])
    return found


def bytes_per_mask(grounded: Path, published: Path) -> tuple[float, float, int]:
    """Compressed bytes of the mask columns, bytes of the saved tensors, and the number of masks."""
    ours = masks = 0
    for file in (grounded / "data").glob("*.parquet"):
        about = parquet.read_metadata(file)
        for group in range(about.num_row_groups):
            for column in range(about.num_columns):
                chunk = about.row_group(group).column(column)
                if ".mask." in chunk.path_in_schema:
                    ours += chunk.total_compressed_size
        for row in parquet.read_table(file, columns=["turns"]).to_pylist():
            masks += sum(len(turn["expressions"]) for turn in row["turns"])
    theirs = sum(p.stat().st_size for p in (published / "dataset_grounded").rglob("*.pt"))
    return ours / masks, theirs / masks, masks


def best(read: Callable[[Path], Coverage], folder: Path, repeats: int) -> tuple[float, Coverage]:
    """Least processor seconds of some readings, and what was read."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        found = read(folder)
        times.append(time.process_time() - start)
    return min(times), found


def figure(name: str, ratio: float, ours: float, theirs: float, unit: str, agree: bool) -> None:
    """One line of JSON."""
    print(
        json.dumps(
            {
                "name": name,
                "ratio": round(ratio, 3),
                "ours": round(ours, 3),
                "theirs": round(theirs, 3),
                "unit": unit,
                "agree": agree,
            }
        )
    )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Room and reading speed of masks.")
    parser.add_argument("--quick", action="store_true", help="fewer rows and readings")
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    rows, repeats = (300, 3) if args.quick else (args.rows, 5)
    with tempfile.TemporaryDirectory() as scratch:
        grounded, published = make(Path(scratch), rows)
        ours, theirs, masks = bytes_per_mask(grounded, published)
        ours_s, ours_read = best(read_ours, grounded, repeats)
        theirs_s, theirs_read = best(read_theirs, published, repeats)
    pairs = [
        pair for a, b in zip(ours_read, theirs_read, strict=True) for pair in zip(a, b, strict=True)
    ]
    agree = len(pairs) == masks and max(np.abs(a - b).max() for a, b in pairs) < 1e-9
    print(f"{rows} rows, {masks} masks of 224 x 224 pixels, coverage of {GRID} x {GRID} patches")
    figure("bytes_per_mask", theirs / ours, ours, theirs, "bytes", bool(agree))
    speed = rows / ours_s, rows / theirs_s
    figure("rows_per_second", speed[0] / speed[1], *speed, "rows/s of processor time", bool(agree))


if __name__ == "__main__":
    main()
