"""`firsthand measure chair|pope|visual-reliance`: score prediction rows from a file.

firsthand measure chair --predictions rows.jsonl --objects objects.json --out results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from firsthand.metrics import chair, pope, results, visual_reliance
from firsthand.recipes.inputs import read_rows, write_rows


def _lexicon(args: argparse.Namespace) -> Any:
    if not args.nouns:
        return chair.COCO
    nouns = [n.strip() for n in Path(args.nouns).read_text("utf-8").splitlines() if n.strip()]
    return chair.lexicon_from_nouns(nouns)


def _chair(args: argparse.Namespace, rows: list[dict[str, Any]]) -> tuple[dict, dict, dict]:
    objects, lexicon = json.loads(Path(args.objects).read_text("utf-8")), _lexicon(args)
    scores = chair.score(rows, objects, lexicon, details=bool(args.details))
    if args.details:
        write_rows(args.details, scores.pop("captions"))
    about = {"variant": lexicon.name, "lexicon_hash": lexicon.hash}
    return scores, chair.pairs(rows, objects, lexicon), about


def _pope(args: argparse.Namespace, rows: list[dict[str, Any]]) -> tuple[dict, dict, dict]:
    return pope.score(rows, args.parser), pope.pairs(rows, args.parser), {"variant": args.parser}


def _reliance(args: argparse.Namespace, rows: list[dict[str, Any]]) -> tuple[dict, dict, dict]:
    made = f", {args.region} filled with {args.fill}" if args.data else ""
    about = {"variant": f"relative drop{made}"}
    return visual_reliance.score(rows), visual_reliance.pairs(rows), about


MEASURES = {"chair": _chair, "pope": _pope, "visual-reliance": _reliance}
NEEDED = {
    "chair": {"id", "image_id"},
    "pope": {"id", "image_id", "answer"},
    "visual-reliance": {"id", "image_id", "condition"},
}


def _check(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Raise ValueError naming the first row that lacks a field; failed rows need no prediction."""
    if not rows:
        raise ValueError(f"{args.predictions} holds no rows: there is nothing to score")
    for number, row in enumerate(rows, 1):
        needed = NEEDED[args.metric]
        if not {"error", "score"} & set(row):
            needed = needed | {"prediction"}
            needed |= {"answer"} if args.metric == "visual-reliance" else set()
        if missing := needed - set(row):
            raise ValueError(
                f"{args.predictions}, row {number} has no {', '.join(sorted(missing))}: "
                f"{args.metric} needs {', '.join(sorted(needed))}; this row has {sorted(row)}"
            )


def _groups(metric: str, name: str, rows: list[dict[str, Any]]) -> list[Any] | None:
    """The image of each row behind a figure; questions of one image are resampled together."""
    if metric == "visual-reliance":
        image_of = {r["id"]: r["image_id"] for r in rows}
        return [image_of[i] for i in visual_reliance.pair_ids(rows)[name]]
    return [r["image_id"] for r in rows] if metric == "pope" else None


def run(args: argparse.Namespace) -> int:
    """Print the scores and the table; write result rows where asked."""
    rows = read_rows(args.predictions)
    _check(args, rows)
    try:
        scores, pairs, about = MEASURES[args.metric](args, rows)
    except TypeError as error:  # a field of the wrong type, which the metric names
        raise ValueError(f"{args.predictions}: {error}") from error
    protocol = results.protocol([r["id"] for r in rows], decoding="as given", **about)
    found = []
    for name, columns in pairs.items():
        groups = _groups(args.metric, name, rows)
        found += results.result_rows(
            {name: columns}, arm=args.arm, split=args.split, protocol=protocol, groups=groups
        )
    for name, value in scores.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print("\n" + results.table(found))
    if args.out:
        results.write_results(args.out, found)
    return 0
