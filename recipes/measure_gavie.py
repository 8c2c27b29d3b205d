"""`firsthand measure gavie`: marks for relevance and accuracy, by a judge or, offline, by rule.

What it is: prediction rows joined with dense captions (Visual Genome's, LRV's or the demo scenes'),
marked through an endpoint, alone or several models' answers in one prompt; or marked by
`rule_judge` from the scenes' annotations. What it is not: the metric (`metrics/gavie`).

    firsthand measure gavie --predictions rows.jsonl --regions vg_annotation.json \
        --endpoint http://127.0.0.1:8000/v1 --judge-model NAME --samples 3 --out results.json
    firsthand measure gavie --predictions rows.jsonl --regions scenes --offline
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import gavie, results
from firsthand.metrics.gavie import rules
from firsthand.recipes import measure
from firsthand.recipes.demo_data import SCENES, load_scenes
from firsthand.recipes.inputs import write_rows
from firsthand.recipes.judge import judge_of
from firsthand.recipes.measure import Measured, Row, Scorer

Regions = Mapping[str, list[Row]]
TOKENS = 256  # of a reply, for each answer in the prompt
COLORS = "red orange yellow green blue purple pink brown black white gray".split()
SCENE_WORDS = rules.Words(
    scenes.NOUNS,
    {"color": COLORS, "position": list(scenes.POSITIONS)},
    {"where": "position", "colour": "color"},
)


def committed_scenes() -> list[Row]:
    """The scenes of every committed split; their ids are the image ids of rows about them."""
    splits = sorted(folder.name for folder in SCENES.iterdir() if folder.is_dir())
    return [row for split in splits for row in load_scenes(split)]


def scene_regions(rows: list[Row]) -> Regions:
    """Dense captions of scenes: a phrase and its box [x, y, width, height] an object."""
    return {
        row["id"]: [_region(one) for one in scenes.dense_captions(row["objects"])] for row in rows
    }


def _region(one: Row) -> Row:
    left, top, right, bottom = one["box"]
    return {"caption": one["caption"], "bbox": [left, top, right - left, bottom - top]}


def scene_objects(rows: list[Row]) -> dict[str, list[Row]]:
    """What `rule_judge` looks up; a colour that the scene does not name is unknown."""
    return {row["id"]: [_object(one) for one in row["objects"]] for row in rows}


def _object(one: Row) -> Row:
    color = {"color": [one["color"]]} if one["color"] else {}
    return {"noun": one["noun"], "properties": {"position": [one["position"]], **color}}


def read_regions(source: str) -> Regions:
    """Image id -> dense captions: LRV's `vg_annotation.json`, or Visual Genome's own file.

    Args:
        source: a JSON file `{image_id: [{caption, bbox}]}` or `region_descriptions.json`, a list of
            `{id, regions: [{phrase, x, y, width, height}]}`; or `scenes`, the demo's.

    Raises:
        ValueError: a file that is neither.
    """
    if source == "scenes":
        return scene_regions(committed_scenes())
    found = measure.read_json(source)
    if isinstance(found, dict):
        return found
    try:
        return {
            str(image.get("id", image.get("image_id"))): [
                {"caption": r["phrase"], "bbox": [r["x"], r["y"], r["width"], r["height"]]}
                for r in image["regions"]
            ]
            for image in found
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} holds neither {{image_id: [{{caption, bbox}}]}} nor Visual Genome's "
            f"region_descriptions: {error!r}"
        ) from None


def with_regions(rows: list[Row], known: Regions, skip_bad: bool = False) -> list[Row]:
    """Rows to be judged with the `regions` of their image; their own stay.

    Raises ValueError naming the first row without any; with `skip_bad` it gets an `error`.
    """
    joined = []
    for row in rows:
        if not {"regions", "ratings", "error"} & set(row):
            found = known.get(str(row.get("image_id")))
            reason = f"row {row.get('id')!r}: no regions of the image {row.get('image_id')!r}"
            if not found and not skip_bad:
                raise ValueError(f"{reason}; give them by --regions FILE")
            row = {**row, "regions": found} if found else {**row, "error": reason}
        joined.append(row)
    return joined


class Judging:
    """The judge of --endpoint, asked --samples times; why requests failed is kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.endpoint = measure.endpoint_of(args)
        if args.samples < 1:
            raise ValueError(f"--samples {args.samples}: ask at least once")
        self.samples = args.samples
        self.failures: list[str] = []

    def judges(self, answers: int = 1) -> list[Any]:
        """A function a sample, for prompts of so many answers."""
        if self.endpoint is None:
            return [_no_judge]
        parse = partial(gavie.parse, answers=answers)
        settings = gavie.SETTINGS | {"max_tokens": TOKENS * max(2, answers)}
        if self.samples == 1:
            return [judge_of(self.endpoint, parse, self.failures, **settings)]
        settings |= {"temperature": 1.0}
        return [
            judge_of(self.endpoint, parse, self.failures, **settings, seed=seed)
            for seed in range(self.samples)
        ]

    def report(self, rated: list[Row]) -> None:
        """Print counts and cost. Raises ValueError where nothing at all could be read."""
        if self.endpoint is None:
            return
        print(f"requests: {self.endpoint.report()}")
        unread = [row["unparsed"] for row in rated if "unparsed" in row]
        if unread and not any("ratings" in row for row in rated):
            why = self.failures[0] if self.failures else unread[0]
            raise ValueError(
                f"{self.endpoint.base_url} marked none of {len(unread)} answers: {why}"
            )
        for reason, times in Counter(self.failures).most_common(3):
            print(f"failed {times} times: {reason}")


