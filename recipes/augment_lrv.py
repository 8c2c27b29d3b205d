"""`firsthand augment lrv`: dense captions or chart tables in, robust instruction data out.

What it is: LRV-Instruction's generation (arXiv 2306.14565) as a resumable stage: positive
instructions and three kinds of misleading ones for every image, from a model behind an endpoint or
by rule from the annotations alone, cleaned, as Parquet with a card. What it is not: a builder of
LRV's released files, or a training recipe (`train_instruction` reads OUT).

    firsthand augment lrv --data region_descriptions.json --images VG --out instructions \
        --generator endpoint --endpoint https://host/v1 --endpoint-model name
    load_dataset("instructions", split="train")

OUT/images has a row an image with all its instructions, and those images that could not be read,
with the reason, in `dropped`. OUT/data has a row an instruction, OUT/rejected those that cleaning
refused, with the reason. A run that was killed is finished by the same call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet

from firsthand.datasets_scripts.lrv import lrv
from firsthand.processing import instructions
from firsthand.processing.instructions import KINDS, MAX_WORDS, POSITIVE, Instruction
from firsthand.recipes import conversations, dense_captions, instruction_rules
from firsthand.recipes.inputs import asked_endpoint, stored_image
from firsthand.recipes.instruction_checks import Named, clean
from firsthand.recipes.stages import (
    DROPPED,
    Dropped,
    Row,
    Step,
    keep_plan,
    others_at_work,
    run_stages,
)

GENERATORS = ("endpoint", "rules")
ROW_GROUP = 1024  # instructions; the images of each are stored once
TEXT = pa.string()
STORED = pa.struct({"bytes": pa.binary(), "path": TEXT})
INSTRUCTION = {"question": TEXT, "answer": TEXT, "task": TEXT, "polarity": TEXT}
REJECTED = {**INSTRUCTION, "reason": TEXT}
IMAGES = pa.schema(
    {
        "image_id": TEXT,
        "image": STORED,
        "instructions": pa.list_(pa.struct(INSTRUCTION)),
        "rejected": pa.list_(pa.struct(REJECTED)),
    }
)


@dataclass(frozen=True)
class Wanted:
    """How many instructions of an image, and how long.

    Attributes:
        positives: positive ones; LRV asks for 20.
        negatives: of each of the three misleading kinds; LRV asks for 6.
        max_words: bound on an answer.
        seed: of the rules' draws.

    Raises:
        ValueError: where there would be none.
    """

    positives: int = 10
    negatives: int = 3
    max_words: int = MAX_WORDS
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.positives, self.negatives) < 0 or not self.positives + self.negatives:
            raise ValueError(
                f"positives is {self.positives}, negatives {self.negatives}: one of them must be "
                "above 0, and none below"
            )
        if self.max_words < 1:
            raise ValueError(f"max_words is {self.max_words}; it must be at least 1")

    def counts(self) -> dict[str, int]:
        """How many of each of KINDS, of those that are wanted."""
        every = {kind: self.positives if kind == POSITIVE else self.negatives for kind in KINDS}
        return {kind: count for kind, count in every.items() if count}


class ReadImage(Step):
    """A record -> its image, found and checked, and what is known of it."""

    columns: ClassVar[dict[str, pa.DataType]] = {"image_id": TEXT}

    def __init__(self, images: str | None) -> None:
        super().__init__()
        self.images = images

    def process(self, row: Row) -> Row:
        try:
            given = conversations.parse_record(row["record"], row["place"])
            known = dense_captions.read(given)
            stored = dense_captions.find_image(given, row["image"], self.images)
            size = stored_image(stored).size
        except (ValueError, OSError) as error:
            raise Dropped(str(error)) from None
        except (TypeError, KeyError, AttributeError) as error:
            raise Dropped(f"invalid record: {row['place']}: {error!r}") from None
        return {**row, "image_id": known["image_id"], "image": stored, "size": size, "known": known}


class WriteInstructions(Step):
    """Adds instructions by rule, from the annotations alone; an image without any is dropped."""

    def __init__(self, wanted: Wanted, vocabulary: Mapping[str, int]) -> None:
        super().__init__()
        self.wanted, self.vocabulary = wanted, vocabulary

    def process(self, row: Row) -> Row:
        wanted = self.wanted
        made = instruction_rules.generate(
            row["known"], row["size"], self.vocabulary, wanted.positives, wanted.negatives,
            wanted.seed,
        )  # fmt: skip
        if not made:
            raise Dropped("no instruction: the rules find nothing to ask in its annotations")
        return cleaned(row, made, [], wanted.max_words)


class AskInstructions(Step):
    """Adds the instructions that a model behind an endpoint writes: a request an image and kind.

    An image for which it answered no request is dropped with the reason. Where it answered none of
    a shard, the run stops with a ValueError, to be gone on with when the server is back.
    """

    def __init__(self, url: str, model: str, cache: str, wanted: Wanted) -> None:
        super().__init__()
        self.url, self.model, self.cache, self.wanted = url, model, cache, wanted

    def batch(self, rows: list[Row]) -> list[Row]:
        from firsthand.processing.endpoint import Endpoint

        key = os.environ.get("OPENAI_API_KEY")
        endpoint = Endpoint(self.url, self.model, api_key=key, cache_dir=self.cache)
        counts = self.wanted.counts()
        requests = [
            instructions.request(row["known"], kind, count, self.wanted.max_words)
            for row in rows
            for kind, count in counts.items()
        ]
        replies = endpoint.ask_many(
            requests, instructions.parse_reply, progress=False, **instructions.SETTINGS
        )
        if replies and all(reply.error and not reply.text for reply in replies):
            raise ValueError(
                f"{self.url} answered none of {len(replies)} requests: {replies[0].error}"
            )
        said = iter(replies)
        return [self._written(row, {kind: next(said) for kind in counts}) for row in rows]

    def _written(self, row: Row, replies: Mapping[str, Any]) -> Row:
        found: list[Instruction] = []
        rejected: list[Row] = []
        for kind, reply in replies.items():
            if reply.error:
                rejected.append({"task": kind, "reason": f"no reply: {reply.error}"})
            for entry in reply.value or ():
                try:
                    found.append(instructions.instruction(entry, kind))
                except ValueError as error:
                    text = json.dumps(entry, ensure_ascii=False)
                    rejected.append({"task": kind, "question": text, "reason": str(error)})
        if all(reply.error for reply in replies.values()):
            return {**row, DROPPED: f"{self.name}: {rejected[0]['reason']}"}
        return cleaned(row, found, rejected, self.wanted.max_words)


def cleaned(row: Row, found: list[Instruction], rejected: list[Row], max_words: int) -> Row:
    """The row with those of the instructions found that can be used, and the others' reasons."""
    known = row["known"]
    texts = [region["caption"] for region in known["regions"]] + known["captions"]
    texts += [f"{name} {value}" for line in known["table"] for name, value in line.items()]
    kept, refused = clean(found, Named(texts), max_words)
    return {**row, "instructions": kept, "rejected": rejected + refused}


