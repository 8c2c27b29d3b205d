"""Fit the hallucination warning for a model: on validation scenes, with exact labels.

What it is: the model's own captions, greedy and drawn, their words read and labelled
(`labelled_words.py`), the signals that help on held-out scenes, and a logistic regression over
them. What it is not: the measure of how good it is (`evaluate_warning.py`).

    python -m firsthand.recipes.fit_warning --out recipes/demo_warning.json
    python -m firsthand.recipes.fit_warning --model org/model --out warning.json

Finished captions are kept in `--work`, one folder for one model and one `--data`; the same call
goes on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.processing.warning import choose, fit
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.demo_measure import LEXICON
from firsthand.recipes.inputs import load_model
from firsthand.recipes.labelled_words import Source, labelled_words

SOURCES: tuple[Source, ...] = ("own", "drawn")


def training_words(
    work: Path, model: Any, processor: Any, split: str, rows: list[dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """Labelled words of the scenes `rows`, one caption of each of SOURCES a scene."""
    return [
        word
        for source in SOURCES
        for word in labelled_words(work, model, processor, split, rows, source, seed)
    ]


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Fit the hallucination warning for a model.")
    parser.add_argument("--model", help="Hub id or path; the demo model if absent")
    parser.add_argument("--out", type=Path, required=True, help="the warning, a JSON file")
    parser.add_argument("--data", type=Path, help="folder of build_scenes; the committed scenes")
    parser.add_argument("--split", default="validation", help="of the scenes")
    parser.add_argument("--count", type=int, default=120, help="scenes")
    parser.add_argument("--seed", type=int, default=0, help="of drawn captions")
    parser.add_argument("--work", type=Path, default=Path("warning-work"))
    args = parser.parse_args(argv)
    rows = load_scenes(args.split, args.count, args.data)
    model, processor = load_model(args.model)
    words = training_words(args.work, model, processor, args.split, rows, args.seed)
    signals = choose(words)
    protocol = results.protocol(
        [row["id"] for row in rows], prompt=scenes.CAPTION_QUESTION, decoding=", ".join(SOURCES),
        lexicon_hash=LEXICON.hash, variant=f"scenes/{args.split}", seed=args.seed,
    )  # fmt: skip
    warning = fit(words, signals, protocol | {"model": args.model or "demo"})
    warning.save(args.out)
    false = sum(not word["true"] for word in words)
    print(f"{len(words)} words, {false} made up; chosen signals: {', '.join(signals)}")
    print(f"held-out AUROC on these scenes {warning.protocol['held_out_auroc']:.3f}", end="; ")
    print(f"threshold {warning.threshold:.3f}")


if __name__ == "__main__":
    main()
