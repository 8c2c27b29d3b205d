"""Conversations about images as users have them, read into one source of records for the stages.

What it is: LLaVA-format JSON and JSONL, and whatever `datasets` reads, written as Parquet with one
record a row (its JSON, where it stood, its image if it carries one), so that a bad record is a row
like any other; and the readers of one record's image and turns. What it is not: a check of images
or a step of its own (see `augment_fivl.ReadRecord`).

    source = write_source("conversations.json", "out/source")
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from firsthand.recipes.stages import DROPPED, SHARD_ROWS

JSON_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
IMAGE_TAG = "<image>"
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant", "model")
FILE_ROWS = 32 * SHARD_ROWS
SOURCE = pa.schema(
    {
        "place": pa.string(),  # where the record stood: line 7, record 3, row 12
        "record": pa.string(),  # its JSON, without an image that it carries
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
)


def fingerprint(data: str, split: str) -> dict[str, Any]:
    """What tells one input from another: a file's sha256, a folder's files and sizes, or the name.

    Raises:
        FileNotFoundError: for what looks like a file and is none.
    """
    path = Path(data)
    if path.is_file():
        with path.open("rb") as file:
            return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if path.is_dir():
        sizes = [p.stat().st_size for p in sorted(path.rglob("*.parquet"))]
        return {"folder": path.name, "split": split, "files": len(sizes), "bytes": sum(sizes)}
    if path.suffix in (".json", ".jsonl", ".parquet", ".gz") or path.is_absolute():
        raise FileNotFoundError(f"{data}: no such file or folder of conversations")
    return {"name": data, "split": split}


def write_source(data: str, out: str | Path, split: str = "train") -> Path:
    """The records of `data` as Parquet in `out`, written aside and renamed; kept where it is there.

    Raises:
        ValueError: where there are no records, or a .json file is not a list.
    """
    return write_records(rows(data, split), data, out)


def rows(data: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Rows of the schema SOURCE, of a file or data set as `write_source` takes it."""
    if data.endswith(JSON_FILES):
        return _json_rows(Path(data))
    return dataset_rows(data, split)


def write_records(found: Iterator[dict[str, Any]], data: str, out: str | Path) -> Path:
    """Rows of the schema SOURCE, read from `data`, as Parquet; as `write_source` does."""
    out, aside = Path(out), Path(out).with_name("source.aside")
    if out.exists():
        return out
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    number = 0
    while chunk := list(islice(found, FILE_ROWS)):
        table = pa.Table.from_pylist(chunk, schema=SOURCE)
        parquet.write_table(table, aside / f"{number:05d}.parquet", row_group_size=SHARD_ROWS)
        number += 1
    if not number:
        raise ValueError(f"{data} holds no records: there is nothing to augment")
    aside.rename(out)
    return out


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One row a record of a JSON list, or a line of JSONL as it stands: steps judge it."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        if ".jsonl" in path.name or not _starts_a_list(file):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield {"place": f"line {number}", "record": line.strip(), "image": None}
            return
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON list of records: {error}") from None
    for number, record in enumerate(records, 1):
        yield {"place": f"record {number}", "record": json.dumps(record), "image": None}


def _starts_a_list(file: Any) -> bool:
    first = file.read(1)
    while first and (first.isspace() or first == "\ufeff"):
        first = file.read(1)
    file.seek(0)
    return first == "["


def dataset_rows(data: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file or folder, or of the Hub, images as they are stored."""
    from datasets import Image, load_dataset

    path = Path(data)
    if path.is_file():
        rows = load_dataset("parquet", data_files=data, split="train")
    else:
        rows = load_dataset(data, split=split)
    if "image" in rows.column_names:
        rows = rows.cast_column("image", Image(decode=False))
    for number, row in enumerate(rows, 1):
        image = row.pop("image", None)
        text = json.dumps(row, default=str)
        yield {"place": f"row {number}", "record": text, "image": image}


def parse_record(text: str, place: str) -> dict[str, Any]:
    """A record's JSON object. Raises ValueError naming where it stood."""
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"invalid text: {place} holds half a surrogate pair") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {place}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"invalid record: {place} is {type(record).__name__}, not an object")
    return record


