"""Grounded samples in the published layout of Intel/fivl-instruct, for FiVL's own code.

What it is: the way back of `import_fivl`: one JSON list of LLaVA records with `segment`, one tar of
24 x 24 coverage tensors in the padded frame, and the images. What it is not: a second format of
ours. Masks become coverage, so their outlines are lost within a patch. `mask_img` is left out, as
the published tar holds no such pictures.

    python -m firsthand.recipes.import_fivl write --data grounded --out published
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from firsthand.processing.masks import decode, patch_coverage, to_frame
from firsthand.recipes.import_fivl import FULL, GRID, SIDE
from firsthand.recipes.inputs import stored_image

RECORDS, MASKS, IMAGES = "fivl_instruct.json", "dataset_grounded.tar", "images"


def export(data: str | Path, out: str | Path) -> dict[str, int]:
    """Write a grounded data set's folder in the published layout.

    Args:
        data: a folder with `data/*.parquet`, as `firsthand augment fivl` writes it.
        out: a folder that does not exist yet: `fivl_instruct.json`, `dataset_grounded.tar` and
            `images/`, named as the rows name them where that is one name for one image.

    Returns:
        How many `records` and `masks` were written.

    Raises:
        ValueError: where there are no rows, or `out` exists.
    """
    out, files = Path(out), sorted((Path(data) / "data").glob("*.parquet"))
    if not files:
        raise ValueError(f"{data} holds no data/*.parquet: no grounded data set")
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    aside = out.with_name(out.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / IMAGES).mkdir(parents=True)
    counts, writer = Counter[str](), _Writer(aside)
    with tarfile.open(aside / MASKS, "w") as tar, (aside / RECORDS).open("w") as file:
        for row in _rows(files):
            record, masks = writer.record(row, tar)
            file.write(("[\n" if not counts["records"] else ",\n") + json.dumps(record))
            counts.update(records=1, masks=masks)
        file.write("\n]\n" if counts["records"] else "[]\n")
    aside.rename(out)
    return dict(counts)


def _rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(64):
            yield from batch.to_pylist()


class _Writer:
    """Writes images and masks, each once, and gives the records that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: dict[str, str] = {}  # name -> hash of what it holds
        self.keys: Counter[str] = Counter()

    def record(self, row: Mapping[str, Any], tar: tarfile.TarFile) -> tuple[dict[str, Any], int]:
        """The LLaVA record of a row with its `segment`, and how many mask files it needed."""
        said = []
        for number, turn in enumerate(row["turns"]):
            tag = "<image>\n" if row["image"] and not number else ""
            said.append({"from": "human", "value": tag + turn["question"]})
            said.append({"from": "gpt", "value": turn["answer"]})
        record = {"id": row["id"], "conversations": said}
        if row["image"] is None:
            return record, 0
        folder = f"{row['record_key']}-{self.keys[row['record_key']]}"
        self.keys[row["record_key"]] += 1
        size, names, segment = stored_image(row["image"]).size, dict[str, str](), []
        for number, turn in enumerate(row["turns"], 1):
            prompts = []
            for one in (e for e in turn["expressions"] if e["mask"]):
                counts = one["mask"]["counts"]
                if counts not in names:  # expressions that share a mask share its file
                    names[counts] = f"{folder}/{len(names):04d}.pt"
                    _add(tar, names[counts], tensor_of(decode(one["mask"])))
                boxes = padded_boxes(one["boxes"], size)
                prompts.append({"prompt": one["text"], "mask_rel": names[counts], "bbox": boxes})
            if prompts:
                segment.append({"turn": number, "prompts": prompts})
        return {**record, "image": self._image(row["image"]), "segment": segment}, len(names)

    def _image(self, stored: Mapping[str, Any]) -> str:
        """The name of an image below `images/`, which is written the first time."""
        digest = hashlib.sha256(stored["bytes"]).hexdigest()
        path = PurePosixPath(stored["path"] or "")
        named = bool(path.name) and not path.is_absolute() and ".." not in path.parts
        name = str(path) if named else digest + path.suffix
        if self.images.setdefault(name, digest) != digest:  # two images, one name
            name = digest + path.suffix
            self.images[name] = digest
        target = self.folder / IMAGES / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stored["bytes"])
        return name


def tensor_of(mask: np.ndarray) -> bytes:
    """A mask [H, W] as the published files save it: float64 [24, 24] of 0..255, by `torch.save`."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(FULL * patch_coverage(mask, (GRID, GRID), "pad")), buffer)
    return buffer.getvalue()


def padded_boxes(boxes: list[list[float]], size: tuple[int, int]) -> list[dict[str, int]]:
    """Boxes in pixels of the original image as integer pixels of the padded frame of 336."""
    corners = np.rint(to_frame(boxes, size, "pad") * SIDE).astype(int)
    keys = ("xmin", "ymin", "xmax", "ymax")
    return [dict(zip(keys, box, strict=True)) for box in corners.tolist()]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"dataset_grounded/{name}")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
