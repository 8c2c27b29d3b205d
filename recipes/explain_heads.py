"""`firsthand explain heads` and `explain head`: which attention heads look at what is named.

`heads` compares, for every key expression of grounded samples, each head's attention from the
expression's tokens with the expression's mask, and also with a mask of another sample: the control.
`head` draws one head's attention for every token of an answer. Neither says that a head *causes* an
answer. After FiVL (arXiv 2412.14672).

firsthand explain heads --data scenes --samples 30 --out heads
firsthand explain head --layer 14 --head 11 --image photo.jpg --question "What is this?" --out head
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from firsthand.metrics.results import protocol
from firsthand.modeling.families import unwrap
from firsthand.modeling.head_attention import head_attention
from firsthand.processing.answered import Answered, forced, generated
from firsthand.processing.generation import one_view
from firsthand.processing.head_statistics import (
    CHANCE,
    STATISTICS,
    Grid,
    ceilings,
    mean_over_tokens,
    ordered,
    statistics,
)
from firsthand.processing.masks import frame_of
from firsthand.recipes.grounded import (
    Expression,
    Reasons,
    Sample,
    drop,
    last_sample,
    seen_coverage,
    usable_expressions,
    usable_samples,
)
from firsthand.recipes.inputs import load_model, open_image

TOP = 10  # heads that are listed by each statistic
ARMS = ("plain", "shuffled")


def run(args: argparse.Namespace) -> int:
    """`heads` writes heads.json and heads.png; `head` writes head.json and tokens.png."""
    return _run_heads(args) if args.kind == "heads" else _run_head(args)


@dataclass
class HeadStudy:
    """How well each head's attention from key expressions lands in their masks.

    An item is one expression; its value is the mean over its tokens' rows, each read at the
    position that produces the token. Items have equal weight. The arm "shuffled" compares the same
    rows with a mask of the sample before (for the first: of the last): the control.

    Attributes:
        model, processor: of a supported family.
        own_answer: look for expressions (all occurrences, whole words, either case) in the model's
            own answer instead of the reference; those that it does not say are unmatched.
        smallest: only the expression with the smallest mask of each turn, as FiVL.
        max_new_tokens: bound on the model's own answer.
        grids: arm -> statistic -> mean, count and standard error of every head.
        ceiling: statistic -> the most that any head could reach, an item each.
        ids, items, unmatched, dropped: samples that were read, expressions that were compared, that
            the model's answer lacks, and that could not be used.
    """

    model: Any
    processor: Any
    own_answer: bool = False
    smallest: bool = False
    max_new_tokens: int = 64
    grids: dict[str, dict[str, Grid]] = field(default_factory=dict)
    ceiling: dict[str, list[float]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    items: int = 0
    unmatched: int = 0
    dropped: Reasons = field(default_factory=list)

    def read(self, samples: Any, count: int | None = None, progress: bool = True) -> None:
        """Take in the first `count` grounded samples (a list or `datasets.Dataset`)."""
        other = last_sample(samples)
        for sample in usable_samples(samples, count, self.dropped, progress):
            foreign = _masks(other) if other and other["id"] != sample["id"] else []
            self._add_sample(sample, foreign)
            other = sample if _masks(sample) else other

    def _add_sample(self, sample: Sample, others: list[np.ndarray]) -> None:
        self.ids.append(str(sample["id"]))
        for index, turn in enumerate(sample["turns"]):
            expressions = usable_expressions(sample, index, self.dropped)
            if self.smallest:
                expressions = sorted(expressions, key=lambda e: e.mask.sum())[:1]
            try:
                if expressions:
                    self._add_turn(sample, turn, expressions, others)
            except ValueError as error:
                drop(self.dropped, sample, None, str(error))

    def _add_turn(
        self, sample: Sample, turn: Any, expressions: list[Expression], others: list[np.ndarray]
    ) -> None:
        answered = self._answered(sample["image"], turn)
        spans = [self._occurrences(e, answered.answer) for e in expressions]
        tokens = [sorted({t for s in places for t in answered.tokens(*s)}) for places in spans]
        self.unmatched += sum(not found for found in tokens)
        wanted = sorted({token for found in tokens for token in found})
        if not wanted:
            return
        attention = head_attention(self.model, answered.inputs, answered.producers(wanted))
        grid = (attention.shape[-2], attention.shape[-1])
        rows = attention.flatten(-2).numpy()
        for number, (expression, found) in enumerate(zip(expressions, tokens, strict=True)):
            coverage = seen_coverage(expression.mask, grid, frame_of(self.processor))
            if coverage is None:
                drop(
                    self.dropped,
                    sample,
                    expression.text,
                    "its mask is all or nothing of what is seen",
                )
            elif found:
                control = others[number % len(others)] if others else None
                self._add_item(rows[:, :, [wanted.index(t) for t in found]], coverage, control)

    def _answered(self, image: Any, turn: Any) -> Answered:
        asked = (self.model, self.processor, image, turn["question"])
        if self.own_answer:
            return generated(*asked, self.max_new_tokens)
        return forced(*asked, turn["answer"])

    def _occurrences(self, expression: Expression, answer: str) -> list[tuple[int, int]]:
        if not self.own_answer:
            return [(expression.start, expression.end)]
        pattern = rf"(?<!\w){re.escape(expression.text)}(?!\w)"
        return [match.span() for match in re.finditer(pattern, answer, re.IGNORECASE)]

    def _add_item(self, rows: np.ndarray, coverage: np.ndarray, control: np.ndarray | None) -> None:
        """Rows [L, H, S, R * C] of one expression against its coverage [R, C] and the control's."""
        self.items += 1
        run = ordered(rows)
        covers = {"plain": coverage}
        if control is not None:
            seen = seen_coverage(control, coverage.shape, frame_of(self.processor))
            covers |= {} if seen is None else {"shuffled": seen}
        for name, value in ceilings(coverage.ravel()).items():
            self.ceiling.setdefault(name, []).append(value)
        for arm, cover in covers.items():
            grids = self.grids.setdefault(arm, {name: Grid(rows.shape[:2]) for name in STATISTICS})
            for name, values in statistics(run, cover.ravel()).items():
                grids[name].add(mean_over_tokens(values))

    def summary(self) -> dict[str, Any]:
        """What heads.json holds, ready for JSON: NaN is None."""
        plain = {a: {n: _plain(g) for n, g in grids.items()} for a, grids in self.grids.items()}
        return {
            "samples": len(self.ids),
            "items": self.items,
            "unmatched": self.unmatched,
            "dropped": self.dropped,
            "ceiling": {n: _number(float(np.nanmean(v))) for n, v in self.ceiling.items()},
            "top": {name: self._top(name) for name in plain.get("plain", ())},
            "grids": plain,
        }

    def _top(self, name: str) -> list[dict[str, Any]]:
        """The best heads by a statistic's mean, with the control's mean of the same head."""
        plain, control = (self.grids[arm][name] if arm in self.grids else None for arm in ARMS)
        assert plain is not None
        listed = []
        for layer, head in best_heads(plain.mean, TOP):
            at = (layer, head)
            mean, error = plain.mean[at], plain.standard_error[at]
            shuffled = math.nan if control is None else control.mean[at]
            row = {
                "layer": layer,
                "head": head,
                "mean": _number(mean),
                "count": int(plain.count[at]),
            }
            listed.append(row | {"standard_error": _number(error), "shuffled": _number(shuffled)})
        return listed


