"""Prompts and preference pairs about images: published annotations joined with your images.

What it is: a self-contained builder for SIMA's prompts (`{image, text, ground_truth}`),
LLaVA-Instruct conversations, and the preference records of POVID, CSR and SIMA (`conversations`
and `rejected_conversations`), as Parquet with a card. What it is not: a maker of answers or
verdicts, or a download; images stay yours.

    python -m firsthand.datasets_scripts.sima.sima preferences --source pairs.json \
        --images train2014 --out pairs
    accelerate launch -m firsthand.recipes.train_preference --data pairs ...
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

SHARD_ROWS = 256
TAG = "<image>"
KINDS = ("prompts", "preferences")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
COLUMNS = {
    "prompts": "`images`, `question`, `ground_truth` (the data set's own answer), `prompt_key` (a "
    "hash of image and question)",
    "preferences": "`images`, `prompt`, `chosen`, `rejected` (TRL's conversational format), "
    "`chosen_source`, `verdict`, `critic` (empty where the source does not say), `prompt_key` (a "
    "hash of image and prompt)",
}
Row = dict[str, Any]


def features(kind: str) -> Any:
    """The columns of `prompts` or `preferences`, as `datasets.Features`."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    if kind == "prompts":
        return Features(
            {"images": List(Image()), "question": text, "ground_truth": text, "prompt_key": text}
        )
    turns = List({"role": text, "content": text})
    said = {name: turns for name in ("prompt", "chosen", "rejected")}
    about = {name: text for name in ("chosen_source", "verdict", "critic", "prompt_key")}
    return Features({"images": List(Image()), **said, **about})


def records(source: str | Path) -> Iterator[Any]:
    """Records of a .json list or a .jsonl file, either of them gzipped.

    Raises:
        ValueError: naming the file, and the line of a JSONL file, that is no JSON.
    """
    path = Path(source)
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        yield {"error": f"line {number} is not JSON: {error}"}
            return
        try:
            found = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a list of records")
    yield from found


def find_image(name: Any, folder: Path) -> Path:
    """The image that a record names: below `folder` by its path, else by its file name.

    Raises:
        ValueError: when there is none, or the path leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        raise ValueError("no image is named")
    for candidate in (folder / name, folder / Path(name).name):
        inside = candidate.resolve().is_relative_to(folder.resolve())
        if inside and candidate.is_file():
            return candidate
    raise ValueError(f"missing image: {name}")


def stored(path: Path) -> dict[str, Any]:
    """The image's file, as it is; ValueError where Pillow cannot read it."""
    data = path.read_bytes()
    try:
        PILImage.open(io.BytesIO(data)).load()
    except Exception as error:  # decoders raise nearly anything
        raise ValueError(f"corrupt image: {path.name}: {error}") from None
    return {"bytes": data, "path": path.name}


def messages(conversation: Any) -> list[dict[str, str]]:
    """A conversation as `{role, content}`, without the image's tag.

    Raises:
        ValueError: when it does not alternate between user and assistant, user first, or an entry
            is empty.
    """
    found = []
    for number, one in enumerate(conversation or ()):
        role = ROLES.get(one.get("from") or one.get("role"))
        text = str(one.get("value") or one.get("content") or "").replace(TAG, "").strip()
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(f"turn {number + 1} is of {role!r}: user and assistant must alternate")
        if not text:
            raise ValueError(f"turn {number + 1} is empty")
        found.append({"role": role, "content": text})
    if len(found) < 2:
        raise ValueError("no conversation: a question and an answer are needed")
    return found


def key_of(image: bytes, text: Any) -> str:
    """64 hex digits: sha256 of an image file and what is asked about it."""
    picture = hashlib.sha256(image).hexdigest()
    return hashlib.sha256(json.dumps([picture, text], ensure_ascii=False).encode()).hexdigest()


def prompt_row(record: Mapping[str, Any], folder: Path) -> Row:
    """A prompt of `{image, text, ground_truth}` or of a conversation's first turn."""
    if "text" in record:
        question = str(record["text"]).replace(TAG, "").strip()
        truth = str(record.get("ground_truth") or "")
    else:
        said = messages(record.get("conversations") or record.get("messages"))
        question, truth = said[0]["content"], said[1]["content"]
    if not question:
        raise ValueError("the question is empty")
    image = stored(find_image(record.get("image"), folder))
    key = key_of(image["bytes"], question)
    return {"images": [image], "question": question, "ground_truth": truth, "prompt_key": key}


