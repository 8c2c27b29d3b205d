"""Trained arms of the demo model against each other on scenes: answers measured, with intervals.

What it is: the demo model with any adapters (a seed each), asked for captions, POPE's questions and
visual reliance on the same scenes, and the paired differences of arms. What it is not: a training
recipe.

    python -m firsthand.recipes.study --arm chair=out0,out1,out2 --arm stock=stock0 \
        --compare chair-plain --split test --split test_unseen --out docs/results/preference.csv

The arm `plain` is the demo model as it is. A finished part is kept in the folder `--work`; the same
call goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import chair, pope, results, visual_reliance
from firsthand.processing.generation import generate_answers
from firsthand.processing.overlays import bars
from firsthand.recipes import demo_data, demo_measure, demo_model, demo_rows
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS, write_csv

Measured = dict[str, dict[str, list]]  # metric -> columns [n][2] and groups [n]
Measure = Callable[[Any, Any, list[dict], int], Measured]  # model, processor, scenes, seed


def answer_measures(model: Any, processor: Any, rows: list[dict], seed: int) -> Measured:
    """What one model answers about some scenes: numerators, denominators, the scene of each."""
    asked = demo_rows.caption_rows(rows) + demo_rows.existence_rows(rows, seed)
    asked += demo_rows.reliance_rows(rows, seed)
    said = list(generate_answers(model, processor, asked, MAX_NEW_TOKENS, batch_size=32))
    found = caption_measures(said, rows) | pope_measures(said)
    masked = [a for a in said if a.get("condition")]
    plain = [a for a in masked if a["condition"] == "plain"]
    columns = visual_reliance.pairs(masked)["visual_reliance"]
    return found | {"visual_reliance": measured(columns, plain)}


def caption_measures(said: list[dict], rows: list[dict], placed: bool = True) -> Measured:
    """CHAIR's figures of the captions among some answers and, where `placed`, of their places."""
    captions = demo_measure.captions(said)
    pairs = dict(chair.pairs(captions, demo_rows.objects_of(rows), demo_measure.LEXICON))
    if placed:
        objects = {r["id"]: r["objects"] for r in rows}
        pairs["position_accuracy"] = chair.position_pairs(captions, objects, demo_measure.LEXICON)
    return {name: measured(columns, captions) for name, columns in pairs.items()}


def pope_measures(said: list[dict]) -> Measured:
    """POPE's figures of the existence questions among some answers."""
    polled = [a for a in said if a.get("strategy")]
    pairs = pope.pairs(polled)
    return {name: measured(pairs[name], polled) for name in demo_measure.KEPT}


def measured(columns: Any, rows: list[dict]) -> dict[str, list]:
    """A metric's columns, and the image behind each of its rows."""
    listed = np.asarray(columns, dtype=float).tolist()
    return {"columns": listed, "groups": [r["image_id"] for r in rows]}


def load_arm(adapter: str | None) -> tuple[Any, Any]:
    """The demo model, with a trained adapter merged into it where one is given."""
    model, processor = demo_model.load_demo_model()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()  # type: ignore[arg-type]
    return model, processor


def pooled(parts: list[Measured]) -> Measured:
    """The rows of several seeds under one another: a scene's rows of all seeds are one group."""
    return {
        name: {key: [x for part in parts for x in part[name][key]] for key in ("columns", "groups")}
        for name in parts[0]
    }


def rows_of(found: Measured, arm: str, split: str, protocol: dict) -> list[dict]:
    """Result rows with intervals over scenes."""
    return [
        results.result_row(
            name,
            results.bootstrap(part["columns"], results.ratio, groups=part["groups"]),
            len(part["columns"]),
            arm=arm,
            split=split,
            protocol=protocol,
        )
        for name, part in found.items()
    ]


def differences(
    a: list[Measured], b: list[Measured], arm: str, split: str, protocol: dict
) -> list[dict]:
    """Result rows of a - b, resampled together; an arm of one seed meets every seed of the other.

    Scenes are paired, not their rows: a figure may leave out other answers of each arm.

    Raises:
        ValueError: where both have several seeds, but not as many.
    """
    seeds = max(len(a), len(b))
    if {len(a), len(b)} - {1, seeds}:
        raise ValueError(f"{arm}: {len(a)} and {len(b)} seeds cannot be paired")
    one, other = (pooled(side if len(side) == seeds else side * seeds) for side in (a, b))
    return [
        results.result_row(
            name,
            results.paired_difference(*_by_scene(one[name], other[name]), results.ratio),
            len(one[name]["columns"]),
            arm=arm,
            split=split,
            protocol=protocol,
        )
        for name in one
    ]


