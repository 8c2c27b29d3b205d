"""`firsthand measure chair|pope|amber|mementos|mmhal|gqa|...`: score prediction rows from a file.

What it is: files in, figures with intervals out; each metric is a function of `metrics/`, wired
here to its options. What it is not: a metric, or a model runner (visual reliance asks before it
comes here). Two files are compared in `measure_compare`, results exported in `measure_export`.

    firsthand measure chair --predictions rows.jsonl --objects objects.json --out results.json
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from firsthand.metrics import amber, chair, gavie, mementos, mmhal, pope, results, visual_reliance
from firsthand.metrics.gavie import gqa
from firsthand.processing.endpoint import Endpoint
from firsthand.processing.local_model import LocalModel
from firsthand.recipes.inputs import read_rows, write_rows
from firsthand.recipes.judge import judge_of

Row = dict[str, Any]


class Measured(NamedTuple):
    """What a metric found in the rows of one file.

    `scores`: figures and counts, as printed. `pairs`: per figure its (numerator, denominator)
    columns, [rows, 2]. `ids`: per figure the row ids behind its columns, in their order. `about`:
    what the protocol says. `details`: a row each for `--details`. `image_of`: id -> image; answers
    about one image are resampled together.
    """

    scores: dict[str, Any]
    pairs: dict[str, np.ndarray]
    ids: dict[str, list[Any]]
    about: dict[str, Any]
    details: list[Row]
    image_of: dict[Any, Any]


Scorer = Callable[[list[Row]], Measured]


def lexicon_of(args: argparse.Namespace) -> chair.Lexicon:
    """The lexicon of --nouns, or COCO's, which stands for --variant's."""
    if not args.nouns:
        return chair.COCO
    nouns = [n.strip() for n in Path(args.nouns).read_text("utf-8").splitlines() if n.strip()]
    if not nouns:
        raise ValueError(f"{args.nouns} holds no noun: write one a line")
    return chair.lexicon_from_nouns(nouns)


def ground_truth(args: argparse.Namespace, lexicon: chair.Lexicon) -> Mapping[Any, list[str]]:
    """Ground truth from the one source that was given."""
    if bool(args.objects) == bool(args.coco_instances):
        raise ValueError(
            "chair needs ground truth, once: --objects FILE, or --coco-instances FILE... with "
            "--coco-captions FILE..."
        )
    if args.objects:
        if args.coco_captions:
            raise ValueError("--coco-captions goes with --coco-instances, not with --objects")
        return chair.read_objects(args.objects)
    captions = args.coco_captions or []
    return chair.objects_from_coco(args.coco_instances, captions, lexicon, args.variant)


def answered_by(args: argparse.Namespace) -> dict[str, Any]:
    """What the user says of how the answers were made, for the protocol."""
    return {"decoding": args.decoding, "max_new_tokens": args.max_new_tokens}


def _chair(args: argparse.Namespace) -> Scorer:
    if args.at_words is not None and args.at_recall is not None:
        raise ValueError("--at-words and --at-recall are two budgets: give one")
    lexicon = lexicon_of(args)
    options = {"lexicon": lexicon, "variant": args.variant}
    objects = ground_truth(args, lexicon)
    return partial(_score_captions, args, objects, options)


def _score_captions(
    args: argparse.Namespace, objects: Any, options: dict[str, Any], rows: list[Row]
) -> Measured:
    scores = chair.score(rows, objects, details=True, skip_bad=args.skip_bad, **options)
    captions, skipped = scores.pop("captions"), scores.pop("skipped", [])
    about = {"variant": scores["variant"], "lexicon_hash": scores["lexicon_hash"]}
    first = {row.get("id"): row for row in reversed(rows)}  # a second row of an id was skipped
    good = [first[caption["id"]] for caption in captions]
    if args.at_words is None and args.at_recall is None:
        pairs = chair.pairs(good, objects, **options)
    else:
        cut, pairs = _cut(args, good, objects, options)
        scores = cut | {name: scores[name] for name in ("n_errors", "n_skipped")}
        budget = f"first {args.at_words} words"
        if args.at_recall is not None:
            budget = f"cut at recall {args.at_recall:g}"
        about["variant"] += f", {budget}"
    ids = dict.fromkeys(pairs, [row["id"] for row in good])
    about |= answered_by(args) | {"truth_hash": _truth_hash(objects, good)}
    return Measured(scores, pairs, ids, about, captions + skipped, images_of(good))


def _truth_hash(objects: Mapping[Any, list[str]], rows: list[Row]) -> str:
    """Of what the scored images show: with and without COCO's captions, numbers do not compare."""
    names = {str(image_id): sorted(set(listed)) for image_id, listed in objects.items()}
    shown = {str(row["image_id"]): names.get(str(row["image_id"])) for row in rows}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:12]


