"""What does steering change? Every method against plain decoding on scenes, with intervals.

What it is: vectors fitted on validation scenes, one of four strengths chosen for each method on
100 others, then CHAIR, recall, mean length, POPE and the KL divergence to the plain distribution on
the test splits, for steering and for contrastive decoding. What it is not: a claim about other
models.

    python recipes/evaluate_steering.py --split test --split test_unseen --split test_prior \
        --count 200 --choose_on 100 --work steering-work --out docs/results/steering.csv

A finished part is kept in the folder `--work`; the same call goes on after a stop, and calls
of different `--arm`s may share the folder. CHAIR_i is drawn beside the CSV.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.modeling.families import steered_modules
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.modeling.steering_fit import contrast_differences, fit_steering, fit_vista
from firsthand.modeling.steering_vision import fit_vti_vision
from firsthand.modeling.steering_weights import (
    cut_directions,
    hallucinated_directions,
    upper_half,
)
from firsthand.processing.answered import forced
from firsthand.processing.contrast_inputs import contrast_settings
from firsthand.processing.generation import generate_answers, prepare_inputs
from firsthand.processing.steering_pairs import ValsePairs
from firsthand.recipes import demo_data, demo_measure, demo_model, demo_rows
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS, write_csv
from firsthand.recipes.steer import caption_pairs, conflict_pairs, scene_pairs
from firsthand.recipes.study import (
    Measured,
    caption_measures,
    chart,
    differences,
    kept_part,
    measured,
    pope_measures,
    rows_of,
)

KEEP_RECALL = 0.95  # of plain's: a strength that says less is not chosen
SIGNED = (-0.5, 0.25, 0.5, 1.0)
ARMS: dict[str, tuple[float, ...]] = {  # the four strengths that validation chooses from
    "mean": SIGNED,
    "mean, gated": SIGNED,
    "svd": SIGNED,
    "pca": SIGNED,
    "valse": SIGNED,
    "cas": (-1.0, -0.5, 0.5, 1.0),
    "vti": (-0.4, 0.4, 0.8, 1.6),
    "vti vision": (-0.4, 0.4, 0.8, 1.6),
    "vista": (-0.05, 0.01, 0.05, 0.1),
    "nullu": (1, 2, 4, 8),  # directions cut a layer
    "vcd": (-0.25, 0.25, 0.5, 1.0),
    "vcd-blur": (-0.25, 0.25, 0.5, 1.0),
    "icd": (-0.25, 0.25, 0.5, 1.0),
    "m3id": (0.01, 0.02, 0.05, 0.1),  # its rate of forgetting
    "pai": (-0.1, 0.1, 0.5, 1.0),  # guidance - 1
}
CONTRASTIVE = ("vcd", "vcd-blur", "icd", "m3id", "pai")
Row = dict[str, Any]


@dataclass
class Study:
    """The model, what is fitted on it (kept in `work`), and one seed for all of it."""

    model: Any
    processor: Any
    work: Path
    fitted_on: list[Row]
    seed: int = 0

    def vector(self, method: str) -> SteeringVector:
        """The vector of a method, fitted once."""
        method = method.removesuffix(", gated")
        folder = self.work / "vectors" / method
        if not (folder / "steering_config.json").exists():
            self._fit(method, folder.with_name(f"{method}-work")).save_pretrained(folder)
        return SteeringVector.from_pretrained(folder)

    def _fit(self, method: str, folder: Path) -> SteeringVector:
        rows, settings = self.fitted_on, Row(folder=folder, seed=self.seed)
        if method == "vti vision":
            images = [row["image"].convert("RGB") for row in rows]
            return fit_vti_vision(self.model, self.processor, images, seed=self.seed, folder=folder)
        if method == "valse":
            asked = [{"image": r["image"], "question": scenes.CAPTION_QUESTION} for r in rows]
            pairs: Any = ValsePairs(self.model, self.processor, asked, seed=self.seed)
            return fit_steering(self.model, self.processor, pairs, method, batch_size=1, **settings)
        makers = {"vti": caption_pairs, "cas": conflict_pairs}
        pairs = makers[method](rows, self.seed) if method in makers else scene_pairs(rows)
        return fit_steering(self.model, self.processor, pairs, method, **settings)

    @cached_property
    def basis(self) -> dict[int, torch.Tensor]:
        """Nullu's directions, the most that are tried."""
        layers = upper_half(self.model)
        found = contrast_differences(
            self.model, self.processor, caption_pairs(self.fitted_on, self.seed), layers, "layer",
            "all", folder=self.work / "vectors" / "nullu-work",
        )  # fmt: skip
        return hallucinated_directions(found, layers, min(max(map(int, ARMS["nullu"])), len(found)))

    @cached_property
    def gate(self) -> float:
        """The median visual support of true captions' tokens, over the scenes fitted on."""
        return kept_part(self.work / "gate.json", self._median_support)

    @torch.inference_mode()
    def _median_support(self) -> float:
        found = []
        vector = replace(self.vector("mean"), gate=0.0)
        with attach_steering(self.model, vector, 0.0) as steering:
            assert steering.gate is not None
            for row in self.fitted_on:
                image, said = row["image"], row["caption"]
                asked = forced(self.model, self.processor, image, scenes.CAPTION_QUESTION, said)
                self.model(**asked.inputs)
                measured = steering.gate.supports.values()
                found += [support[0, asked.first :].cpu() for support in measured]
        return float(torch.cat(found).median())

    @contextmanager
    def using(self, arm: str, strength: float, row: Row | None = None) -> Iterator[None]:
        """The model as an arm has it; "vista" for one row."""
        if arm == "plain" or arm in CONTRASTIVE:
            yield
        elif arm == "nullu":
            with self._cut(int(strength)):
                yield
        else:
            if row is not None:
                image = row["image"].convert("RGB")
                vector = fit_vista(self.model, self.processor, image, row["question"])
            else:
                vector = self.vector(arm)
            vector = replace(vector, gate=self.gate) if arm.endswith("gated") else vector
            with attach_steering(self.model, vector, strength):
                yield

    @contextmanager
    def _cut(self, rank: int) -> Iterator[None]:
        basis = {layer: rows[:rank] for layer, rows in self.basis.items()}
        modules = steered_modules(self.model)
        kept = {i: modules[i].down_proj.weight.clone() for i in basis}  # type: ignore[union-attr, operator]
        cut_directions(self.model, basis)
        try:
            yield
        finally:
            for i, weight in kept.items():
                modules[i].down_proj.weight.data.copy_(weight)  # type: ignore[union-attr, operator]

    def answers(self, arm: str, strength: float, asked: list[Row]) -> list[Row]:
        """Prediction rows of an arm."""
        settings = self._settings(arm, strength)
        if arm != "vista":
            with self.using(arm, strength):
                return self._answers(asked, 32, settings)
        said = []
        for row in tqdm(asked, desc="vista", unit="prompt"):
            with self.using(arm, strength, row):
                said += self._answers([row], 1, settings, progress=False)
        return said

    def _answers(self, asked: list[Row], size: int, settings: Row, progress: bool = True) -> list:
        return list(
            generate_answers(
                self.model, self.processor, asked, MAX_NEW_TOKENS, size, progress, **settings
            )
        )

    def _settings(self, arm: str, strength: float) -> Row:
        return contrast_settings(arm, strength, seed=self.seed) if arm in CONTRASTIVE else {}

    @torch.inference_mode()
    def divergence(self, arm: str, strength: float, row: Row, answer: str) -> tuple[float, int]:
        """Sum over plain's answer of KL(arm || plain) in nats, and its tokens.

        That way round it is finite where an arm rules tokens out.
        """
        begun = {**row, "start": answer}
        before = prepare_inputs(self.processor, [row])["input_ids"].shape[1]
        inputs = prepare_inputs(self.processor, [begun])
        count = inputs["input_ids"].shape[1] - before
        plain = self._logits(inputs, count)[0].log_softmax(-1)
        settings = self._settings(arm, strength)
        if settings:
            both = self._logits(settings["prepare"](self.processor, [begun]), count)
            mix = settings["custom_generate"].combine
            mixed = torch.cat([mix(both[:1, t], both[1:, t], t) for t in range(count)])
        else:
            with self.using(arm, strength, row if arm == "vista" else None):
                mixed = self._logits(inputs, count)[0]
        other = mixed.log_softmax(-1)
        terms = other.exp() * (other - plain)
        return float(terms[~other.isinf()].sum()), count

    def _logits(self, inputs: Any, count: int) -> torch.Tensor:
        """Logits [B, count, V] of the last `count` tokens."""
        inputs = inputs.to(self.model.device, self.model.dtype)
        return self.model(**inputs, logits_to_keep=count + 1).logits[:, :-1].float()


