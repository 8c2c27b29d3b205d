"""Read the published layout of Intel/fivl-instruct into grounded samples, and write it back.

What it is: the importer and exporter of FiVL's files (arXiv 2412.14672): LLaVA records with
`segment`, and a tar or folder of 24 x 24 coverage tensors in the frame that LLaVA's padding makes.
What it is not: a downloader (bring your copy and your images), or an augmenter.

    python -m firsthand.recipes.import_fivl read --segments fivl_instruct.json \
        --conversations llava_v1_5_mix665k.json --masks dataset_grounded.tar --images data \
        --out grounded
    python -m firsthand.recipes.import_fivl write --data grounded --out published

Coverage says how much of each patch a mask covers, not where in it. The mask that is read back
fills so many pixels of each patch, those towards its covered neighbours first; what lay in the
padding is lost.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from firsthand.processing import key_expressions
from firsthand.processing.masks import Frame, boxes_of, encode, from_frame, seen_area
from firsthand.recipes import augment_fivl, conversations
from firsthand.recipes.inputs import read_rows
from firsthand.recipes.stages import Dropped, Row, Step

SIDE, GRID = 336, 24  # pixels and patches of the published frame
FULL = 255.0  # a patch that is covered wholly


class MaskFiles:
    """The tensors of a folder or an uncompressed tar, by the name that records give them.

    Raises:
        FileNotFoundError: where there is neither.
        ValueError: for a file that is no tar, or a compressed one.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = Path(where)
        if not self.where.exists():
            raise FileNotFoundError(f"{where}: no such folder or tar of mask tensors")
        self.parts: dict[str, tuple[int, int]] = {}
        self.tops = {""}
        if self.where.is_file():
            self._index()
            self.tops |= {name.split("/", 1)[0] + "/" for name in self.parts}
        else:
            self.tops |= {folder.name + "/" for folder in self.where.iterdir() if folder.is_dir()}

    def _index(self) -> None:
        try:
            with tarfile.open(self.where, "r:") as tar:
                for part in tar:
                    if part.isfile():
                        self.parts[part.name.removeprefix("./")] = part.offset_data, part.size
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.where} is not a plain tar ({error}): unpack it, and give the folder"
            ) from None

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises FileNotFoundError where it is not there."""
        if name.startswith("/") or ".." in name.split("/"):
            raise FileNotFoundError(f"missing mask: {name} lies outside of {self.where}")
        for top in sorted(self.tops):
            if self.where.is_dir() and (self.where / (top + name)).is_file():
                return (self.where / (top + name)).read_bytes()
            if top + name in self.parts:
                start, size = self.parts[top + name]
                with self.where.open("rb") as file:
                    file.seek(start)
                    return file.read(size)
        raise FileNotFoundError(f"missing mask: {name}")


def load_coverage(data: bytes) -> np.ndarray:
    """Coverage 0..1, float64 [24, 24], of one saved tensor of 0..255.

    It is read with `weights_only=True`: a pickle that wants more than a tensor is refused unrun.

    Raises:
        ValueError: for anything but such a tensor.
    """
    import torch

    try:
        tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"refused mask file: it asks for more than a tensor ({first})") from None
    except Exception as error:  # torch raises many types on broken files
        raise ValueError(f"corrupt mask file: {type(error).__name__}: {error}") from None
    shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    if shape != (GRID, GRID):
        raise ValueError(f"wrong mask file: {shape} instead of a tensor [{GRID}, {GRID}]")
    coverage = tensor.double().numpy() / FULL
    if not (np.isfinite(coverage).all() and 0 <= coverage.min() and coverage.max() <= 1):
        raise ValueError("wrong mask file: its values are not in 0..255")
    return coverage


def mask_of_coverage(coverage: np.ndarray, size: tuple[int, int], frame: Frame) -> np.ndarray:
    """A mask whose patches are covered as given: the inverse of `masks.patch_coverage`.

    In each patch so many of its pixels are filled as its coverage says, those first where the
    coverage, interpolated between the patches' centres, is highest; ties from the centre outward.

    Args:
        coverage: [R, C] in 0..1.
        size: width and height of the original image.
        frame: the part of it that the patches span.

    Returns:
        bool [H, W]. `patch_coverage` gives the coverage back within 2 s + s**2 for patches inside
        of the image, where s is one pixel's side over a patch's side.
    """
    rows, columns = coverage.shape
    left, top, right, bottom = seen_area(size, frame)
    x = (np.arange(size[0]) + 0.5 - left) / (right - left) * columns
    y = (np.arange(size[1]) + 0.5 - top) / (bottom - top) * rows
    cell = np.floor(y).astype(int)[:, None] * columns + np.floor(x).astype(int)[None]
    inside = (y >= 0)[:, None] & (y < rows)[:, None] & (x >= 0)[None] & (x < columns)[None]
    patch_pixels = (right - left) / columns * (bottom - top) / rows
    wanted = np.round(coverage * patch_pixels).astype(int).ravel()
    mask = np.zeros(size[::-1], dtype=bool)
    whole = inside.copy()
    whole[inside] = coverage.ravel()[cell[inside]] >= 1
    mask |= whole
    partial = inside & ~whole
    partial[partial] = wanted[cell[partial]] > 0
    v, u = np.nonzero(partial)
    if len(v):
        mask[v, u] = _first(cell[v, u], _between(coverage, y[v], x[u]), y[v], x[u], wanted)
    return mask


def _between(coverage: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Coverage interpolated bilinearly at points in units of patches, [N]."""
    y = np.clip(y - 0.5, 0, coverage.shape[0] - 1)
    x = np.clip(x - 0.5, 0, coverage.shape[1] - 1)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1 = np.minimum(y0 + 1, coverage.shape[0] - 1)
    x1 = np.minimum(x0 + 1, coverage.shape[1] - 1)
    upper = coverage[y0, x0] * (1 - (x - x0)) + coverage[y0, x1] * (x - x0)
    lower = coverage[y1, x0] * (1 - (x - x0)) + coverage[y1, x1] * (x - x0)
    return upper * (1 - (y - y0)) + lower * (y - y0)


