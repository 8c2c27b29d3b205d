"""Grounded samples: conversations about images whose key expressions carry masks.

What it is: a self-contained builder for FiVL's kind of data (arXiv 2412.14672). It holds the
columns, a key for every record made of its content, and writes Parquet with a card. What it is not:
a source of expressions or masks (`firsthand augment fivl` makes those), or a reader of the
published tensors (`recipes/import_fivl.py`, which needs torch).

    from firsthand.datasets_scripts.fivl import fivl
    fivl.build("grounded", rows)
    load_dataset("grounded", split="train")
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from pycocotools import mask as coco_mask

SHARD_ROWS = 256
Row = dict[str, Any]


def features() -> Any:
    """The data set's `datasets.Features`.

    One row a conversation about one image (none: text only). An expression is the part of an
    answer between two characters; `phrase` is what was looked for in the image, another than `text`
    only where the answer is one word. Boxes x0, y0, x1, y1 and masks (COCO RLE) are in pixels of
    the image as it is shown, turned by its EXIF orientation. `score` is the segmenter's, 0..1.
    """
    from datasets import Features, Image, List, Value

    expression = {
        **{k: Value("string") for k in ("text", "phrase")},
        **{k: Value("int32") for k in ("char_start", "char_end")},
        "nouns": List(Value("string")),
        "boxes": List(List(Value("float32"))),
        "score": Value("float32"),
        "mask": {"size": List(Value("int32")), "counts": Value("string")},
    }
    asked = {k: Value("string") for k in ("question", "answer")}
    return Features(
        {
            **{k: Value("string") for k in ("id", "record_key")},
            "image": Image(),
            "source": Value("string"),
            "turns": List({**asked, "expressions": List(expression)}),
            "rejected": List(
                {"turn": Value("int32"), "text": Value("string"), "reason": Value("string")}
            ),
        }
    )


def record_key(image: bytes | None, turns: Iterable[Mapping[str, Any]]) -> str:
    """sha256 (64 hex digits) of an image file's bytes and the questions and answers about it.

    Records that share an id but not their conversation or image have different keys; ids, sources
    and expressions do not enter.
    """
    picture = hashlib.sha256(image).hexdigest() if image is not None else None
    content = [picture, [[turn["question"], turn["answer"]] for turn in turns]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def stored_image(image: Any) -> dict[str, Any] | None:
    """`{"bytes", "path"}` of a PIL image (as PNG), a path, or what is so stored already."""
    if image is None or isinstance(image, Mapping):
        return None if image is None else dict(image)
    if isinstance(image, PILImage.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    return {"bytes": Path(image).read_bytes(), "path": Path(image).name}


def checked(row: Mapping[str, Any]) -> Row:
    """A row with all columns, its image stored and its key computed.

    Raises:
        ValueError: naming the row, where it has no turns, or an expression lies outside of its
            answer, or a mask is empty or of another size than the image.
    """
    image = stored_image(row.get("image"))
    turns = [
        {**turn, "expressions": [{"phrase": e["text"], **e} for e in turn.get("expressions") or ()]}
        for turn in row["turns"]
    ]
    if not turns:
        raise ValueError(f"row {row['id']!r} has no turns: a sample needs a question and an answer")
    size = _size(image)
    for turn in turns:
        for expression in turn["expressions"]:
            if problem := _problem(expression, turn["answer"], size):
                raise ValueError(f"row {row['id']!r}, {expression['text']!r}: {problem}")
    return {
        "id": str(row["id"]),
        "record_key": record_key(image["bytes"] if image else None, turns),
        "image": image,
        "source": row.get("source") or "",
        "turns": turns,
        "rejected": list(row.get("rejected") or ()),
    }


def _size(image: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Width and height as shown."""
    if image is None:
        return None
    opened = PILImage.open(io.BytesIO(image["bytes"]))
    turned = opened.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
    return opened.size[::-1] if turned else opened.size


