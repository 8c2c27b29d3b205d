"""How well the hallucination warning tells made-up words from true ones, beside single signals.

What it is: AUROC, average precision and Brier score on the object words of held-out scenes, with
intervals over scenes: the model's own greedy captions (the case that matters), and true captions
with one object swapped, apart. Arm `warning` is the given file; the other fitted arms, for
comparison, are fitted on validation scenes; the single signals need no fit. What it is not: a
training recipe (`fit_warning.py` writes the file).

    python -m firsthand.recipes.evaluate_warning --split test --split test_prior \
        --split test_unseen --out docs/results/warning.csv

A split that is not committed is read from `--scenes_folder`. Finished captions are kept in
`--work`; the same call goes on after a stop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.processing.warning import SIGNALS, HallucinationWarning, Word, fit
from firsthand.recipes.demo_data import load_scenes, load_split
from firsthand.recipes.demo_measure import LEXICON
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS, write_csv
from firsthand.recipes.explain_warn import warning_file
from firsthand.recipes.fit_warning import training_words
from firsthand.recipes.inputs import load_model
from firsthand.recipes.labelled_words import Source, labelled_words

SVAR_LAYERS = (5 / 32, 18 / 32)  # the part of the decoder whose attention shares SVAR sums
Scorer = Callable[[Sequence[Word]], np.ndarray]  # high = made up


def _svar(word: Word) -> float:
    share = word["attention_share"]
    first, last = (round(part * len(share)) for part in SVAR_LAYERS)
    return float(np.mean(share[first : last + 1]))


SINGLE: dict[str, Callable[[Word], float]] = {  # high = seen
    "visual_contribution": lambda word: word["visual_contribution"],
    "svar": _svar,
    "probability": lambda word: word["log_probability"],
    "support": lambda word: word["log_likelihood_ratio"],
    "asked": lambda word: word["yes_over_no"],
}
FITTED = {"attention": ["attention"], "relevancy": ["relevancy"], "all": list(SIGNALS)}


def scorers(words: Sequence[Word], warning: HallucinationWarning) -> dict[str, Scorer]:
    """Arm -> how it scores words; those of FITTED have seen `words`."""

    def alone(signal: Callable[[Word], float]) -> Scorer:
        return lambda words: -np.array([signal(word) for word in words])

    found = {arm: alone(signal) for arm, signal in SINGLE.items()}
    found |= {arm: fit(words, signals).score for arm, signals in FITTED.items()}
    return found | {"warning": warning.score}


def columns(scores: np.ndarray, made_up: np.ndarray) -> np.ndarray:
    """[n, 2 n]: a word's place among the scores, in the left half if made up, else in the right.

    AUROC and average precision are functions of the columns' means: of two histograms.
    """
    count = len(scores)
    places = np.unique(scores, return_inverse=True)[1]
    marks = np.zeros((count, 2 * count))
    marks[np.arange(count), places + np.where(made_up, 0, count)] = 1
    return marks


def auroc(means: np.ndarray) -> np.ndarray:
    """Of means [..., 2 n] of `columns`: chance that a made-up word scores above a true one."""
    made_up, true = np.split(means, 2, axis=-1)
    below = true.cumsum(-1) - true / 2
    return _divide((made_up * below).sum(-1), made_up.sum(-1) * true.sum(-1))


def average_precision(means: np.ndarray) -> np.ndarray:
    """Of means [..., 2 n] of `columns`: mean share of made-up words at or above a made-up one."""
    made_up, true = np.split(means, 2, axis=-1)
    caught = made_up[..., ::-1].cumsum(-1)[..., ::-1]
    all_above = caught + true[..., ::-1].cumsum(-1)[..., ::-1]
    precision = np.nan_to_num(_divide(caught, all_above))  # no word is above the highest
    return _divide((made_up * precision).sum(-1), made_up.sum(-1))


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def measure(
    words: Sequence[Word], arms: dict[str, Scorer], split: str, protocol: dict[str, Any]
) -> list[dict[str, Any]]:
    """Result rows of every arm on one split's words; `warning` also against `probability`."""
    made_up = np.array([not word["true"] for word in words], dtype=bool)
    groups = [word["scene"] for word in words]
    marks = {arm: columns(score(words), made_up) for arm, score in arms.items()}
    found = []

    def add(arm: str, metric: str, interval: results.Interval) -> None:
        row = results.result_row(
            metric, interval, len(words), arm=arm, split=split, protocol=protocol
        )
        found.append(row)

    for name, statistic in (("auroc", auroc), ("average_precision", average_precision)):
        for arm, mark in marks.items():
            add(arm, name, results.bootstrap(mark, statistic, groups=groups))
        difference = results.paired_difference(
            marks["warning"], marks["probability"], statistic, groups=groups
        )
        add("warning - probability", name, difference)
    for arm in (*FITTED, "warning"):
        error = (arms[arm](words) - made_up) ** 2
        add(arm, "brier", results.bootstrap(error, groups=groups))
    add("words", "made_up", results.bootstrap(made_up, groups=groups))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure the hallucination warning on scenes.")
    parser.add_argument("--model", help="Hub id or path; the demo model if absent")
    parser.add_argument("--warning", help="what fit_warning wrote; the demo model's if absent")
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument("--scenes_folder", type=Path, help="where splits are, if not committed")
    parser.add_argument("--count", type=int, default=60, help="scenes a split")
    parser.add_argument("--swapped", type=int, default=20, help="scenes a split, captions swapped")
    parser.add_argument("--fit_count", type=int, default=120, help="validation scenes")
    parser.add_argument("--seed", type=int, default=0, help="of drawn and swapped captions")
    parser.add_argument("--work", type=Path, default=Path("warning-work"))
    parser.add_argument("--out", type=Path, required=True, help="CSV; JSON goes beside it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read what is missing, fit the arms, measure, and write after each part."""
    args = parse(argv)
    warning = HallucinationWarning.load(warning_file(args.model, args.warning))
    model, processor = load_model(args.model)
    rows = load_scenes("validation", args.fit_count)
    words = training_words(args.work, model, processor, "validation", rows, args.seed)
    arms = scorers(words, warning)
    found: list[dict[str, Any]] = []
    parts: tuple[tuple[Source, int], ...] = (("own", args.count), ("swapped", args.swapped))
    for source, count in parts:
        for split in args.split:
            rows = load_split(split, count, args.scenes_folder)
            words = labelled_words(args.work, model, processor, split, rows, source, args.seed)
            protocol = results.protocol(
                [row["id"] for row in rows], prompt=scenes.CAPTION_QUESTION, seed=args.seed,
                decoding="greedy" if source == "own" else source, lexicon_hash=LEXICON.hash,
                max_new_tokens=MAX_NEW_TOKENS, variant=f"scenes/{split}",
            )  # fmt: skip
            name = split if source == "own" else f"{split}, {source}"
            found += measure(words, arms, name, protocol)
            write_csv(args.out, found)
            results.write_results(args.out.with_suffix(".json"), found)
    print(results.table(found))


if __name__ == "__main__":
    main()
