"""Fit the hallucination warning for a model: on validation scenes, with exact labels.

What it is: the model's own drawn captions and captions with one object swapped, their words read
and labelled (`labelled_words.py`), and a logistic regression over them. What it is not: the measure
of how good it is (`evaluate_warning.py`).

    python -m firsthand.recipes.fit_warning --out recipes/demo_warning.json
    python -m firsthand.recipes.fit_warning --model org/model --out warning.json

Finished captions are kept in `--work`; the same call goes on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.processing.warning import fit
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.demo_measure import LEXICON
from firsthand.recipes.inputs import load_model
from firsthand.recipes.labelled_words import Source, labelled_words

SOURCES: tuple[Source, ...] = ("drawn", "swapped")


def training_words(
    work: Path, model: Any, processor: Any, count: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Labelled words of the first `count` validation scenes, and their protocol."""
    rows = load_scenes("validation", count)
    words = [
        word
        for source in SOURCES
        for word in labelled_words(work, model, processor, "validation", rows, source, seed)
    ]
    protocol = results.protocol(
        [row["id"] for row in rows], prompt=scenes.CAPTION_QUESTION, decoding="drawn, swapped",
        lexicon_hash=LEXICON.hash, variant="scenes/validation", seed=seed,
    )  # fmt: skip
    return words, protocol


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Fit the hallucination warning for a model.")
    parser.add_argument("--model", help="Hub id or path; the demo model if absent")
    parser.add_argument("--out", type=Path, required=True, help="the warning, a JSON file")
    parser.add_argument("--count", type=int, default=60, help="validation scenes")
    parser.add_argument("--seed", type=int, default=0, help="of drawn and swapped captions")
    parser.add_argument("--work", type=Path, default=Path("warning-work"))
    args = parser.parse_args(argv)
    words, protocol = training_words(args.work, *load_model(args.model), args.count, args.seed)
    warning = fit(words, protocol=protocol | {"model": args.model or "demo"})
    warning.save(args.out)
    false = sum(not word["true"] for word in words)
    print(f"{len(words)} words, {false} made up; held-out AUROC on validation scenes", end=" ")
    print(f"{warning.protocol['held_out_auroc']:.3f}; threshold {warning.threshold:.3f}")


if __name__ == "__main__":
    main()
