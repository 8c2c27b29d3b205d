"""What does vision modeling change? Trained arms against each other on scenes, with intervals.

What it is: the demo model, plain fine-tuning of it and vision modeling of it (several seeds each),
measured on the same scenes. What it is not: a training recipe; the adapters come from
`train_vision_modeling`.

    python recipes/evaluate_vision_modeling.py --arm sft=sft0,sft1,sft2 --arm vm=vm0,vm1,vm2 \
        --split test --split test_unseen --split test_prior --out docs/results/fivl_training.csv

A finished part is kept in the folder `--work`; the same call goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import chair, pope, results, visual_reliance
from firsthand.processing import masks
from firsthand.processing.collator import word_token
from firsthand.processing.generation import generate_answers
from firsthand.processing.segmenter_vision_logits import VisionLogits
from firsthand.processing.segmenters import mask_iou
from firsthand.recipes import demo_data, demo_measure, demo_model, demo_rows
from firsthand.recipes.demo_saliency import load_saliency
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS, write_csv

LABELLED = 0.25  # covered share from which an image token must say the object's noun
Measured = dict[str, dict[str, list]]  # metric -> columns [n][2] and groups [n]


def measure(model: Any, processor: Any, rows: list[dict], seed: int, saliency: Any) -> Measured:
    """All metrics of one model on some scenes: numerators, denominators, and the scene of each."""
    asked = demo_rows.caption_rows(rows) + demo_rows.existence_rows(rows, seed)
    asked += demo_rows.reliance_rows(rows, seed)
    said = list(generate_answers(model, processor, asked, MAX_NEW_TOKENS, batch_size=32))
    captions = demo_measure.captions(said)
    pairs = dict(chair.pairs(captions, demo_rows.objects_of(rows), demo_measure.LEXICON))
    placed = {r["id"]: r["objects"] for r in rows}
    pairs["position_accuracy"] = chair.position_pairs(captions, placed, demo_measure.LEXICON)
    found = {name: _measured(columns, captions) for name, columns in pairs.items()}
    polled = [a for a in said if a.get("strategy")]
    for name in demo_measure.KEPT:
        found[name] = _measured(pope.pairs(polled)[name], polled)
    masked = [a for a in said if a.get("condition")]
    plain = [a for a in masked if a["condition"] == "plain"]
    found["visual_reliance"] = _measured(visual_reliance.pairs(masked)["visual_reliance"], plain)
    return found | vision_measures(model, processor, rows, saliency)


def _measured(columns: Any, rows: list[dict]) -> dict[str, list]:
    listed = np.asarray(columns, dtype=float).tolist()
    return {"columns": listed, "groups": [r["image_id"] for r in rows]}


def vision_measures(model: Any, processor: Any, rows: list[dict], saliency: Any) -> Measured:
    """What image tokens say: accuracy on labelled tokens, and IoU of each object's mask.

    `vision_iou` is that of blocks of image tokens, `vision_iou_sharpened` that of the segmenter
    `vision-logits` with saliency, `vision_iou_shuffled` the same for the noun of another object of
    the same image or, where there is none, of the next scene: the control.
    """
    names = ("vision_label_accuracy", "vision_iou", "vision_iou_sharpened", "vision_iou_shuffled")
    found: Measured = {name: {"columns": [], "groups": []} for name in names}
    blocks = VisionLogits(model, processor)
    sharp = VisionLogits(model, processor, saliency)

    def add(name: str, numerator: float, denominator: float, scene: str) -> None:
        found[name]["columns"].append([numerator, denominator])
        found[name]["groups"].append(scene)

    for at, row in enumerate(rows):
        said = blocks.word_maps(row["image"])
        nouns = [thing["noun"] for thing in row["objects"]]
        wrong = nouns[1:] + [rows[(at + 1) % len(rows)]["objects"][0]["noun"]]
        coarse = blocks.segment_from(row["image"], nouns, said)
        fine = sharp.segment_from(row["image"], nouns, said)
        control = sharp.segment_from(row["image"], wrong, said)
        for i, thing in enumerate(row["objects"]):
            true = masks.decode(thing["mask"])
            covered = masks.patch_coverage(true, tuple(said.shape[:2])) >= LABELLED  # type: ignore[arg-type]
            token = word_token(processor.tokenizer, thing["noun"])
            right = said.argmax(-1).numpy()[covered] == token
            add("vision_label_accuracy", int(right.sum()), int(covered.sum()), row["id"])
            for name, segments in zip(names[1:], (coarse, fine, control), strict=True):
                segment = segments[i]
                iou = 0.0 if segment is None else mask_iou(segment.mask, true)
                add(name, iou, 1, row["id"])
    return found


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


def rows_of(measured: Measured, arm: str, split: str, protocol: dict) -> list[dict]:
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
        for name, part in measured.items()
    ]


def differences(a: Measured, b: Measured, arm: str, split: str, protocol: dict) -> list[dict]:
    """Result rows of a - b, resampled together."""
    return [
        results.result_row(
            name,
            results.paired_difference(
                a[name]["columns"], b[name]["columns"], results.ratio, groups=a[name]["groups"]
            ),
            len(a[name]["columns"]),
            arm=arm,
            split=split,
            protocol=protocol,
        )
        for name in a
    ]


def part(work: Path, name: str, adapter: str | None, split: str, rows: list, args: Any) -> Measured:
    """One model on one split, from `work` if it was measured before."""
    file = work / f"{name}-{split}.json"
    if not file.exists():
        model, processor = load_arm(adapter)
        found = measure(model, processor, rows, args.seed, load_saliency())
        aside = file.with_suffix(".aside")
        aside.write_text(json.dumps(found), "utf-8")
        aside.replace(file)
    return json.loads(file.read_text("utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure vision modeling against fine-tuning.")
    parser.add_argument(
        "--arm", action="append", default=[], help="name=adapter,adapter (a seed each)"
    )
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument("--count", type=int, default=100, help="scenes a split")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--work", type=Path, default=Path("vision-modeling-work"))
    parser.add_argument("--out", type=Path, required=True, help="CSV; JSON goes beside it")
    args = parser.parse_args(argv)
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
        whole = {}
        for arm, adapters in arms.items():
            seeds = [
                part(args.work, f"{arm}{i}", adapter, split, rows, args)
                for i, adapter in enumerate(adapters)
            ]
            whole[arm] = pooled(seeds)
            found += rows_of(whole[arm], arm, split, protocol)
            if len(seeds) > 1:
                for i, one in enumerate(seeds):
                    found += rows_of(one, f"{arm}, seed {i}", split, protocol)
        if {"vm", "sft"} <= set(whole):
            found += differences(whole["vm"], whole["sft"], "vm - sft", split, protocol)
        write_csv(args.out, found)
        results.write_results(args.out.with_suffix(".json"), found)
    print(results.table([r for r in found if "seed" not in r["arm"]]))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
