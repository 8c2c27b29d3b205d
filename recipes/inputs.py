"""What users hand to the command line: images, rows and models, checked before anything expensive.

image = open_image("photo.jpg"); model, processor = load_model("org/model")
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 40_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_image(path: str | Path) -> Image.Image:
    """An RGB image of at most MAX_PIXELS pixels, turned as its EXIF orientation says.

    Raises FileNotFoundError, or ValueError for what is no image, is broken or is too large (judged
    by its header, before its pixels are decoded).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(path)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{path} has {width} x {height} pixels, over {MAX_PIXELS:,}: scale it down first"
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not an image that Pillow can read ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def stored_image(stored: Mapping[str, Any]) -> Image.Image:
    """The image of a stored file: RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: for what is no image, is broken, or has more than MAX_PIXELS pixels.
    """
    name, data = stored["path"] or "the image", stored["bytes"]
    try:
        image = Image.open(io.BytesIO(data))
        size = image.size
        if size[0] * size[1] <= MAX_PIXELS:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise ValueError(f"corrupt image: {name}: {error}") from None
    raise ValueError(f"image too large: {name}: {size[0]} x {size[1]}, over {MAX_PIXELS:,} pixels")


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, sorted. Raises where there is no folder or no image in it."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return found


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file. Raises ValueError naming the first bad line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of rows")
    opener = gzip.open if str(path).endswith(".gz") else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"{path}, line {number} is not a JSON object {{...}}")
    return rows


def load_rows(data: str, split: str) -> Any:
    """A data set: Parquet on disk (a file, or a folder's files), or the split of one of the Hub.

    Of a folder with `data` in it only that is read, not what was dropped and lies beside it; and of
    several configs in `data` that called `all`, which holds the rows of the others.
    """
    from datasets import load_dataset

    path = Path(data)
    if not path.exists():
        return load_dataset(data, split=split)
    places = (path / "data" / "all", path / "data", path)
    folder = next((place for place in places if place.is_dir()), path)
    files = [str(p) for p in sorted(folder.rglob("*.parquet"))] if path.is_dir() else [data]
    return load_dataset("parquet", data_files=files, split="train")


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, written aside and renamed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".aside")
    aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    aside.rename(target)


def asked_endpoint(args: argparse.Namespace) -> tuple[str, str] | None:
    """`--endpoint` and `--endpoint-model`; None where neither is given.

    Raises ValueError for half of them.
    """
    asked = (args.endpoint, args.endpoint_model)
    if any(asked) and not all(asked):
        raise ValueError("--endpoint and --endpoint-model go together: give both")
    return asked if all(asked) else None


def usable_rows(
    rows: Any, problem: Callable[[Any], str | None]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Numbers of the rows that can be used, and number and reason of those that cannot.

    Args:
        rows: anything with a length and rows by number; reading one may raise.
        problem: a row -> why it cannot be used, None where it can.

    Raises:
        ValueError: when none can.
    """
    from tqdm.auto import tqdm

    kept, skipped = [], []
    for number in tqdm(range(len(rows)), desc="checking rows", unit="row"):
        try:
            reason = problem(rows[number])
        except Exception as error:  # decoders raise nearly anything
            reason = f"the row cannot be read: {type(error).__name__}: {error}"
        if reason is None:
            kept.append(number)
        else:
            skipped.append({"row": number, "reason": reason})
    if not kept:
        raise ValueError(f"no row can be used; the first: {skipped[:1]}")
    return kept, skipped


def keep_skipped(folder: str | Path, skipped: list[dict[str, Any]], total: int) -> None:
    """Write the reasons of rows that are left out to `skipped.jsonl`, and say so."""
    if skipped:
        write_rows(Path(folder) / "skipped.jsonl", skipped)
        print(f"{len(skipped)} of {total} rows are left out: see skipped.jsonl in {folder}")


def open_checkpoint(name: str, **layout: Any) -> tuple[Any, Any]:
    """A supported model in eval mode and its processor, without running code of the checkpoint.

    Backbones that transformers lacks load with the classes here. `layout` goes to the model's
    `from_pretrained`: its `device_map`.

    Raises OSError, ValueError or KeyError where it is no checkpoint, or of another family.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from firsthand.modeling.backbones import backbone_classes
    from firsthand.modeling.families import family_of

    ours = backbone_classes(name)
    if ours is None:
        family_of(AutoConfig.from_pretrained(name))
    loader, processor = ours or (AutoModelForImageTextToText, AutoProcessor)
    model = loader.from_pretrained(name, dtype="auto", **layout).eval()
    # without its config, a tokenizer asks whether it may run the checkpoint's code to read one
    return model, processor.from_pretrained(name, config=model.config)


def load_model(name: str | None, place: bool = True) -> tuple[Any, Any]:
    """A supported model in eval mode and its processor; None loads the demo model.

    Where there are accelerators and `place` is set, `device_map="auto"` lays it out on them;
    trainers, which place it themselves, want it on the CPU.

    Raises ValueError where the name is no checkpoint, or its family is not supported.
    """
    import torch

    placed = place and torch.accelerator.is_available()
    if name is None:
        from firsthand.recipes.demo_model import load_demo_model

        model, processor = load_demo_model()
        return model.to(torch.accelerator.current_accelerator()) if placed else model, processor
    try:
        model, processor = open_checkpoint(name, **{"device_map": "auto"} if placed else {})
        return model.requires_grad_(False), processor
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"cannot load the model {name!r}: {first}") from None