def measure_captions(said: list[Row], rows: list[Row]) -> Measured:
    """CHAIR, recall and length of captions: numerators, denominators and the scene of each."""
    return caption_measures(said, rows, placed=False)


def measure(study: Study, arm: str, strength: float, rows: list[Row], plain: list[Row]) -> Measured:
    """All metrics of an arm on some scenes; `plain` are the plain captions, for the divergence."""
    asked = demo_rows.caption_rows(rows) + demo_rows.existence_rows(rows, study.seed)
    said = study.answers(arm, strength, asked)
    found = measure_captions(said, rows) | pope_measures(said)
    captions = demo_rows.caption_rows(rows)
    kept = [(row, one["prediction"]) for row, one in zip(captions, plain, strict=True)]
    kept = [(row, text) for row, text in kept if text]
    kl = [
        study.divergence(arm, strength, row, text)
        for row, text in tqdm(kept, desc=f"KL, {arm}", unit="caption")
    ]
    found["kl_to_plain"] = measured(kl, [row for row, _ in kept])
    return found


def same_settings(work: Path, **settings: Any) -> None:
    """Raise ValueError where `work` holds parts that were made with other settings."""
    known = kept_part(work / "settings.json", lambda: settings)
    if known != settings:
        raise ValueError(f"{work} holds parts of {known}, not {settings}: use another --work")


