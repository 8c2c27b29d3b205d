"""`firsthand augment preferences`: critiques as preference rows that TRL and our recipe train on.

What it is: the best-scored response of a prompt as chosen, the worst as rejected (SIMA, arXiv
2405.15973, section 3.3), in TRL's conversational format, as Parquet with a card. What it is not: a
judge, or training.

    firsthand augment preferences --data critiques --out pairs
    accelerate launch -m firsthand.recipes.train_preference --data pairs ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet

from firsthand.datasets_scripts.sima import sima
from firsthand.recipes import conversations
from firsthand.recipes.augment_responses import parquet_source, report, require_columns
from firsthand.recipes.stages import Dropped, Row, Step, keep_plan, run_stages

TURNS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))


def features(weights: bool) -> Any:
    """The builder's columns of preferences, `margin`, and `weight` where pairs are weighed."""
    from datasets import Features, Value

    more = ("margin", "weight") if weights else ("margin",)
    return Features({**sima.features("preferences"), **{n: Value("float32") for n in more}})


class Prefer(Step):
    """A critique -> a preference row; dropped where nothing may be chosen.

    Args:
        clean_only: only responses that the scorer calls free of hallucination may be chosen (arXiv
            2512.00706).
        min_margin: least difference between the scores of chosen and rejected.
        mean_margin: `weight` is the margin over this one.
    """

    columns: ClassVar[dict[str, pa.DataType]] = {
        **{name: TURNS for name in ("prompt", "chosen", "rejected")},
        **{name: pa.string() for name in ("chosen_source", "verdict", "critic")},
        **{name: pa.float32() for name in ("margin", "weight")},
    }

    def __init__(self, clean_only: bool, min_margin: float, mean_margin: float) -> None:
        super().__init__()
        self.clean_only, self.min_margin = clean_only, min_margin
        self.mean_margin = mean_margin

    def process(self, row: Row) -> Row:
        scores = {i: score for i, score in enumerate(row["scores"]) if score is not None}
        chosen = max(self._choosable(row, scores), key=lambda i: (scores[i], -i))
        rejected = min(scores, key=lambda i: (scores[i], i))
        margin = scores[chosen] - scores[rejected]
        if margin <= 0 or margin < self.min_margin:
            raise Dropped(f"small margin: {margin:.3f}, the least is {self.min_margin}")
        one, other = row["responses"][chosen], row["responses"][rejected]
        return {
            **row,
            "prompt": _said("user", row["question"]),
            "chosen": _said("assistant", one["text"]),
            "rejected": _said("assistant", other["text"]),
            "chosen_source": one["source"],
            "verdict": f"{one['source']} over {other['source']}",
            "margin": margin,
            "weight": margin / self.mean_margin,
        }

    def _choosable(self, row: Row, scores: dict[int, float]) -> list[int]:
        if len(scores) < 2:
            raise Dropped("no scores: fewer than two responses have one")
        if not self.clean_only:
            return list(scores)
        if all(row["clean"][i] is None for i in scores):
            raise ValueError(
                f"{row['critic']} does not say which responses are clean: leave --clean-only out, "
                "or score with chair or evidence"
            )
        clean = [i for i in scores if row["clean"][i]]
        if not clean:
            raise Dropped("no clean response")
        return clean


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def mean_margin(source: Path) -> float:
    """Mean difference between the best and the worst score of a prompt, above 0."""
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    margins = []
    for file in files:
        for scores in parquet.read_table(file, columns=["scores"])["scores"].to_pylist():
            known = [score for score in scores or () if score is not None]
            if len(known) > 1:
                margins.append(max(known) - min(known))
    return sum(margins) / len(margins) if sum(margins) else 1.0


def prefer(
    data: str,
    out: str | Path,
    clean_only: bool = False,
    min_margin: float = 0.0,
    weights: bool = False,
    split: str = "train",
    workers: int = 1,
) -> dict[str, int]:
    """Put preference rows of the critiques of `data` into `out/data`, and a card.

    Args:
        data: what `augment critique` wrote.
        out: a folder of its own.
        clean_only, min_margin: see Prefer.
        weights: add `weight`, a pair's margin over the mean margin, which the trainer multiplies
            its loss by.
        split: of the Hub's data set.
        workers: shards of 256 rows under way at once.

    Returns:
        Rows `kept` and `dropped`.

    Raises:
        ValueError: for rows without scores, or an `out` with a run of other settings.
    """
    out = Path(out)
    source = parquet_source(data, split, out)
    hint = "critiques are written by `firsthand augment critique`"
    require_columns(
        source, data, dict.fromkeys(("images", "question", "responses", "scores"), hint)
    )
    settings = {"clean_only": clean_only, "min_margin": min_margin, "weights": weights}
    keep_plan(
        out / "state" / "about.json", {"data": conversations.fingerprint(data, split), **settings}
    )
    step = Prefer(clean_only, min_margin, mean_margin(source))
    columns = features(weights)
    counts = run_stages(source, out, [step], workers, kept=columns.arrow_schema)
    told = {**counts, **{f"dropped: {k}": n for k, n in conversations.reasons(out).items()}}
    about = f"Made by firsthand from a model's own responses. Settings: `{json.dumps(settings)}`."
    sima.write_card(out, "preferences", "train", told, Path(data).name, columns, about)
    return counts


def run(args: argparse.Namespace) -> int:
    """The verb: prefer, and print what came out."""
    counts = prefer(
        args.data,
        args.out,
        args.clean_only,
        args.min_margin,
        args.weights,
        args.split,
        args.workers,
    )
    report(Path(args.out), counts)
    return 0