def _no_judge(requests: list[Any]) -> Any:
    raise ValueError(
        f"{len(requests)} answers have no marks: name a judge by --endpoint and --judge-model (or "
        "a model for this process by --judge-model alone), or "
        "mark answers about the demo's scenes by rule: --regions scenes --offline"
    )


def scorer(args: argparse.Namespace) -> Scorer:
    """Marks each answer by itself: what `measure gavie` and `measure compare` score by."""
    if args.offline:
        return _offline(args)
    judging = Judging(args)
    known = read_regions(args.regions) if args.regions else {}

    def score(rows: list[Row]) -> Measured:
        done = all({"ratings", "unparsed", "error"} & set(row) for row in rows)
        if judging.endpoint is None and done:
            return _measured(args, rows, _about(args, "single", rows))
        rows = with_regions(rows, known, args.skip_bad)
        rated = gavie.rate(rows, judging.judges(), args.bbox_format, args.skip_bad)
        judging.report(rated)
        return _measured(args, rated, _about(args, "single", rated))

    return score


def _offline(args: argparse.Namespace) -> Scorer:
    if args.regions != "scenes" or args.judge_model or args.samples != 1:
        raise ValueError(
            "--offline marks by rule, from the demo's annotations, and always alike: give it "
            "--regions scenes, and no --judge-model or --samples"
        )
    objects = scene_objects(committed_scenes())

    def score(rows: list[Row]) -> Measured:
        rated = rules.rate(rows, objects, SCENE_WORDS, args.skip_bad)
        asked = {str(row.get("image_id")) for row in rated}
        shown = {image_id: objects[image_id] for image_id in sorted(asked & objects.keys())}
        about = {"variant": "rule_judge", "truth_hash": _digest(shown)}
        return _measured(args, rated, about | measure.answered_by(args))

    return score


def _measured(args: argparse.Namespace, rated: list[Row], about: dict[str, Any]) -> Measured:
    options = {"skip_bad": args.skip_bad}
    scores = gavie.score(rated, **options)
    scores.pop("skipped", None)
    pairs, ids = gavie.pairs(rated, **options), gavie.pair_ids(rated, **options)
    details = [{k: v for k, v in row.items() if k != "regions"} for row in rated]
    return Measured(scores, pairs, ids, about, details, measure.images_of(rated))


def _about(args: argparse.Namespace, mode: str, rated: list[Row]) -> dict[str, Any]:
    """What the protocol says of the judge."""
    heat = 0 if args.samples == 1 else 1
    judge = (
        f"judge {args.judge_model}, prompt {gavie.PROMPT_HASH}, {mode}, boxes {args.bbox_format}"
    )
    told = f"{judge}, {args.samples} samples at temperature {heat}"
    shown = {str(row["image_id"]): row["regions"] for row in rated if "regions" in row}
    about = {"variant": told if args.judge_model else "marks as given"} | measure.answered_by(args)
    return about | ({"truth_hash": _digest(shown)} if shown else {})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def run(args: argparse.Namespace) -> int:
    """The verb; in joint mode for all files at once."""
    if args.mode == "single":
        if args.others:
            raise ValueError("--others goes with --mode joint")
        return measure.run(args)
    if not args.others or args.offline:
        raise ValueError("--mode joint needs --others FILE..., and a judge by --judge-model")
    arms = _arms(args)
    judging = Judging(args)
    known = read_regions(args.regions) if args.regions else {}
    rows = {
        arm: with_regions(measure.read_predictions(args, "gavie", path), known, args.skip_bad)
        for arm, path in arms.items()
    }
    judges = judging.judges(len(rows))
    rated = gavie.rate_jointly(rows, judges, args.bbox_format, args.seed, args.skip_bad)
    judging.report([row for listed in rated.values() for row in listed])
    mode = f"joint of {', '.join(sorted(arms))}"
    made: list[Row] = []
    details: list[Row] = []
    for arm, listed in rated.items():
        found = _measured(args, listed, _about(args, mode, listed) | {"seed": args.seed})
        of_arm = argparse.Namespace(**{**vars(args), "arm": arm})
        made += measure.result_rows(of_arm, listed, found)
        details += [{**row, "arm": arm} for row in found.details]
        print(f"{arm}:")
        measure.print_scores(found.scores, len(listed))
    print("\n" + results.table(made))
    if args.out:
        results.write_results(args.out, made)
    if args.details:
        write_rows(args.details, details)
    return 0


def _arms(args: argparse.Namespace) -> dict[str, str]:
    """Arm -> file: --arm for --predictions, the file's name for each of --others."""
    names = [Path(path).name.removesuffix(".gz").removesuffix(".jsonl") for path in args.others]
    arms = dict(zip([args.arm, *names], [args.predictions, *args.others], strict=True))
    if len(arms) != len(args.others) + 1:
        raise ValueError(f"two files have one name: --arm {args.arm} and {', '.join(names)}")
    return arms
