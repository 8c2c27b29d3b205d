"""Measure a demo adapter on scenes: what ships is measured on the test splits once.

    python recipes/evaluate_demo_model.py --adapter demo_adapter --split validation --out
    validation.csv python recipes/evaluate_demo_model.py --split test --split test_prior --split
    test_unseen \
        --scenes_folder photo_scenes --split test_photo --out docs/results/demo_model.csv
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import results
from firsthand.recipes import demo_data, demo_measure, demo_model, demo_rows

COLUMNS = ("arm", "split", "metric", "value", "low", "high", "n")
MAX_NEW_TOKENS = 48


def evaluate(model: Any, processor: Any, split: str, rows: list[dict], seed: int) -> list[dict]:
    """Result rows of the arms plain and shuffled on one split."""
    from firsthand.processing.generation import generate_answers

    found = []
    asked = demo_rows.caption_rows(rows) + demo_rows.existence_rows(rows, seed)
    for arm, questions in (("plain", asked), ("shuffled", demo_rows.shuffled(asked))):
        said = list(generate_answers(model, processor, questions, MAX_NEW_TOKENS, batch_size=32))
        protocol = results.protocol(
            ids=[r["id"] for r in said],
            prompt=scenes.CAPTION_QUESTION,
            max_new_tokens=MAX_NEW_TOKENS,
            lexicon_hash=demo_measure.LEXICON.hash,
            variant=f"scenes/{split}",
            seed=seed,
        )
        found += demo_measure.caption_results(arm, split, said, rows, protocol)
        found += demo_measure.pope_results(arm, split, said, protocol)
    return found


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a result, without the protocol (which results.json beside it carries)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: round(row[k], 4) for k in ("value", "low", "high")}
            writer.writerow({**row, **rounded})


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure a demo adapter on scenes.")
    parser.add_argument("--adapter", type=Path, default=demo_model.ADAPTER)
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument(
        "--scenes_folder", type=Path, help="where splits are that are not committed"
    )
    parser.add_argument("--count", type=int, help="scenes a split; all if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="CSV; results.json goes beside it")
    args = parser.parse_args(argv)
    model, processor = demo_model.load_demo_model(adapter=args.adapter)
    found: list[dict[str, Any]] = []
    for split in args.split:
        rows = demo_data.load_split(split, args.count, args.scenes_folder)
        found += evaluate(model, processor, split, rows, args.seed)
        write_csv(args.out, found)
        results.write_results(args.out.with_suffix(".json"), found)
    print(results.table(found))


if __name__ == "__main__":
    main()