def _first(
    cell: np.ndarray, score: np.ndarray, y: np.ndarray, x: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Which pixels [N] are among the first `wanted[cell]` of their cell by score, then place."""
    far = (y - np.floor(y) - 0.5) ** 2 + (x - np.floor(x) - 0.5) ** 2
    order = np.lexsort((x, y, far.round(9), -score.round(9), cell))
    ordered = cell[order]
    starts = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    chosen = np.empty(len(cell), dtype=bool)
    chosen[order] = rank < wanted[ordered]
    return chosen


class ReadSegments(Step):
    """The `segment` of a published record -> expressions with masks of the original image."""

    def __init__(self, masks: str) -> None:
        super().__init__()
        self.masks = masks

    def process(self, row: Row) -> Row:
        try:
            asked = [
                (int(entry["turn"]), str(prompt["prompt"]), prompt)
                for entry in row["parsed"].get("segment") or ()
                for prompt in entry["prompts"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Dropped(f"malformed segment: {type(error).__name__}: {error}") from None
        for number, text, prompt in asked:
            try:
                self._add(row, number, text, prompt)
            except (ValueError, FileNotFoundError) as error:
                row["rejected"].append({"turn": number, "text": text, "reason": str(error)})
        return row

    def _add(self, row: Row, number: int, text: str, prompt: Mapping[str, Any]) -> None:
        if row["image"] is None:
            raise ValueError("no image: the record names none")
        if not 1 <= number <= len(row["turns"]):
            raise ValueError(f"no such turn: {number} of {len(row['turns'])}")
        turn = row["turns"][number - 1]
        found, rejected = key_expressions.place(turn["answer"], [text], whole_words=False)
        if rejected:
            raise ValueError(rejected[0]["reason"])
        coverage = load_coverage(_mask_files(self.masks).read(str(prompt.get("mask_rel"))))
        mask = mask_of_coverage(coverage, row["size"], "pad")
        if not mask.any():
            raise ValueError("empty mask")
        boxes = original_boxes(prompt.get("bbox"), row["size"]) or boxes_of(mask[None]).tolist()
        one = {**found[0], "boxes": boxes, "score": None, "mask": encode(mask)}
        turn["expressions"].append(one)


@lru_cache(maxsize=1)
def _mask_files(where: str) -> MaskFiles:
    """Indexed once in each process."""
    return MaskFiles(where)


def original_boxes(published: Any, size: tuple[int, int]) -> list[list[float]]:
    """Published boxes (integer pixels of the padded frame of 336) in pixels of the original image.

    What lies in the padding is cut off; boxes wholly in it are left out.

    Raises:
        ValueError: for what is no list of `{xmin, ymin, xmax, ymax}`.
    """
    boxes = published or []
    boxes = [boxes] if isinstance(boxes, Mapping) else boxes
    try:
        corners = [[float(box[key]) for key in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"malformed boxes: {str(published)[:80]}") from None
    if not corners:
        return []
    within = from_frame(np.array(corners) / SIDE, size, "pad").clip(0, (*size, *size))
    return [box for box in within.tolist() if box[0] < box[2] and box[1] < box[3]]


def merged(segments: str | Path, said: str | Path, out: str | Path) -> Path:
    """Published segments with the conversations of LLaVA's file, as JSONL; returns the file.

    Records are joined by id. Where an id stands several times, the k-th stands with the k-th; where
    the two files do not have it equally often, the record keeps no conversation and is dropped
    later with that reason.
    """
    known = defaultdict(list)
    for record in read_list(said):
        known[str(record.get("id"))].append(record)
    published = read_list(segments)
    often, at = Counter(str(one.get("id")) for one in published), Counter[str]()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for one in published:
            key = str(one.get("id"))
            base = known[key][at[key]] if often[key] == len(known[key]) else {}
            at[key] += 1
            whole = {**base, **one}
            file.write(json.dumps(whole, ensure_ascii=False) + "\n")
    return out


def read_list(path: str | Path) -> list[dict[str, Any]]:
    """Records of a .json list or of JSONL. Raises ValueError or FileNotFoundError naming it."""
    if ".jsonl" in Path(path).name:
        return read_rows(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of records")
    try:
        records = json.loads(Path(path).read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ValueError(f"{path} is not a JSON list of records")
    return records


def import_published(
    segments: str | Path,
    masks: str | Path,
    images: str | Path,
    out: str | Path,
    said: str | Path | None = None,
    workers: int = 1,
) -> dict[str, int]:
    """Published files as grounded Parquet in `out`; a stopped run is finished by the same call.

    Args:
        segments: records with `segment`, as JSON or JSONL; with their conversations (as FiVL's
            `inject_segments.py` writes them) or, with `said`, without.
        masks: the tar or folder of tensors.
        images: the folder that the records' image paths start from.
        out: a folder of its own.
        said: LLaVA's file of conversations, to join by id.
        workers: shards under way at once.

    Returns:
        Rows `kept` and `dropped`.
    """
    MaskFiles(masks)
    data = str(segments)
    if said is not None:
        data = str(merged(segments, said, Path(out) / "state" / "merged.jsonl"))
    steps = [augment_fivl.ReadRecord(str(images)), ReadSegments(str(masks))]
    about = {"data": conversations.fingerprint(data, ""), "masks": Path(masks).name}
    return augment_fivl.run_steps(data, out, steps, about, str(images), "", workers)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Read and write Intel/fivl-instruct's layout.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    read = verbs.add_parser("read", help="published files -> grounded Parquet")
    read.add_argument("--segments", required=True, help="fivl_instruct.json, or a split of it")
    read.add_argument("--conversations", help="LLaVA's file, where --segments holds none")
    read.add_argument("--masks", required=True, help="dataset_grounded.tar, or its folder")
    read.add_argument("--images", required=True, help="folder of the images")
    read.add_argument("--workers", type=int, default=1, help="shards under way at once")
    write = verbs.add_parser("write", help="grounded Parquet -> published files")
    write.add_argument("--data", required=True, help="folder of a grounded data set")
    for one in (read, write):
        one.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    try:
        if args.verb == "write":
            from firsthand.recipes.export_fivl import export

            print(json.dumps(export(args.data, args.out)))
        else:
            said, workers = args.conversations, args.workers
            counts = import_published(
                args.segments, args.masks, args.images, args.out, said, workers
            )
            augment_fivl.report(Path(args.out), counts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