def _problem(
    expression: Mapping[str, Any], answer: str, size: tuple[int, int] | None
) -> str | None:
    """What is wrong with an expression; None where nothing is."""
    start, end, mask = expression["char_start"], expression["char_end"], expression["mask"]
    if answer[start:end] != expression["text"]:
        return f"characters {start} to {end} of its answer are {answer[start:end]!r}"
    if mask is None:
        return None
    if size is None:
        return "it has a mask and its row no image"
    if tuple(mask["size"]) != size[::-1]:
        return f"its mask is {tuple(mask['size'])}, its image {size[::-1]} (H, W)"
    rle = {"size": list(mask["size"]), "counts": mask["counts"].encode()}
    return None if coco_mask.area(rle) else "its mask is empty"


def build(
    out: str | Path, rows: Iterable[Mapping[str, Any]], split: str = "train", about: str = ""
) -> Path:
    """Write grounded rows as Parquet (256 rows a file) with a card; returns the folder.

    Args:
        out: the folder to write; it must not hold data yet.
        rows: `id`, `turns` (question, answer, expressions) and, if any, `image` (PIL image, path or
            stored bytes), `source` and `rejected`.
        split: the name that `load_dataset` knows the rows by.
        about: a sentence or table on where the rows came from, for the card.

    Raises:
        ValueError: for a folder that holds data, no rows, or a row that breaks the contract.
    """
    from datasets import Dataset

    folder, aside = Path(out), Path(out) / "data.aside"
    if (folder / "data").exists():
        raise ValueError(f"{folder} holds data already: choose another folder, or remove it")
    shutil.rmtree(aside, ignore_errors=True)  # of a build that was stopped
    aside.mkdir(parents=True)
    for number, chunk in enumerate(_chunks(rows)):
        data = Dataset.from_list(chunk, features=features())
        data.to_parquet(aside / f"{number:05d}.parquet")
    if not any(aside.iterdir()):
        raise ValueError("there are no rows to build a data set of")
    aside.rename(folder / "data")
    write_card(folder, split, about)
    return folder


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Row]]:
    whole = (checked(row) for row in rows)
    while chunk := list(islice(whole, SHARD_ROWS)):
        yield chunk


def summary(rows: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], str]:
    """How much rows hold (of turns, of expressions, of each reason for rejecting), and their hash.

    The hash (64 hex digits) is of keys, turns and rejected expressions, in order.
    """
    found, content = Counter[str](), hashlib.sha256()
    for row in rows:
        kept = [row["record_key"], row["turns"], row["rejected"]]
        content.update(json.dumps(kept, ensure_ascii=False).encode())
        expressions = [e for turn in row["turns"] for e in turn["expressions"]]
        found["rows"] += 1
        found["turns"] += len(row["turns"])
        found["expressions"] += len(expressions)
        found["expressions with a mask"] += sum(e["mask"] is not None for e in expressions)
        for rejected in row["rejected"]:
            found[f"rejected: {rejected['reason'].split(':')[0]}"] += 1
    return found, content.hexdigest()


def write_card(
    folder: Path, split: str = "train", about: str = "", dropped: Mapping[str, int] | None = None
) -> None:
    """README.md with `configs` and `dataset_info`, so that `load_dataset` needs no script.

    It counts what is in `data/`; `dropped` says how many records went no further, by reason. The
    config's description holds the rows' hash: `datasets` tells two local folders of one name apart
    by their configs alone, and would serve the first from its cache for the second.
    """
    import yaml
    from datasets import load_dataset

    files = [str(p) for p in sorted((folder / "data").glob("*.parquet"))]
    columns = ["record_key", "turns", "rejected"]
    stored = load_dataset(
        "parquet", data_files=files, split="train", columns=columns, streaming=True
    )
    found, digest = summary(stored)
    head = {
        "license": "other",
        "license_name": "that-of-the-source",
        "task_categories": ["image-text-to-text"],
        "tags": ["firsthand", "hallucination", "grounding", "fivl"],
        "configs": [
            {
                "config_name": "default",
                "description": f"rows with sha256 {digest}",
                "data_files": [{"split": split, "path": "data/*.parquet"}],
            }
        ],
        "dataset_info": {"features": features()._to_yaml_list()},
    }
    gone = {f"dropped: {reason}": n for reason, n in (dropped or {}).items()}
    table = "\n".join(f"| {name} | {n} |" for name, n in {**found, **gone}.items())
    body = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    body = body.replace("{counts}", table).replace("{about}", about.strip())
    text = "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + body
    aside = folder / "README.aside"
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / "README.md")