def _score(measured: Measured, name: str) -> float:
    """The fraction; where there is nothing to count (no object was said), infinity."""
    top, bottom = np.asarray(measured[name]["columns"]).sum(0)
    return float(top / bottom) if bottom else math.inf


def choose(measured: dict[float, Measured], plain: Measured) -> float:
    """The strength with the lowest CHAIR_i among those that keep recall, else the weakest."""
    floor = KEEP_RECALL * _score(plain, "recall")
    kept = [s for s, one in measured.items() if _score(one, "recall") >= floor]
    if not kept:
        return min(measured, key=abs)
    return min(kept, key=lambda s: (_score(measured[s], "chair_i"), abs(s)))


def _protocol(rows: list[Row], split: str, seed: int, decoding: str) -> dict[str, Any]:
    return results.protocol(
        [r["id"] for r in rows], prompt=scenes.CAPTION_QUESTION, decoding=decoding,
        max_new_tokens=MAX_NEW_TOKENS, lexicon_hash=demo_measure.LEXICON.hash,
        variant=f"scenes/{split}", seed=seed,
    )  # fmt: skip


def chosen_strengths(study: Study, arms: list[str], rows: list[Row]) -> tuple[dict, list[Row]]:
    """Each arm's strength, chosen on validation scenes, and result rows of all that were tried."""
    captions = demo_rows.caption_rows(rows)

    def tried(arm: str, strength: float) -> Measured:
        file = study.work / "validation" / f"{arm}-{strength:g}.json"
        return kept_part(
            file, lambda: measure_captions(study.answers(arm, strength, captions), rows)
        )

    plain = tried("plain", 0.0)
    found = rows_of(
        plain, "plain", "validation", _protocol(rows, "validation", study.seed, "greedy")
    )
    chosen = {}
    for arm in arms:
        measured = {strength: tried(arm, strength) for strength in ARMS[arm]}
        chosen[arm] = choose(measured, plain)
        for strength, one in measured.items():
            protocol = _protocol(rows, "validation", study.seed, f"greedy, strength {strength:g}")
            found += rows_of(one, f"{arm}, strength {strength:g}", "validation", protocol)
    return chosen, found


def picture(found: list[Row]) -> str | None:
    """CHAIR_i of every arm on the test splits as SVG; None where no arm names an object."""
    rows = [
        row
        for row in found
        if row["metric"] == "chair_i" and row["split"] != "validation" and " - " not in row["arm"]
        if math.isfinite(row["value"])
    ]
    return chart(rows, "{arm}", "{split}", title="CHAIR_i, lower is better") if rows else None


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure steering and contrastive decoding.")
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument("--arm", action="append", choices=sorted(ARMS), help="all if absent")
    parser.add_argument("--count", type=int, default=200, help="scenes a test split")
    parser.add_argument(
        "--choose_on", type=int, default=100, help="validation scenes, not fitted on"
    )
    parser.add_argument("--fit_on", type=int, default=20, help="further validation scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("steering-work"))
    parser.add_argument("--out", type=Path, required=True, help="CSV; JSON, SVG go beside it")
    args = parser.parse_args(argv)
    validation = demo_data.load_scenes("validation", args.choose_on + args.fit_on)
    same_settings(args.work, choose_on=args.choose_on, fit_on=args.fit_on, seed=args.seed)
    model, processor = demo_model.load_demo_model()
    study = Study(model, processor, args.work, validation[args.choose_on :], args.seed)
    arms = args.arm or list(ARMS)
    chosen, found = chosen_strengths(study, arms, validation[: args.choose_on])
    for split in args.split:
        rows = demo_data.load_scenes(split, args.count)
        folder = study.work / f"{split}-{args.count}"
        captions = demo_rows.caption_rows(rows)
        plain = kept_part(folder / "captions.json", partial(study.answers, "plain", 0.0, captions))
        whole: dict[str, Measured] = {}
        for arm, strength in {"plain": 0.0, **chosen}.items():
            file = folder / f"{arm}-{strength:g}.json"
            whole[arm] = kept_part(file, partial(measure, study, arm, strength, rows, plain))
            decoding = "greedy" if arm == "plain" else f"greedy, strength {strength:g}"
            protocol = _protocol(rows, split, args.seed, decoding)
            found += rows_of(whole[arm], arm, split, protocol)
            if arm != "plain":
                found += differences(
                    [whole[arm]], [whole["plain"]], f"{arm} - plain", split, protocol
                )
        write_csv(args.out, found)
        results.write_results(args.out.with_suffix(".json"), found)
        if drawn := picture(found):
            args.out.with_suffix(".svg").write_text(drawn, "utf-8")
    print(results.table([row for row in found if "strength" not in row["arm"]]))
    print("strengths:", ", ".join(f"{arm} {strength:g}" for arm, strength in chosen.items()))


if __name__ == "__main__":
    main()