def unfold(out: Path) -> None:
    """A row an instruction in `data` and `rejected`, out of those of an image in `images/data`.

    Each file is written aside and renamed; those that are there are left.
    """
    rejected = pa.schema({"image_id": TEXT, **REJECTED})
    for file in sorted((out / "images" / "data").glob("*.parquet")):
        if (out / "data" / file.name).exists():
            continue
        rows = parquet.read_table(file).to_pylist()
        _write(out / "rejected" / file.name, _each(rows, "rejected"), rejected)
        schema = lrv.features().arrow_schema
        _write(out / "data" / file.name, _each(rows, "instructions"), schema)


def _each(rows: list[Row], name: str) -> Iterator[Row]:
    for row in rows:
        for one in row[name]:
            yield {"image_id": row["image_id"], "image": row["image"], **one}


def _write(target: Path, rows: Iterator[Row], schema: pa.Schema) -> None:
    """Rows as Parquet in groups of ROW_GROUP; an image of several rows is stored once a group."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, listed = target.with_suffix(f".{os.getpid()}.aside"), list(rows)
    with parquet.ParquetWriter(aside, schema, dictionary_pagesize_limit=2**30) as writer:
        for start in range(0, len(listed), ROW_GROUP):
            part = listed[start : start + ROW_GROUP]
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
    aside.replace(target)


def tally(out: Path) -> tuple[Counter[str], str]:
    """Counts by polarity, task and reason, and the sha256 of all instructions in order."""
    found, content = Counter[str](), hashlib.sha256()
    for file in sorted((out / "data").glob("*.parquet")):
        for row in parquet.read_table(file, columns=["image_id", *INSTRUCTION]).to_pylist():
            content.update(json.dumps(row, ensure_ascii=False).encode())
            kind = f"{row['polarity']}: {row['task']}"
            found.update(["instructions", row["polarity"], kind])
    for file in sorted((out / "rejected").glob("*.parquet")):
        reasons = parquet.read_table(file, columns=["reason"])["reason"].to_pylist()
        found.update(f"rejected: {reason.split(':')[0]}" for reason in reasons)
    dropped = conversations.reasons(out / "images")
    return found + Counter({f"dropped image: {why}": n for why, n in dropped.items()}), (
        content.hexdigest()
    )


def write_card(out: Path, about: Mapping[str, Any]) -> Counter[str]:
    """README.md, so that `load_dataset` needs no script; returns the counts in it."""
    import yaml

    found, digest = tally(out)
    head = {
        "license": "other",
        "license_name": "that-of-the-source",
        "task_categories": ["image-text-to-text"],
        "tags": ["firsthand", "hallucination", "lrv-instruction"],
        "configs": [
            {
                "config_name": "default",
                "description": f"rows with sha256 {digest}",  # tells equal folder names apart
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
        "dataset_info": {"features": lrv.features()._to_yaml_list()},
    }
    lines = [f"- {key}: `{json.dumps(value)}`" for key, value in about.items()]
    rows = [f"| {name} | {n} |" for name, n in found.items()]
    body = CARD.format(about="\n".join(lines), counts="\n".join(rows))
    aside = out / "README.aside"
    aside.write_text(f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}", "utf-8")
    aside.replace(out / "README.md")
    return found


CARD = """# Robust instructions about images