def _by_scene(a: dict[str, list], b: dict[str, list]) -> tuple[np.ndarray, np.ndarray]:
    """The columns of both, [scenes, 2], summed over each scene's rows."""
    number = {scene: i for i, scene in enumerate(dict.fromkeys(a["groups"] + b["groups"]))}
    totals = np.zeros((2, len(number), 2))
    for side, found in zip(totals, (a, b), strict=True):
        np.add.at(side, [number[scene] for scene in found["groups"]], found["columns"])
    return totals[0], totals[1]


def part(
    work: Path, name: str, adapter: str | None, split: str, rows: list, seed: int, measure: Measure
) -> Measured:
    """One model on one split, from `work` if it was measured before."""
    return kept_part(work / f"{name}-{split}.json", lambda: measure(*load_arm(adapter), rows, seed))


def kept_part(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON; from a file if it was made before."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".aside")
        aside.write_text(json.dumps(make()), "utf-8")
        aside.replace(file)
    return json.loads(file.read_text("utf-8"))


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Arms, splits and where to write."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--arm", action="append", default=[], help="name=adapter,adapter (a seed each)"
    )
    parser.add_argument("--compare", action="append", default=[], help="arm-arm, a difference")
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument("--count", type=int, default=100, help="scenes a split")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--out", type=Path, required=True, help="CSV; JSON goes beside it")
    return parser.parse_args(argv)


def chart(found: list[dict], block: str, bar: str, **settings: Any) -> str:
    """Result rows as SVG: blocks and the bars in them are named by templates over a row.

    Settings and errors as of `bars`.
    """
    blocks: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in found:
        ends = (row["value"], row["low"], row["high"])
        blocks.setdefault(block.format(**row), {})[bar.format(**row)] = ends
    return bars(blocks, **settings)


def _drawn(found: list[dict], metrics: Sequence[str]) -> str:
    """Figures from 0 to 1 of every arm, not of seeds or differences."""
    rows = [r for r in found if r["metric"] in metrics and not {",", " "} & set(r["arm"])]
    return chart(rows, "{metric}, {split}", "{arm}", maximum=1.0)


@torch.no_grad()
def run(
    args: argparse.Namespace, measure: Measure = answer_measures, drawn: Sequence[str] = ()
) -> None:
    """Measure all arms on all splits, and write what was found after each split.

    The metrics `drawn` are charted in an SVG beside the CSV.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    arms: dict[str, list[str | None]] = {"plain": [None]}
    arms |= {name: list(where.split(",")) for name, where in (a.split("=") for a in args.arm)}
    found: list[dict] = []
    for split in args.split:
        rows = demo_data.load_scenes(split, args.count)
        protocol = results.protocol(
            [r["id"] for r in rows], prompt=scenes.CAPTION_QUESTION, max_new_tokens=MAX_NEW_TOKENS,
            lexicon_hash=demo_measure.LEXICON.hash, variant=f"scenes/{split}", seed=args.seed,
        )  # fmt: skip
        whole = {
            arm: [
                part(args.work, f"{arm}{i}", adapter, split, rows, args.seed, measure)
                for i, adapter in enumerate(adapters)
            ]
            for arm, adapters in arms.items()
        }
        for arm, seeds in whole.items():
            found += rows_of(pooled(seeds), arm, split, protocol)
            if len(seeds) > 1:
                for i, one in enumerate(seeds):
                    found += rows_of(one, f"{arm}, seed {i}", split, protocol)
        for pair in args.compare:
            a, b = pair.split("-")
            found += differences(whole[a], whole[b], f"{a} - {b}", split, protocol)
        write_csv(args.out, found)
        results.write_results(args.out.with_suffix(".json"), found)
        if drawn:
            args.out.with_suffix(".svg").write_text(_drawn(found, drawn), "utf-8")
    print(results.table([r for r in found if "seed" not in r["arm"]]))


if __name__ == "__main__":
    run(parse(None, "Measure trained arms of the demo model on scenes."))