def best_heads(means: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(layer, head) of the `count` highest means [L, H], best first; NaN cells are never among."""
    flat = np.where(np.isnan(means), -np.inf, means).ravel()
    chosen = np.argsort(-flat, kind="stable")[:count]
    return [divmod(int(i), means.shape[1]) for i in chosen if np.isfinite(flat[i])]


def _masks(sample: Sample) -> list[np.ndarray]:
    turns = range(len(sample["turns"]))
    return [e.mask for turn in turns for e in usable_expressions(sample, turn, [])]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _plain(grid: Grid) -> dict[str, list]:
    """Mean, standard error and count, [L][H] each."""
    numbers = {"mean": grid.mean, "standard_error": grid.standard_error}
    lists = {k: [[_number(x) for x in row] for row in v] for k, v in numbers.items()}
    return {**lists, "count": grid.count.tolist()}


def _run_heads(args: argparse.Namespace) -> int:
    from firsthand.processing.figures import grids
    from firsthand.recipes.train_vision_modeling import load_samples

    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples is {args.samples}; it must be at least 1")
    samples = load_samples(None if args.data == "scenes" else args.data, args.split)
    model, processor = load_model(args.model)
    study = HeadStudy(
        model, one_view(processor), args.generated, args.smallest_mask, args.max_new_tokens
    )
    study.read(samples, args.samples)
    found, out = study.summary(), Path(args.out)
    if not study.items:
        raise ValueError(f"{args.data}: no expression could be compared. {_reasons(study)}")
    answers = "generated" if args.generated else "reference"
    about = {
        "model": args.model or "demo",
        "data": args.data,
        "split": args.split,
        "answers": answers,
        "expressions": "smallest mask of each turn" if args.smallest_mask else "all",
        "frame": frame_of(processor),
        "protocol": protocol(
            study.ids,
            decoding="greedy" if args.generated else "teacher-forced",
            max_new_tokens=args.max_new_tokens if args.generated else None,
            variant="smallest" if args.smallest_mask else "all",
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "heads.json").write_text(json.dumps(about | found) + "\n", "utf-8")
    means = {name: grid.mean for name, grid in study.grids["plain"].items()}
    marked = {name: best_heads(values, TOP) for name, values in means.items()}
    title = f"attention from key expressions into their masks, {study.items} expressions"
    grids(means, f"{title} ({answers} answers)", marked, CHANCE).save(out / "heads.png")
    _print_heads(found, study)
    print(f"grids and figure: {out}")
    return 0


def _reasons(study: HeadStudy) -> str:
    reasons = Counter(d["reason"] for d in study.dropped).most_common(3)
    listed = "; ".join(f"{reason} ({n})" for reason, n in reasons) or "none was left out"
    return f"Unmatched: {study.unmatched}. Left out: {listed}."


def _print_heads(found: dict[str, Any], study: HeadStudy) -> None:
    print(f"{found['items']} expressions of {found['samples']} samples. {_reasons(study)}")
    for name, heads in found["top"].items():
        print(f"{name} (at most {found['ceiling'][name]:.3f})")
        for best in heads[:3]:
            error, shuffled = best["standard_error"], best["shuffled"]
            print(
                f"  layer {best['layer']:2} head {best['head']:2}  {best['mean']:.3f}"
                f" +- {math.nan if error is None else error:.3f} (n={best['count']})"
                f"  shuffled masks {math.nan if shuffled is None else shuffled:.3f}"
            )


def _run_head(args: argparse.Namespace) -> int:
    from firsthand.processing.overlays import contact_sheet, heatmap

    image = open_image(args.image)
    model, processor = load_model(args.model)
    _check_head(model, args.layer, args.head)
    asked = (model, one_view(processor), image, args.question)
    answered = generated(*asked, args.max_new_tokens) if args.answer is None else None
    answered = answered or forced(*asked, args.answer)
    positions = answered.producers(range(len(answered.spans)))
    maps = head_attention(model, answered.inputs, positions)[args.layer, args.head]
    tokens = [answered.answer[start:end] for start, end in answered.spans]
    shares = maps.flatten(1).sum(1).tolist()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": args.model or "demo",
        "layer": args.layer,
        "head": args.head,
        "question": args.question,
        "answer": answered.answer,
        "tokens": tokens,
        "image_share": shares,
        "attention": maps.tolist(),
    }
    (out / "head.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    drawn = [heatmap(image, grid, frame=frame_of(processor)) for grid in maps.numpy()]
    captions = [f"{t.strip() or '·'} ({s:.2f})" for t, s in zip(tokens, shares, strict=True)]
    contact_sheet(drawn, captions, columns=min(6, len(drawn))).save(out / "tokens.png")
    print(f"{args.question} -> {answered.answer}")
    for token, share in zip(tokens, shares, strict=True):
        print(f"  {token.strip() or '·':16} attention to the image {share:.2f}")
    print(f"overlays: {out / 'tokens.png'}")
    return 0


def _check_head(model: Any, layer: int, head: int) -> None:
    text = unwrap(model).config.text_config
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    if not 0 <= layer < layers or not 0 <= head < heads:
        raise ValueError(
            f"there is no layer {layer}, head {head}: the model has layers 0 to {layers - 1} with "
            f"heads 0 to {heads - 1} each"
        )