One row an instruction: `image_id`, `image`, `question`, `answer`, `task`, `polarity`. Positive
ones can be answered from the image; negative ones build on something wrong (`task`: nonexistent
object, existent object, knowledge), and the answer corrects it, after LRV-Instruction (Liu et al.,
arXiv 2306.14565). Images and annotations keep the licence of their source.

{about}

| what | how many |
|---|---|
{counts}

```python
from datasets import load_dataset

row = load_dataset("path/to/this/folder", split="train")[0]
```
"""


def augment(
    data: str,
    out: str | Path,
    images: str | None = None,
    generator: str = "rules",
    endpoint: tuple[str, str] | None = None,
    captions: str | None = None,
    wanted: Wanted | None = None,
    split: str = "train",
    workers: int = 1,
) -> Counter[str]:
    """Put instructions about the images of `data` into `out`: Parquet in `out/data` and a card.

    Args:
        data: see `dense_captions`.
        out: a folder of its own.
        images: the folder of the images, where records do not carry them.
        generator: `rules` (offline, from annotations) or `endpoint`.
        endpoint: base URL and the model's name there; the key is read from OPENAI_API_KEY.
        captions: COCO's captions, beside instances.
        wanted: how many instructions an image.
        split: of the scenes or the Hub's data set.
        workers: shards of 256 images under way at once.

    Returns:
        The card's counts, and shards `left` where other processes are not done.

    Raises:
        ValueError: for settings that cannot work, data without records, or an `out` that holds a
            run with other settings.
    """
    out, wanted = Path(out), wanted or Wanted()
    if generator not in GENERATORS:
        raise ValueError(f"generator is {generator!r}; it must be one of {', '.join(GENERATORS)}")
    if (generator == "endpoint") != (endpoint is not None):
        raise ValueError(
            "an endpoint (--endpoint URL --endpoint-model NAME) goes with --generator endpoint, "
            "and only with it"
        )
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    about: dict[str, Any] = {
        "data": dense_captions.fingerprint(data, split),
        "generator": [generator, *(endpoint or ())],
        "wanted": asdict(wanted),
    }
    if captions:
        about["captions"] = conversations.fingerprint(captions, split)
    keep_plan(out / "state" / "about.json", about)
    source = dense_captions.write_source(data, out / "source", captions, split)
    write: Step
    if endpoint is None:
        write = WriteInstructions(wanted, vocabulary_of(source, out / "state" / "nouns.json"))
    else:
        write = AskInstructions(*endpoint, str(out / "state" / "requests"), wanted)
    done = run_stages(source, out / "images", [ReadImage(images), write], workers, kept=IMAGES)
    if left := done.get("left"):
        return Counter(left=left)
    unfold(out)
    return write_card(out, about)


def vocabulary_of(source: Path, kept: Path) -> dict[str, int]:
    """The nouns of all records with their counts, from `kept` if they were counted before."""
    if not kept.exists():
        counts = instruction_rules.count_nouns(_readable(source))
        aside = kept.with_suffix(f".{os.getpid()}.aside")
        aside.write_text(json.dumps(dict(sorted(counts.items()))), "utf-8")
        aside.replace(kept)
    return json.loads(kept.read_text("utf-8"))


def _readable(source: Path) -> Iterator[dict[str, Any]]:
    """What is known by those records that can be read."""
    for file in sorted(source.glob("*.parquet")):
        for batch in parquet.ParquetFile(file).iter_batches(columns=["record", "place"]):
            for row in batch.to_pylist():
                try:
                    given = conversations.parse_record(row["record"], row["place"])
                    yield dense_captions.read(given)
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # the stage drops it with the reason


def run(args: argparse.Namespace) -> int:
    """The verb: augment, and print what came out."""
    counts = augment(
        args.data,
        args.out,
        images=args.images,
        generator=args.generator,
        endpoint=asked_endpoint(args),
        captions=args.captions,
        wanted=Wanted(args.positives, args.negatives, args.max_words, args.seed),
        split=args.split,
        workers=args.workers,
    )
    if others_at_work(counts):
        return 0
    if not counts["instructions"]:
        why = ", ".join(f"{name}: {n}" for name, n in counts.items())
        raise ValueError(f"no instruction was kept ({why or 'none was made'}); see {args.out}")
    print(f"{counts['instructions']} instructions; see {Path(args.out) / 'README.md'}")
    for name, number in counts.items():
        print(f"  {name}: {number}")
    return 0
