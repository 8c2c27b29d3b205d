"""Instructions about images, positive and negative: LRV's releases joined with your images.

What it is: a self-contained builder for the released JSON layouts of LRV-Instruction (arXiv
2306.14565): the instruction files (`{"annotations": [...]}` as in `filter_cap.json`, or a bare
list), the chart file, and `evaluation_set.json`; as Parquet with a card, with a config for each
ratio of positive to negative rows. What it is not: a maker of instructions, or a download; images
stay yours.

    python -m firsthand.datasets_scripts.lrv.lrv instructions --source filter_cap.json \
        --images image --out lrv --ratio 1:1 2:1
    load_dataset("lrv", "1-1", split="train")
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

SHARD_ROWS = 256
KINDS = {  # kind -> the card's title
    "instructions": "Instructions about images, positive and negative",
    "charts": "Instructions about charts",
    "evaluation": "Questions about images, for GAVIE",
}
SUFFIXES = ("", ".jpg", ".png", ".jpeg")
QUESTIONS, ANSWERS = ("question", "instruction"), ("answer", "answer_gt", "gt")
NEGATIVE = "negative"
Row = dict[str, Any]


def features() -> Any:
    """The columns, as `datasets.Features`."""
    from datasets import Features, Image, Value

    text = Value("string")
    names = ("image_id", "image", "question", "answer", "task", "polarity")
    return Features({name: Image() if name == "image" else text for name in names})


def records(source: str | Path) -> list[Any]:
    """The records of a JSON file, gzipped or not: a list, or the list under `annotations`.

    Raises:
        ValueError: naming the file, where it is no JSON or holds something else.
    """
    path = Path(source)
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not JSON, or not whole: {error}") from None
    if isinstance(found, Mapping):
        found = found.get("annotations")
    if not isinstance(found, list):
        raise ValueError(f"{path} holds neither a list of records nor one under `annotations`")
    return found


def find_image(image_id: str, folder: Path) -> Path:
    """The image of an id or file name, below `folder`.

    Raises:
        ValueError: when there is none, or the path leads out of the folder.
    """
    for suffix in SUFFIXES:
        candidate = folder / f"{image_id}{suffix}"
        inside = candidate.resolve().is_relative_to(folder.resolve())
        if inside and candidate.is_file():
            return candidate
    raise ValueError(f"missing image: {image_id}")


def fault_of(path: Path) -> str | None:
    """Why Pillow cannot read an image, if so."""
    try:
        PILImage.open(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # decoders raise nearly anything
        return f"corrupt image: {path.name}: {error}"
    return None


def instruction_row(record: Mapping[str, Any], folder: Path, kind: str) -> Row:
    """A row of a record, its `image` the path of the file.

    The stray line breaks of early releases are removed.

    Raises:
        ValueError: no question, no answer where the kind has some, or no image.
    """
    image_id = _text(record, ("image_id", "image"))
    question, answer = _text(record, QUESTIONS), _text(record, ANSWERS)
    if not image_id:
        raise ValueError("no image is named")
    if not question:
        raise ValueError("the question is empty")
    if not answer and kind != "evaluation":
        raise ValueError("the answer is empty")
    path = find_image(image_id, folder)
    task = _text(record, ("task",))
    polarity = "" if not task else NEGATIVE if task.lower() == NEGATIVE else "positive"
    return {
        "image_id": image_id,
        "image": path,
        "question": question,
        "answer": answer,
        "task": task,
        "polarity": polarity,
    }


def _text(record: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of these fields that the record has, stripped; "" for none."""
    value = next((record[name] for name in names if record.get(name) is not None), "")
    if not isinstance(value, (str, int)):
        raise ValueError(f"no text: {next(iter(names))} is a {type(value).__name__}")
    return str(value).strip()