def find_image(
    record: Mapping[str, Any], carried: Mapping[str, Any] | None, folder: str | None
) -> dict[str, Any] | None:
    """A record's image file as `{bytes, path}`: carried, or named and found in the folder.

    None for a record without an image.

    Raises:
        ValueError: where its text has a place for an image and it names none, it names several or
            one outside of the folder, or no folder was given.
        FileNotFoundError: where the folder lacks it.
    """
    if carried is not None and (carried["bytes"] or carried["path"]):
        name = PurePosixPath(carried["path"] or "").name or None
        data = carried["bytes"] or _bytes_of(Path(carried["path"]))
        return {"bytes": data, "path": name}
    name = record.get("image")
    if isinstance(name, list):
        if len(name) > 1:
            raise ValueError(f"several images: {len(name)}; a grounded sample has one")
        name = name[0] if name else None
    if not name:
        if IMAGE_TAG in json.dumps(record, ensure_ascii=False):
            raise ValueError(f"no image named: the text has {IMAGE_TAG} and the record no image")
        return None
    if not isinstance(name, str) or folder is None:
        raise ValueError(f"no image folder: the record names {name!r}; give --images FOLDER")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"image outside of the folder: {name}; name it from {folder}")
    return {"bytes": _bytes_of(Path(folder) / path), "path": name}


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"missing image: {path}")
    return path.read_bytes()


def turns_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Questions, without the image's tag, and answers of `conversations`, `messages` or `turns`,
    or of `question` and `answer`.

    Raises:
        ValueError: where there is none of these, roles do not alternate, or an answer is empty.
    """
    if isinstance(said := record.get("conversations") or record.get("messages"), list):
        turns = _alternating([_message(one) for one in said])
    elif isinstance(given := record.get("turns") or [record], list):
        turns = [(t.get("question"), t.get("answer")) for t in given if isinstance(t, dict)]
    else:
        turns = []
    if not any(any(pair) for pair in turns):
        raise ValueError("no conversation: the record has no questions and answers")
    for number, pair in enumerate(turns, 1):
        if not all(isinstance(text, str) for text in pair) or not str(pair[1]).strip():
            raise ValueError(f"no answer: turn {number} lacks its question or its answer")
    return [{"question": untagged(str(q)), "answer": str(a)} for q, a in turns]


def untagged(question: str) -> str:
    """A question without `<image>` and the line break beside it."""
    for tag in (f"{IMAGE_TAG}\n", f"\n{IMAGE_TAG}", IMAGE_TAG):
        question = question.replace(tag, "")
    return question.strip()


def _message(one: Any) -> tuple[Any, Any]:
    """Role and text, in LLaVA's or the chat template's words."""
    if not isinstance(one, dict):
        raise ValueError("no conversation: a message is not an object")
    return one.get("from", one.get("role")), one.get("value", one.get("content"))


def _alternating(said: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(question, answer) pairs; what comes before the first question (a system prompt) is left."""
    first = next((i for i, (role, _) in enumerate(said) if role in ASKS), len(said))
    said = said[first:]
    for number, (role, _) in enumerate(said):
        if role not in (ANSWERS if number % 2 else ASKS):
            raise ValueError(f"roles do not alternate: message {first + number + 1} is {role!r}'s")
    if len(said) % 2:
        raise ValueError("no answer: the conversation ends with a question")
    return [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]


def reasons(out: Path) -> dict[str, int]:
    """How many records of a run in `out` were dropped, by kind of reason."""
    found: dict[str, int] = {}
    for file in sorted((out / "dropped").glob("*.parquet")):
        for reason in parquet.read_table(file, columns=[DROPPED])[DROPPED].to_pylist():
            kind = reason.split(": ")[1]  # after the step's name
            found[kind] = found.get(kind, 0) + 1
    return found
