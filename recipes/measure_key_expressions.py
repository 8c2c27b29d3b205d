"""`firsthand measure key-expressions`: how good are expressions and masks? A judge is asked.

What it is: FiVL's automatic evaluation of its data (arXiv 2412.14672) through any endpoint: is the
expression important, does the segment show it, is it gone where the segment was removed? What it is
not: the manual evaluation (`spaces/annotation`).

    firsthand measure key-expressions --data grounded/data --endpoint http://127.0.0.1:8000/v1 \
        --judge NAME --out results.json --details details.jsonl
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from firsthand.metrics import results
from firsthand.processing import perturb
from firsthand.processing.endpoint import Endpoint, Reply
from firsthand.processing.messages import json_object, message, render
from firsthand.recipes import grounded
from firsthand.recipes.inputs import write_rows

Item = dict[str, Any]  # id, image, question, answer, phrase, mask
MAX_TOKENS = 256  # of a reply
SETTINGS: dict[str, Any] = {
    "temperature": 0.0,
    "max_tokens": MAX_TOKENS,
    "response_format": {"type": "json_object"},
}
METRICS = {  # of each question: metric -> the value of a parsed reply
    "importance": {
        "importance": lambda reply: float(reply["degree"]),
        "important": lambda reply: float(reply["important"]),
    },
    "covers": {"segment_covers": lambda reply: float(reply["covers"])},
    "gone": {"segment_exhausts": lambda reply: float(not reply["visible"])},
}


def items(samples: Any, count: int | None, dropped: list[dict[str, Any]]) -> Iterator[Item]:
    """Every expression of every turn, with that turn's question; unusable ones go to `dropped`."""
    for sample in grounded.usable_samples(samples, count, dropped):
        for number, turn in enumerate(sample["turns"]):
            for place, one in enumerate(grounded.usable_expressions(sample, number, dropped)):
                yield {
                    "id": f"{sample['id']}/{number}/{place}",
                    "sample": str(sample["id"]),
                    "image": sample["image"].convert("RGB"),
                    "question": turn["question"],
                    "answer": turn["answer"],
                    "phrase": one.text,
                    "mask": one.mask,
                }


def importance_request(item: Item) -> list[dict[str, Any]]:
    """How much does the expression matter? The whole image, with question and answer."""
    text = {key: item[key] for key in ("question", "answer", "phrase")}
    return message(render("judge_importance", **text), item["image"])


def covers_request(item: Item) -> list[dict[str, Any]]:
    """Does the segment show the phrase? All else is black."""
    seen = perturb.perturb(item["image"], ~item["mask"], "black")
    return message(render("judge_covers", phrase=item["phrase"]), seen)


def gone_request(item: Item) -> list[dict[str, Any]]:
    """Is the phrase gone without the segment? The segment is black."""
    left = perturb.perturb(item["image"], item["mask"], "black")
    return message(render("judge_gone", phrase=item["phrase"]), left)


def parse_importance(text: str) -> dict[str, Any]:
    """{"reason", "degree" 0 to 10, "important"}; ValueError for anything else."""
    reply = json_object(text, {"reason": str, "degree": float, "important": bool})
    if not 0 <= reply["degree"] <= 10:
        raise ValueError(f"degree is {reply['degree']}, outside of 0..10")
    return reply


def parse_covers(text: str) -> dict[str, Any]:
    """{"reason", "covers"}; ValueError for anything else."""
    return json_object(text, {"reason": str, "covers": bool})


def parse_gone(text: str) -> dict[str, Any]:
    """{"reason", "visible"}; ValueError for anything else."""
    return json_object(text, {"reason": str, "visible": bool})


QUESTIONS: dict[str, tuple[Callable[[Item], list], Callable[[str], dict]]] = {
    "importance": (importance_request, parse_importance),
    "covers": (covers_request, parse_covers),
    "gone": (gone_request, parse_gone),
}


def judge(endpoint: Endpoint, asked: list[Item]) -> dict[str, list[Reply]]:
    """A reply for each item to each question; failures are replies with `error`."""
    return {
        name: endpoint.ask_many((request(item) for item in asked), parse, **SETTINGS)
        for name, (request, parse) in QUESTIONS.items()
    }


def score(asked: list[Item], replies: dict[str, list[Reply]], judge_name: str) -> list[dict]:
    """Result rows: importance (0 to 10), important, segment_covers, segment_exhausts (shares).

    Intervals are over samples. Unparsed and failed replies have no value and are not in n.
    """
    protocol = results.protocol(
        [item["id"] for item in asked],
        prompt=" | ".join(sorted(QUESTIONS)),
        decoding="temperature 0",
        max_new_tokens=MAX_TOKENS,
        variant=f"judge {judge_name}",
    )
    found = []
    for name, metrics in METRICS.items():
        kept = [i for i, reply in enumerate(replies[name]) if reply.error is None]
        groups = [asked[i]["sample"] for i in kept]
        for metric, value in metrics.items():
            values = [value(replies[name][i].value) for i in kept]
            interval = results.bootstrap(np.array(values), groups=groups)
            found.append(
                results.result_row(
                    metric, interval, len(kept), arm=judge_name, split="all", protocol=protocol
                )
            )
    return found


def details(asked: list[Item], replies: dict[str, list[Reply]]) -> list[dict[str, Any]]:
    """One row an expression, with every reply or its error."""
    kept = ("id", "question", "answer", "phrase")
    rows = []
    for i, item in enumerate(asked):
        said = {
            n: r[i].value if r[i].error is None else {"error": r[i].error}
            for n, r in replies.items()
        }
        rows.append({**{key: item[key] for key in kept}, **said})
    return rows


def run(args: argparse.Namespace) -> int:
    """The verb: ask, score, and print with the counts of unanswered questions."""
    from firsthand.recipes.train_vision_modeling import load_samples

    dropped: list[dict[str, Any]] = []
    samples = load_samples(None if args.data == "scenes" else args.data, args.split)
    asked = list(items(samples, args.count, dropped))
    if not asked:
        raise ValueError(f"{args.data} holds no usable expression; dropped: {dropped[:3]}")
    cache = Path(args.cache) if args.cache else Path(args.out).parent / "requests"
    endpoint = Endpoint(
        args.endpoint, args.judge, api_key=os.environ.get("OPENAI_API_KEY"), cache_dir=cache
    )
    replies = judge(endpoint, asked)
    if all(reply.error for answers in replies.values() for reply in answers):
        first = next(iter(replies.values()))[0].error
        raise ValueError(f"{args.endpoint} answered none of the questions: {first}")
    found = score(asked, replies, args.judge)
    results.write_results(args.out, found)
    if args.details:
        write_rows(args.details, details(asked, replies))
    print(results.table(found))
    for name, answers in replies.items():
        failed = sum(reply.error is not None for reply in answers)
        print(f"{name}: {len(answers) - failed} of {len(answers)} answers could be read")
    print(f"expressions left out: {len(dropped)}; requests: {endpoint.report()}")
    return 0
