"""`firsthand demo`: the main job, offline: answer, measure, explain, steer, and measure again.

What it is: one run over the committed scenes and the photographs that installed packages ship, with
the demo model or any supported checkpoint (`--model`) and your images (`--images`). What it is not:
a benchmark of methods; those stand in docs/results.

    firsthand demo --out firsthand-demo

Every stage leaves a file in the output folder and is skipped when that file is there: a second run
takes seconds, an interrupted one goes on where it stopped. Other settings start afresh.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any

import torch

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.recipes import demo_data, demo_explain, demo_measure, demo_report, demo_rows
from firsthand.recipes.inputs import image_files, load_model, open_image, read_rows, write_rows
from firsthand.recipes.steer import scene_pairs

SPLITS = ("test", "test_prior", "test_unseen")
STRENGTHS = (0.3, 0.6, 1.0)
MAX_NEW_TOKENS = 48
KEEP_RECALL = 0.95  # share of the plain recall that a chosen strength must keep on validation
MAPPED_SCENES = 16  # scenes of test_prior whose words get heatmaps
NAMES = {
    "chair_i": "CHAIR_i (hallucinated mentions, lower is better)",
    "chair_s": "CHAIR_s (captions with one, lower is better)",
    "recall": "recall of objects",
    "position_accuracy": "objects named with their position",
    "pope_accuracy": "POPE accuracy (random, asked first)",
    "pope_yes_ratio": "POPE yes-ratio",
    "visual_reliance": "visual reliance",
    "mean_length": "mean length (words)",
}


class Work:
    """The output folder: finished stages are read back, unless they belong to other settings."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.out, self.stages = out, out / "stages"
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        note = self.stages / "settings.json"
        if note.exists() and note.read_text() != text:
            shutil.rmtree(self.stages)
        self.stages.mkdir(parents=True, exist_ok=True)
        note.write_text(text)

    def rows(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The stage's rows: from its file, or made now and written at once when complete."""
        file = self.stages / f"{name}.jsonl"
        if not file.exists():
            print(f"\n{name.replace('-', ' ')}")
            write_rows(file, make())
        return read_rows(file)


class Demo:
    """The stages of one run; each is a method that reads what earlier ones left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        if args.scenes < 2:
            raise ValueError(f"--scenes {args.scenes}: the shuffled control needs at least 2")
        self.files = image_files(args.images) if args.images else demo_data.package_photos()
        self.photos = [(f.name, open_image(f)) for f in self.files]
        self.model, self.processor = load_model(args.model)
        name = self.model.config.name_or_path
        settings = {"model": name, "scenes": args.scenes, "seed": args.seed, "version": 1}
        self.work = Work(self.out, settings)
        self.scenes = {s: demo_data.load_scenes(s, args.scenes) for s in SPLITS}
        self.validation = demo_data.load_scenes("validation", 100)

    def answer(self, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Prediction rows of a stage."""
        from firsthand.processing.generation import generate_answers

        def make() -> list[dict[str, Any]]:
            return list(
                generate_answers(
                    self.model, self.processor, rows, max_new_tokens=MAX_NEW_TOKENS, batch_size=16
                )
            )

        return self.work.rows(name, make)

    def measure(self, arm: str) -> list[dict[str, Any]]:
        """Result rows of one arm on every split."""
        found = []
        for split, rows in self.scenes.items():
            asked = demo_rows.caption_rows(rows) + demo_rows.existence_rows(rows, self.args.seed)
            asked = demo_rows.shuffled(asked) if arm == "shuffled" else asked
            said = self.answer(f"answers-{arm}-{split}", asked)
            protocol = self.protocol(split, said)
            found += demo_measure.caption_results(arm, split, said, rows, protocol)
            found += demo_measure.pope_results(arm, split, said, protocol)
            if arm != "shuffled":
                regions = demo_rows.reliance_rows(rows, self.args.seed)
                said = self.answer(f"reliance-{arm}-{split}", regions)
                found += demo_measure.reliance_results(arm, split, said, protocol)
        return found

    def protocol(self, split: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The fingerprint that every result row of a split carries."""
        return results.protocol(
            ids=[r["id"] for r in rows],
            prompt=scenes.CAPTION_QUESTION,
            decoding="greedy",
            max_new_tokens=MAX_NEW_TOKENS,
            variant=f"scenes/{split}",
            seed=self.args.seed,
        )

    def fit(self) -> Any:
        """The steering vector, fitted on the first half of the validation scenes."""
        from firsthand.modeling import SteeringVector, fit_steering

        folder = self.work.stages / "steering"
        if not folder.exists():
            print("\nfitting a steering vector")
            pairs = scene_pairs(self.validation[: len(self.validation) // 2])
            aside = self.work.stages / "steering-aside"
            fit_steering(self.model, self.processor, pairs).save_pretrained(aside)
            aside.rename(folder)
        return SteeringVector.from_pretrained(folder)

    def choose_strength(self, vector: Any) -> float:
        """The strength with the lowest CHAIR_i on the other half, among those that keep recall."""
        from firsthand.modeling import attach_steering

        held = self.validation[len(self.validation) // 2 :]
        asked = demo_rows.caption_rows(held)
        scores = {0.0: demo_measure.caption_scores(self.answer("strength-0", asked), held)}
        for strength in STRENGTHS:
            with attach_steering(self.model, vector, strength):
                said = self.answer(f"strength-{strength:g}", asked)
            scores[strength] = demo_measure.caption_scores(said, held)
        floor = KEEP_RECALL * scores[0.0]["recall"]
        kept = {s: v["chair_i"] for s, v in scores.items() if s and v["recall"] >= floor}
        print("\nvalidation, strength: CHAIR_i / recall")
        for strength, score in scores.items():
            print(f"  {strength:g}: {score['chair_i']:.3f} / {score['recall']:.3f}")
        return min(kept, key=lambda s: (kept[s], s)) if kept else min(STRENGTHS)

    def explained(self) -> dict[str, Any]:
        """The warning's threshold and AUROC on validation; mapped words of scenes and photos."""
        threshold, auroc = demo_explain.calibrate(
            self.work, self.model, self.processor, self.validation, self.args.seed
        )
        chosen = self.scenes["test_prior"][:MAPPED_SCENES]
        captions = [(r["image"].convert("RGB"), scenes.CAPTION_QUESTION) for r in chosen]
        photos = [(image, self.args.question) for _, image in self.photos]
        mapped = [
            demo_explain.word_maps(self.model, self.processor, asked, threshold, name)
            for name, asked in (("scenes", captions), ("photographs", photos))
        ]
        return {
            "threshold": threshold,
            "auroc": auroc,
            "scenes": mapped[0],
            "photographs": mapped[1],
        }


def run(args: argparse.Namespace) -> int:
    """The whole job; see the module's docstring."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    demo = Demo(args)
    rows = demo.measure("plain") + demo.measure("shuffled")
    explained = demo.explained()
    vector = demo.fit()
    strength = demo.choose_strength(vector)
    from firsthand.modeling import attach_steering

    with attach_steering(demo.model, vector, strength):
        rows += demo.measure("steered")
    results.write_results(demo.out / "results.json", rows)
    write(demo, rows, explained, strength)
    print("\n" + results.table(rows))
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes. Report: {demo.out / 'report.html'}")
    print("The same, by hand: python -m firsthand.spaces.explainability.app")
    return 0


def caught(demo: Demo) -> list[dict[str, Any]]:
    """Scenes of test_prior where steering removed a hallucinated object, or changed the answer."""
    plain = {
        r["image_id"]: r
        for r in read_rows(demo.work.stages / "answers-plain-test_prior.jsonl")
        if r["id"].endswith("/caption")
    }
    steered = {
        r["image_id"]: r
        for r in read_rows(demo.work.stages / "answers-steered-test_prior.jsonl")
        if r["id"].endswith("/caption")
    }
    found = []
    for row in demo.scenes["test_prior"]:
        before, after = plain[row["id"]], steered[row["id"]]
        gain = demo_measure.hallucinated(before, row) - demo_measure.hallucinated(after, row)
        changed = before["prediction"] != after["prediction"]
        found.append((gain, changed, row, before["prediction"], after["prediction"]))
    found.sort(key=lambda f: (-f[0], -f[1]))
    return [
        {"image": row["image"], "truth": row["caption"], "plain": before, "steered": after}
        for _, _, row, before, after in found[:4]
    ]


def picture(mapped: list[dict[str, Any]]) -> Any:
    """The maps of one scene side by side: of those with three words or more, the best supported."""
    from firsthand.processing.overlays import contact_sheet

    long = [m for m in mapped if len(m["words"]) >= 3] or mapped
    chosen = max(long, key=lambda m: min([w["support"] for w in m["words"]], default=0.0))
    captions = [chosen["answer"]] + [
        f"{w['text']}: support {w['support']:.1f}" + (", warned" if w["warned"] else "")
        for w in chosen["words"]
    ]
    return contact_sheet([chosen["image"], *(w["map"] for w in chosen["words"])], captions)


def write(
    demo: Demo,
    rows: list[dict[str, Any]],
    explained: dict[str, Any],
    strength: float,
) -> None:
    """The HTML report, and one picture."""
    from firsthand.processing.overlays import bars

    wanted = [r for r in rows if r["metric"] == "visual_reliance" and not isnan(r["value"])]
    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for r in wanted:
        groups.setdefault(r["split"], {})[r["arm"]] = (
            max(r["value"], 0),
            max(r["low"], 0),
            max(r["high"], 0),
        )
    sections = [
        (
            "What was measured",
            "95 % bootstrap intervals; n below each metric's unit. Shuffled images are "
            "the control that must collapse.",
            demo_report.results_table(rows, NAMES),
        ),
        (
            "Visual reliance",
            "How much accuracy on present objects falls when their region is removed.",
            bars(groups, title="visual reliance") if groups else "<p>undefined here</p>",
        ),
        (
            "Where each object word came from",
            "Scenes that break the co-occurrence prior. Words whose visual support is at most "
            f"{explained['threshold']:.2f} nats are warned about. The threshold was chosen on "
            "validation captions with a true or a swapped-in object, which it tells apart with "
            f"AUROC {explained['auroc']:.2f}.",
            "".join(demo_report.word_maps(m) for m in explained["scenes"]),
        ),
        (
            "Before and after steering",
            f"Strength {strength:g}, chosen on validation scenes.",
            "".join(demo_report.before_after(e) for e in caught(demo)),
        ),
    ]
    if explained["photographs"]:
        sections.append(
            (
                "Photographs",
                "Another domain: expect guesses, and see whether the warning catches them.",
                "".join(demo_report.word_maps(m) for m in explained["photographs"]),
            )
        )
    picture(explained["scenes"]).save(demo.out / "heatmap.png")
    model = demo.args.model or "the demo model (DINOv2-small + SmolLM2-135M)"
    demo_report.write_report(
        demo.out / "report.html",
        "firsthand demo",
        f"{model}; {demo.args.scenes} scenes a split",
        sections,
    )