def read_ratio(text: str) -> tuple[int, int]:
    """(positive, negative) of "2:1"; "1:0" and "0:1" keep one kind alone.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not int(found[1]) + int(found[2]):
        raise ValueError(f"the ratio is {text!r}: write positive:negative, as in 1:1 or 2:1")
    return int(found[1]), int(found[2])


def choose(rows: list[Row], ratio: str, seed: int = 0) -> list[Row]:
    """As many rows as can be had at a ratio of positive to negative, in their order.

    Of the kind that is too many some are drawn by `seed`. Unlabelled rows are left out.

    Raises:
        ValueError: no ratio, or rows of a kind that it needs are missing.
    """
    parts = dict(zip(("positive", NEGATIVE), read_ratio(ratio), strict=True))
    of = {kind: [i for i, r in enumerate(rows) if r["polarity"] == kind] for kind in parts}
    for kind, part in parts.items():
        if part and not of[kind]:
            raise ValueError(f"no row is {kind}: the ratio {ratio} cannot be had")
    times = min(len(of[kind]) // part for kind, part in parts.items() if part)
    if not times:
        raise ValueError(f"too few rows for the ratio {ratio}: {[len(v) for v in of.values()]}")
    rng = random.Random(seed)
    kept = {i for kind, part in parts.items() for i in rng.sample(of[kind], times * part)}
    return [row for i, row in enumerate(rows) if i in kept]


def build(
    kind: str,
    source: str | Path,
    images: str | Path,
    out: str | Path,
    ratios: Iterable[str] = (),
    split: str = "train",
    seed: int = 0,
) -> dict[str, int]:
    """Write a config `all` and one a ratio (Parquet, 256 rows a file), card and `dropped.jsonl`.

    Args:
        kind: "instructions", "charts" or "evaluation" (which has no answers).
        source: the annotations, .json (.gz).
        images: the folder of `<image_id>.jpg`, or of the files that charts name.
        out: a folder that holds no data yet.
        ratios: positive:negative, as in "2:1"; its config is called `2-1`.
        split: the name that `load_dataset` knows the rows by.
        seed: of the rows that are left out for a ratio.

    Returns:
        Rows `kept`, and `dropped: <reason>` for those that cannot be used.

    Raises:
        ValueError: for another kind, a ratio that cannot be had, an `out` with data, or a source
            without a usable record.
        FileNotFoundError: when there is no such folder of images.
    """
    folder, aside, ratios = Path(out), Path(out) / "data.aside", list(ratios)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    for ratio in ratios:
        read_ratio(ratio)
    if not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    if (folder / "data").exists():
        raise ValueError(f"{folder} holds data already: choose another folder, or remove it")
    dropped: list[Row] = []
    rows = list(_rows(kind, records(source), Path(images), dropped))
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
    (folder / "dropped.jsonl").write_text(lines, "utf-8")
    if not rows:
        first = dropped[0]["reason"] if dropped else "it is empty"
        raise ValueError(f"{source} holds no record that can be used: {first}")
    configs = {"all": rows} | {
        ratio.replace(":", "-"): choose(rows, ratio, seed) for ratio in ratios
    }
    shutil.rmtree(aside, ignore_errors=True)
    for name, chosen in configs.items():
        _write(chosen, aside / name)
    aside.rename(folder / "data")
    reasons = Counter(f"dropped: {row['reason'].split(':')[0]}" for row in dropped)
    counts = {"kept": len(rows), **reasons}
    write_card(folder, kind, split, counts, configs, Path(source).name)
    return counts


def _rows(kind: str, found: Iterable[Any], folder: Path, dropped: list[Row]) -> Iterator[Row]:
    """Rows of the records that can be used, each question of an image once; the rest is kept."""
    from tqdm.auto import tqdm

    seen: set[tuple[str, str, str]] = set()
    faults: dict[Path, str | None] = {}  # many records share an image, which is read once
    for number, record in enumerate(tqdm(found, desc="joining", unit="record"), 1):
        try:
            if not isinstance(record, Mapping):
                raise ValueError("it is no object {...}")
            row = instruction_row(record, folder, kind)
            if row["image"] not in faults:
                faults[row["image"]] = fault_of(row["image"])
            if fault := faults[row["image"]]:
                raise ValueError(fault)
            key = (row["image_id"], row["question"], row["answer"])
            if key in seen:
                raise ValueError("it occurs twice")
            seen.add(key)
            yield row
        except ValueError as error:
            name = record.get("image_id") if isinstance(record, Mapping) else None
            dropped.append({"record": number, "image_id": name, "reason": str(error)})


def _write(rows: list[Row], folder: Path) -> None:
    from datasets import Dataset

    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
        shard = [
            {**row, "image": {"bytes": row["image"].read_bytes(), "path": row["image"].name}}
            for row in rows[start : start + SHARD_ROWS]
        ]
        Dataset.from_list(shard, features=features()).to_parquet(folder / f"{number:05d}.parquet")


def write_card(
    folder: Path,
    kind: str,
    split: str,
    counts: Mapping[str, int],
    configs: Mapping[str, list[Row]],
    source: str,
) -> None:
    """README.md with `configs` and `dataset_info`, so that `load_dataset` needs no script."""
    import yaml

    schema = features()._to_yaml_list()
    polarities = {name: Counter(row["polarity"] for row in rows) for name, rows in configs.items()}
    head = {
        "license": "other",
        "license_name": "that-of-the-source",
        "task_categories": ["image-text-to-text"],
        "tags": ["firsthand", "hallucination", "lrv", kind],
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": split, "path": f"data/{name}/*.parquet"}],
                "default": name == "all",
            }
            for name in configs
        ],
        "dataset_info": [{"config_name": name, "features": schema} for name in configs],
    }
    lines = [
        f"| `{name}` | {n['positive']} | {n[NEGATIVE]} | {n['']} |"
        for name, n in polarities.items()
    ]
    filled = {
        "title": KINDS[kind],
        "source": source,
        "counts": "\n".join(f"| {name} | {n} |" for name, n in counts.items()),
        "configs": "\n".join(lines),
        "first": list(configs)[-1],
        "split": split,
    }
    body = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    for name, text in filled.items():
        body = body.replace("{" + name + "}", text)
    text = "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + body
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Join LRV's annotations with a folder of images.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--source", required=True, help="LRV's .json of annotations")
    parser.add_argument("--images", required=True, help="folder of the images that they name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--ratio", nargs="+", default=[], help="positive:negative; a config each")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0, help="of what is left out for a ratio")
    args = parser.parse_args(argv)
    try:
        counts = build(
            args.kind, args.source, args.images, args.out, args.ratio, args.split, args.seed
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, number in counts.items():
        print(f"{name}: {number}")


if __name__ == "__main__":
    main()