def preference_row(record: Mapping[str, Any], folder: Path) -> Row:
    """A pair of `conversations` (its last answer is chosen) and `rejected_conversations`."""
    chosen = messages(record.get("conversations"))
    rejected = messages(record.get("rejected_conversations"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected do not answer the same prompt")
    if chosen[-1] == rejected[-1]:
        raise ValueError("both answers are the same")
    image = stored(find_image(record.get("image"), folder))
    return {
        "images": [image],
        "prompt": chosen[:-1],
        "chosen": chosen[-1:],
        "rejected": rejected[-1:],
        "chosen_source": str(record.get("chosen_source") or ""),
        "verdict": str(record.get("verdict") or ""),
        "critic": str(record.get("critic") or ""),
        "prompt_key": key_of(image["bytes"], chosen[:-1]),
    }


def build(
    kind: str, source: str | Path, images: str | Path, out: str | Path, split: str = "train"
) -> dict[str, int]:
    """Write `out/data` (Parquet, 256 rows a file), a card, and `out/dropped.jsonl`.

    Args:
        kind: "prompts" or "preferences".
        source: the annotations, .json or .jsonl (.gz).
        images: the folder of the images that they name.
        out: a folder that holds no data yet.
        split: the name that `load_dataset` knows the rows by.

    Returns:
        Rows `kept`, and `dropped: <reason>` for those that cannot be used.

    Raises:
        ValueError: for another kind, an `out` with data, or a source without a usable record.
        FileNotFoundError: when there is no such folder of images.
    """
    from datasets import Dataset

    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    folder, aside = Path(out), Path(out) / "data.aside"
    if not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    if (folder / "data").exists():
        raise ValueError(f"{folder} holds data already: choose another folder, or remove it")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dropped: list[Row] = []
    rows, kept = _rows(kind, records(source), Path(images), dropped), 0
    for number, chunk in enumerate(_chunks(rows)):
        Dataset.from_list(chunk, features=features(kind)).to_parquet(
            aside / f"{number:05d}.parquet"
        )
        kept += len(chunk)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
    (folder / "dropped.jsonl").write_text(lines, "utf-8")
    if not kept:
        first = dropped[0]["reason"] if dropped else "it is empty"
        raise ValueError(f"{source} holds no record that can be used: {first}")
    aside.rename(folder / "data")
    reasons = Counter(f"dropped: {row['reason'].split(':')[0]}" for row in dropped)
    counts = {"kept": kept, **reasons}
    write_card(folder, kind, split, counts, Path(source).name)
    return counts


def _rows(kind: str, found: Iterable[Any], folder: Path, dropped: list[Row]) -> Iterator[Row]:
    make = {"prompts": prompt_row, "preferences": preference_row}[kind]
    for number, record in enumerate(found, 1):
        try:
            if not isinstance(record, Mapping):
                raise ValueError("it is no object {...}")
            if "error" in record:
                raise ValueError(record["error"])
            yield make(record, folder)
        except (ValueError, AttributeError) as error:
            name = record.get("id") if isinstance(record, Mapping) else None
            dropped.append({"record": number, "id": name, "reason": str(error)})


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, SHARD_ROWS)):
        yield chunk


def write_card(
    folder: Path,
    kind: str,
    split: str,
    counts: Mapping[str, int],
    source: str,
    columns: Any = None,
    about: str = "",
) -> None:
    """README.md with `configs` and `dataset_info`, so that `load_dataset` needs no script.

    Args:
        folder: with the rows in `data`.
        kind, split, counts, source: as in `build`.
        columns: the rows' features, where they have more than those of the kind.
        about: how they were made.
    """
    import yaml

    head = {
        "license": "other",
        "license_name": "that-of-the-source",
        "task_categories": ["image-text-to-text"],
        "tags": ["firsthand", "hallucination", "sima", kind],
        "configs": [
            {
                "config_name": "default",
                "description": f"{kind} of {source}, {counts['kept']} rows",
                "data_files": [{"split": split, "path": "data/*.parquet"}],
            }
        ],
        "dataset_info": {"features": (columns or features(kind))._to_yaml_list()},
    }
    body = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    filled = {
        "title": {
            "prompts": "Prompts about images",
            "preferences": "Preferred and rejected answers",
        }[kind],
        "about": about or f"Built by firsthand from `{source}`.",
        "counts": "\n".join(f"| {name} | {n} |" for name, n in counts.items()),
        "columns": f"Columns: {COLUMNS[kind]}.",
    }
    for name, text in filled.items():
        body = body.replace("{" + name + "}", text)
    text = "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + body
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Join annotations with a folder of images.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--source", required=True, help=".json or .jsonl of annotations")
    parser.add_argument("--images", required=True, help="folder of the images that they name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--split", default="train")
    args = parser.parse_args(argv)
    try:
        counts = build(args.kind, args.source, args.images, args.out, args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, number in counts.items():
        print(f"{name}: {number}")


if __name__ == "__main__":
    main()