def _cut(
    args: argparse.Namespace, rows: list[Row], objects: Any, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores and pairs of captions cut to a budget: in words, or by the recall they reach."""
    words = args.at_words
    if words is None:
        words = chair.at_recall(rows, objects, args.at_recall, **options)["budget_words"]
    whole = chair.at_length(rows, objects, words, **options)
    each = [chair.at_length([row], objects, words, **options) for row in rows]
    figures = [name for name, value in whole.items() if isinstance(value, float)]
    denominators = {"chair_i": "n_mentions", "recall": "n_objects", "obj_rec": "n_objects"}
    pairs = {}
    for name in figures:
        column = [_fraction(one[name], one[denominators.get(name, "n_captions")]) for one in each]
        pairs[name] = np.array(column, dtype=float).reshape(-1, 2)
    return whole, pairs


def _fraction(value: float, denominator: int) -> tuple[float, int]:
    """(numerator, denominator) of one caption's figure; an undefined one weighs nothing."""
    return (0.0, 0) if math.isnan(value) else (value * denominator, denominator)


def images_of(rows: Iterable[Row]) -> dict[Any, Any]:
    """id -> image of rows; an id of its own where a row names none."""
    return {row.get("id"): row.get("image_id", row.get("id")) for row in rows}


def _scored(
    args: argparse.Namespace,
    module: ModuleType,
    rows: list[Row],
    *truth: Any,
    listed: str,
    about: dict[str, Any],
    **options: Any,
) -> Measured:
    """What a metric's module finds; `listed` is where its score puts the details."""
    options |= {"skip_bad": args.skip_bad}
    scores = module.score(rows, *truth, details=True, **options)
    details = scores.pop(listed) + scores.pop("skipped", [])
    pairs = module.pairs(rows, *truth, **options)
    ids = module.pair_ids(rows, *truth, **options)
    return Measured(scores, pairs, ids, about | answered_by(args), details, images_of(rows))


def _pope(args: argparse.Namespace) -> Scorer:
    asked = pope.read_questions(args.questions) if args.questions else None

    def score(rows: list[Row]) -> Measured:
        if asked is not None:
            rows = pope.join(asked, rows, skip_bad=args.skip_bad or args.common)
        about = {"variant": args.parser}
        return _scored(args, pope, rows, listed="answers", about=about, parser=args.parser)

    return score


def _amber(args: argparse.Namespace) -> Scorer:
    if not args.amber_data:
        raise ValueError("amber needs --amber-data FOLDER: AMBER's annotations and word lists")
    truth = amber.read_truth(args.amber_data)
    about = {"variant": "amber_exact"}
    return lambda rows: _scored(args, amber, rows, truth, listed="responses", about=about)


def _mementos(args: argparse.Namespace) -> Scorer:
    if not args.references or not args.keywords:
        raise ValueError("mementos needs --references FILE and --keywords FILE, both JSON")
    truth = read_json(args.references), read_json(args.keywords)
    about = {"variant": "keywords"}

    def score(rows: list[Row]) -> Measured:
        with_hash = about | {"lexicon_hash": mementos.keywords_hash(truth[1])}
        return _scored(args, mementos, rows, *truth, listed="images", about=with_hash)

    return score


def _judged(metric: ModuleType, args: argparse.Namespace) -> Scorer:
    """The scorer of a metric whose rows a judge rates one by one: mmhal, gqa."""
    endpoint = endpoint_of(args)
    about = {"variant": f"judge {args.judge_model}, prompt {metric.PROMPT_HASH}"}

    def score(rows: list[Row]) -> Measured:
        failures: list[str] = []
        rated = metric.rate(rows, _judge(endpoint, metric, failures), args.skip_bad)
        if endpoint:
            print(f"requests: {endpoint.report()}")
        unread = [row["unparsed"] for row in rated if "unparsed" in row]
        if unread and all(row.get("error") or row.get("unparsed") for row in rated):
            why, who = (failures or unread)[0], args.endpoint or args.judge_model
            raise ValueError(f"{who} rated none of {len(unread)} answers: {why}")
        options = {"skip_bad": args.skip_bad}
        scores = metric.score(rated, **options)
        scores.pop("skipped", None)
        pairs, ids = metric.pairs(rated, **options), metric.pair_ids(rated, **options)
        return Measured(scores, pairs, ids, about | answered_by(args), rated, images_of(rows))

    return score


def endpoint_of(args: argparse.Namespace) -> Endpoint | LocalModel | None:
    """The judge: behind an endpoint (its key from the environment), or in this process.

    None where none was named.
    """
    beside = Path(args.out).parent / "requests" if args.out else None
    if not args.endpoint:
        return LocalModel(args.judge_model, args.cache or beside) if args.judge_model else None
    if not args.judge_model:
        raise ValueError("--endpoint needs --judge-model, the name of the judge there")
    if args.concurrency < 1 or args.timeout <= 0:
        raise ValueError("--concurrency must be 1 at least, and --timeout over 0")
    key = os.environ.get("OPENAI_API_KEY")
    return Endpoint(
        args.endpoint,
        args.judge_model,
        key,
        cache_dir=args.cache or beside,
        concurrency=args.concurrency,
        timeout=args.timeout,
        price=tuple(args.price),
    )


def _judge(
    endpoint: Endpoint | LocalModel | None, metric: ModuleType, failures: list[str]
) -> Callable[[list[Any]], Any]:
    if endpoint is not None:
        return judge_of(endpoint, metric.parse, failures, **metric.SETTINGS)

    def absent(requests: list[Any]) -> Any:
        raise ValueError(
            f"{len(requests)} answers have no rating: name a judge by --endpoint and --judge-model "
            "(or a model for this process by --judge-model alone)"
        )

    return absent


def _gavie(args: argparse.Namespace) -> Scorer:
    from firsthand.recipes.measure_gavie import scorer

    return scorer(args)


def _reliance(args: argparse.Namespace) -> Scorer:
    about: dict[str, Any] = {"variant": "relative drop", "decoding": "as given"}
    if args.data:
        about["variant"] += f", {args.region} filled with {args.fill}"
        about |= {"decoding": "greedy", "max_new_tokens": args.max_new_tokens, "seed": args.seed}

    def score(rows: list[Row]) -> Measured:
        scores, pairs = visual_reliance.score(rows), visual_reliance.pairs(rows)
        ids = visual_reliance.pair_ids(rows)
        return Measured(scores, pairs, ids, about, [], images_of(rows))

    return score


MEASURES: dict[str, Callable[[argparse.Namespace], Scorer]] = {
    "chair": _chair,
    "pope": _pope,
    "amber": _amber,
    "mementos": _mementos,
    "mmhal": partial(_judged, mmhal),
    "gqa": partial(_judged, gqa),
    "gavie": _gavie,
    "visual-reliance": _reliance,
}
NEEDED = {
    "chair": {"id", "image_id"},
    "pope": {"id", "image_id", "answer"},
    "amber": {"id"},
    "mementos": {"id", "image_id"},
    "mmhal": {"id", "question", "answer"},
    "gqa": {"id", "question", "answer"},
    "gavie": {"id", "image_id", "question"},
    "visual-reliance": {"id", "image_id", "condition"},
}


def read_json(path: str) -> Any:
    """The content of a JSON file, gzipped or not. Raises ValueError where it is none."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no JSON, or not whole: {error}") from error


def read_predictions(args: argparse.Namespace, metric: str, path: str) -> list[Row]:
    """Prediction rows, checked for the fields that the metric reads.

    Rows with an `error` need no prediction. With --skip-bad the metric itself counts bad rows.
    Raises ValueError naming the file and the first bad row or line.
    """
    if metric == "amber" and path.endswith((".json", ".json.gz")):
        return amber.read_responses(path)
    if metric == "mmhal" and path.endswith((".json", ".json.gz")):
        return mmhal.from_records(read_json(path))
    if metric == "gavie" and path.endswith((".json", ".json.gz")):
        return gavie.from_records(read_json(path))
    try:
        rows = read_rows(path)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not whole: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows: there is nothing to score")
    needed = {"id"} if metric == "pope" and args.questions else NEEDED[metric]
    for number, row in enumerate(rows, 1):
        if not args.skip_bad:
            _require_fields(f"{path}, row {number}", metric, needed, row)
        for field in ("id", "image_id"):
            if not isinstance(row.get(field, ""), (str, int)):
                kind = type(row[field]).__name__
                raise ValueError(f"{path}, row {number}: {field} is a {kind}, not text or a number")
    return rows


def _require_fields(where: str, metric: str, needed: set[str], row: Row) -> None:
    if not {"error", "score", "rating", "ratings", "correct"} & set(row):
        needed = needed | {"prediction"}
        needed |= {"answer"} if metric == "visual-reliance" else set()
    if missing := needed - set(row):
        raise ValueError(
            f"{where} has no {', '.join(sorted(missing))}: {metric} needs "
            f"{', '.join(sorted(needed))}; this row has {sorted(row)}"
        )


def scorer_of(args: argparse.Namespace, metric: str) -> Callable[[str, list[Row]], Measured]:
    """The metric with its options from `args`: (path, for messages; rows) -> what it finds.

    Raises ValueError for options and ground truth that the metric refuses; the scorer does, naming
    the path, for rows.
    """
    score = MEASURES[metric](args)

    def named(path: str, rows: list[Row]) -> Measured:
        try:
            return score(rows)
        except (TypeError, ValueError) as error:  # a field or its value, which the metric names
            raise ValueError(f"{path}: {error}") from error

    return named


def protocol_of(rows: Iterable[Row], found: Measured) -> dict[str, Any]:
    """The protocol of the scored ids; the prompt is known where all rows ask the same question."""
    asked = {row["question"] for row in rows if isinstance(row.get("question"), str)}
    prompt = asked.pop() if len(asked) == 1 else None
    ids = dict.fromkeys(i for listed in found.ids.values() for i in listed)
    return results.protocol(ids, prompt=prompt, **found.about)


def result_rows(args: argparse.Namespace, rows: list[Row], found: Measured) -> list[Row]:
    """Result rows of every figure, images resampled."""
    protocol = protocol_of(rows, found)
    made: list[Row] = []
    for name, columns in found.pairs.items():
        groups = [found.image_of[i] for i in found.ids[name]]
        made += results.result_rows(
            {name: columns}, arm=args.arm, split=args.split, protocol=protocol, groups=groups
        )
    return made


def print_scores(scores: Mapping[str, Any], n: int) -> None:
    """A line a figure; one that is undefined over the n rows says so."""
    undefined = f"nan (undefined: nothing to divide by in {n} rows)"
    for name, value in scores.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name}: {undefined if shown == 'nan' else shown}")


def run(args: argparse.Namespace) -> int:
    """Print the scores and the table; write result rows and details where asked."""
    rows = read_predictions(args, args.metric, args.predictions)
    found = scorer_of(args, args.metric)(args.predictions, rows)
    made = result_rows(args, rows, found)
    print_scores(found.scores, len(rows))
    print("\n" + results.table(made))
    if args.out:
        results.write_results(args.out, made)
    if args.details:
        write_rows(args.details, found.details)
    return 0
