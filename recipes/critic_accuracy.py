"""How often a critic or scorer is right: its verdicts on pairs against exact ground truth.

What it is: for every pair of a prompt's responses that CHAIR against ground truth tells apart,
whether the critique decided, and whether it decided alike; with intervals over prompts. What it is
not: a critic (`augment critique`).

    python -m firsthand.recipes.critic_accuracy --critiques critic evidence \
        --objects objects.json --nouns nouns.txt --out docs/results/critic_accuracy.csv

The truth is recall_weight * recall - CHAIR_i; `critic_decided` is the share of such pairs with a
verdict, `critic_accuracy` the share of right ones among these.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from firsthand.metrics import chair, results
from firsthand.recipes.evaluate_demo_model import write_csv
from firsthand.recipes.scorers import ChairScorer
from firsthand.recipes.stages import Row


def read_critiques(folder: Path) -> list[Row]:
    """All rows of a critique that were judged, also those without a verdict."""
    files = sorted([*folder.glob("data/*.parquet"), *folder.glob("dropped/*.parquet")])
    if not files:
        raise ValueError(f"{folder} holds no critiques: give what `augment critique` wrote")
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    return [row for row in rows if row["scores"]]


def preferences(row: Row) -> dict[tuple[int, int], int]:
    """For pairs (i, j), i < j, of usable responses: 1 where i is preferred, -1 where j, 0 a tie.

    The critic's are its verdicts on the pair itself, a scorer's the order of its scores.
    """
    if not row["comparisons"]:
        scored = [i for i, score in enumerate(row["scores"]) if score is not None]
        return {
            (i, j): int(np.sign(row["scores"][i] - row["scores"][j]))
            for i, j in combinations(scored, 2)
        }
    found = {}
    for one in row["comparisons"]:
        said = {"1": 1, "2": -1}.get(one["verdict"], 0)
        first, second = one["first"], one["second"]
        found[min(first, second), max(first, second)] = said if first < second else -said
    return found


def verdicts(rows: list[Row], exact: ChairScorer) -> Iterator[tuple[str, int, int]]:
    """(prompt, what the critique said, what is true), of the pairs that the truth tells apart."""
    for row in rows:
        said = preferences(row)
        places = sorted({place for pair in said for place in pair})
        texts = [row["responses"][place]["text"] for place in places]
        value = dict(zip(places, (s.value for s in exact(row, texts)), strict=True))
        for (i, j), preferred in said.items():
            if value[i] != value[j]:
                yield row["prompt_key"], preferred, 1 if value[i] > value[j] else -1


def accuracy(rows: list[Row], exact: ChairScorer, arm: str, about: dict[str, Any]) -> list[Row]:
    """Result rows `critic_decided` and `critic_accuracy`; n is pairs, prompts are resampled."""
    found = list(verdicts(rows, exact))
    groups = [key for key, _, _ in found]
    said = np.array([[preferred, true] for _, preferred, true in found]).reshape(-1, 2)
    decided = said[:, 0] != 0
    columns = {
        "critic_decided": np.stack([decided, np.ones_like(decided)], 1),
        "critic_accuracy": np.stack([said[:, 0] == said[:, 1], decided], 1),
    }
    protocol = results.protocol(sorted(set(groups)), **about)
    return results.result_rows(
        {name: values.astype(float) for name, values in columns.items()},
        arm=arm,
        split="prompts",
        protocol=protocol,
        groups=groups,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure critiques against ground truth.")
    parser.add_argument("--critiques", nargs="+", type=Path, required=True)
    parser.add_argument("--objects", required=True, help="JSON {image_id: [object, ...]}")
    parser.add_argument("--nouns", help="text file of nouns, one a line, instead of COCO's lexicon")
    parser.add_argument("--recall-weight", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True, help="CSV; JSON goes beside it")
    args = parser.parse_args(argv)
    from firsthand.recipes.measure import lexicon_of

    lexicon = lexicon_of(args)
    exact = ChairScorer(chair.read_objects(args.objects), lexicon, recall_weight=args.recall_weight)
    about = {"lexicon_hash": lexicon.hash, "variant": f"recall weight {args.recall_weight:g}"}
    found = [
        row
        for folder in args.critiques
        for row in accuracy(read_critiques(folder), exact, folder.name, about)
    ]
    write_csv(args.out, found)
    results.write_results(args.out.with_suffix(".json"), found)
    print(results.table(found))


if __name__ == "__main__":
    main()
