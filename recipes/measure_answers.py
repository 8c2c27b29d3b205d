"""`firsthand measure answers`: questions about images in, prediction rows of a model out.

What it is: batched answers of a model in this process or behind an endpoint, each image encoded
once, every answer on disk as soon as it is given: a run that was killed is finished by the same
call. What it is not: a metric; `firsthand measure pope --predictions OUT` and its like score.

    firsthand measure answers --data asked.jsonl --images folder --model org/model --out out.jsonl

A row has `question` and `image` (a path below --images, or the image itself in a data set). Where
the data have none, `id` is the row's number and `image_id` the image's path or hash; other columns
are carried along (`answer`, `task`). A row that cannot be asked comes out with `error` in place of
`prediction`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from firsthand.recipes import conversations
from firsthand.recipes.answering import Answerer, Request
from firsthand.recipes.augment_responses import spoken
from firsthand.recipes.inputs import asked_endpoint, stored_image, write_rows
from firsthand.recipes.stages import keep_plan

WINDOW = 256  # rows whose image files are held at a time

Row = dict[str, Any]


def rows_of(data: str, split: str = "train") -> Iterator[tuple[Row, Any]]:
    """Rows of a JSONL file, Parquet or the Hub, each with the image that it carries, if any.

    A line that is no JSON object becomes a row with `error`.

    Raises:
        FileNotFoundError: for what looks like a file and is none.
    """
    conversations.fingerprint(data, split)  # raises for a file that is not there
    for record in conversations.rows(data, split):
        try:
            yield conversations.parse_record(record["record"], record["place"]), record["image"]
        except ValueError as error:
            yield {"id": record["place"], "error": str(error)}, None


def requests_of(
    rows: Iterable[tuple[Row, Any]], images: str | None, seen: set[str]
) -> Iterator[tuple[Row, Request | None]]:
    """Each row as it goes out, and its request; a row that cannot be asked has `error` and none.

    `seen` holds the ids that earlier rows have.
    """
    for row, carried in rows:
        if "error" in row:
            yield row, None
            continue
        try:
            request = _request(row, carried, images)
            if str(row["id"]) in seen:
                raise ValueError(f"the id {row['id']!r} occurs twice")
        except (ValueError, OSError) as error:
            yield {**row, "error": str(error)}, None
            continue
        seen.add(str(row["id"]))
        yield {"image_id": row.get("image") or request.image_key[:16], **row}, request


def _request(row: Row, carried: Any, images: str | None) -> Request:
    """Raises ValueError or OSError, saying why the row cannot be asked."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    stored = conversations.find_image(row, carried, images)
    if stored is None:
        raise ValueError("the row has no image")
    stored_image(stored)
    return Request(stored, hashlib.sha256(stored["bytes"]).hexdigest(), question)


def answer(
    data: str,
    out: str | Path,
    answerer: Answerer,
    images: str | None = None,
    split: str = "train",
) -> dict[str, int]:
    """Write prediction rows to `out`, in the order of the data, aside and renamed.

    Args:
        data: JSONL (.gz), Parquet (a file or folder), or a Hub id.
        out: a JSONL file.
        answerer: who is asked.
        images: the folder that image paths start from.
        split: of the Hub's data set.

    Returns:
        How many rows have a `prediction` and how many an `error`.

    Raises:
        ValueError: where no row could be answered, the answers that are kept are of other weights,
            or an endpoint answers nothing at all; then the same call goes on later.
    """
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    known = ("model", "endpoint", "weights")
    about = {name: value for name, value in spoken(answerer).items() if name in known}
    keep_plan(Path(answerer.cache) / "state" / "about.json", about)
    made: list[Row] = []
    asked = requests_of(_numbered(rows_of(data, split)), images, set())
    while window := list(islice(asked, WINDOW)):
        requests = [request for _, request in window if request is not None]
        replies = iter(answerer.ask(requests) if requests else ())
        for row, request in window:
            made.append(row if request is None else _said(row, next(replies)))
    errors = sum("error" in row for row in made)
    if errors == len(made):
        first = made[0]["error"] if made else "there are none"
        raise ValueError(f"no row of {data} could be answered; the first: {first}")
    write_rows(out, made)
    return {"predictions": len(made) - errors, "errors": errors}


def _numbered(rows: Iterable[tuple[Row, Any]]) -> Iterator[tuple[Row, Any]]:
    for number, (row, image) in enumerate(rows):
        yield (row if row.get("id") is not None else {**row, "id": str(number)}), image


def _said(row: Row, reply: Any) -> Row:
    outcome = {"error": reply.error} if reply.error else {"prediction": reply.text}
    return {**{k: v for k, v in row.items() if k != "image"}, **outcome}


def answerer_of(args: argparse.Namespace) -> Answerer:
    """Who is asked, greedily, from the command line. Raises ValueError for half an endpoint."""
    return Answerer(
        args.cache or f"{args.out}.answers",
        model=args.model,
        endpoint=asked_endpoint(args),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )


def run(args: argparse.Namespace) -> int:
    """The verb: answer, and print how many rows came out."""
    counts = answer(args.data, args.out, answerer_of(args), args.images, args.split)
    print(f"{counts['predictions']} predictions, {counts['errors']} errors; see {args.out}")
    return 0
