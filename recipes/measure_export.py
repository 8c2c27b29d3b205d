"""`firsthand measure export`: result rows as Hub Eval Results, which a model's page shows.

What it is: rows of a results file as `.eval_results/*.yaml` (one value per benchmark data set and
task, with interval, n and protocol in its notes), and, where asked, as the older `model-index` of
a model card. What it is not: an upload; put the file into the model's repo.

    firsthand measure export results.json --dataset-id org/data --task-id 'chair_{metric}' \
        --out .eval_results/chair.yaml
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.utils import validate_repo_id

from firsthand.metrics import results

Row = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Write the chosen rows; print what went out and how many rows have no value."""
    _require_names(args)
    rows = chosen_rows(results.read_results(args.results), args)
    defined = [row for row in rows if not math.isnan(row["value"])]
    if not defined:
        raise ValueError(f"{args.results}: all {len(rows)} chosen rows are undefined (null)")
    found = entries(defined, args.dataset_id, args.task_id, args.source_url)
    _write(Path(args.out), yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False))
    for entry in found:
        print(f"{entry.dataset_id} {entry.task_id}: {entry.value:.4f} ({entry.notes})")
    print(f"written: {len(found)} to {args.out}; undefined and left out: {len(rows) - len(found)}")
    if args.model_card:
        write_model_index(Path(args.model_card), defined, args.dataset_id)
    return 0


def _require_names(args: argparse.Namespace) -> None:
    validate_repo_id(args.dataset_id)
    if "/" not in args.dataset_id:
        raise ValueError(f"--dataset-id {args.dataset_id!r} is no Hub id like org/data")
    if Path(args.out).suffix != ".yaml":
        raise ValueError(f"--out {args.out}: the Hub reads .eval_results/*.yaml, so name it .yaml")
    if args.model_card and not Path(args.model_card).is_file():
        raise FileNotFoundError(f"{args.model_card}: no such model card; write one first")


def chosen_rows(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """The rows of the metrics, arm and split asked for.

    Raises ValueError where none is left, or where arms are mixed: they are different models.
    """
    asked = {
        "metric": args.metrics,
        "arm": args.arm and [args.arm],
        "split": args.split and [args.split],
    }
    for field, wanted in asked.items():
        there = list(dict.fromkeys(row[field] for row in rows))
        if missing := [name for name in wanted or [] if name not in there]:
            raise ValueError(
                f"{args.results} has no {field} {', '.join(missing)}; it has {', '.join(there)}"
            )
        rows = [row for row in rows if not wanted or row[field] in wanted]
    if not rows:
        raise ValueError(f"{args.results} holds no result rows: there is nothing to export")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    if len(arms) > 1:
        raise ValueError(
            f"{args.results} measures {len(arms)} arms ({', '.join(arms)}), and a model's page "
            "shows one: choose with --arm"
        )
    return rows


def entries(
    rows: list[Row], dataset_id: str, task_id: str, source_url: str | None = None
) -> list[EvalResultEntry]:
    """One entry a row; `{metric}` and `{split}` in the task id are filled in.

    Values are as in the results file: fractions, not percent. Raises ValueError where two rows
    would have the same task.
    """
    found: dict[str, EvalResultEntry] = {}
    for row in rows:
        task = task_id.replace("{metric}", row["metric"]).replace("{split}", row["split"])
        if task in found:
            raise ValueError(
                f"the task id {task!r} would stand for several values: write {{metric}} (and "
                "{split}) into --task-id, or choose one with --metrics and --split"
            )
        found[task] = EvalResultEntry(
            dataset_id=dataset_id,
            task_id=task,
            value=row["value"],
            source_url=source_url,
            notes=notes(row),
        )
    return list(found.values())


def notes(row: Row) -> str:
    """`chair_i, 95 % interval 0.100 to 0.400, n=40, variant original, ..., protocol 0123abcd`."""
    protocol = row["protocol"]
    told = [
        f"{row['metric']} of {row['arm']} on {row['split']}",
        f"95 % interval {row['low']:.4f} to {row['high']:.4f}",
        f"n={row['n']}",
    ]
    for field in ("variant", "decoding", "max_new_tokens", "prompt"):
        if protocol.get(field) is not None:
            told.append(f"{field} {protocol[field]}")
    return ", ".join([*told, f"protocol {protocol.get('fingerprint')}"])


def write_model_index(path: Path, rows: list[Row], dataset_id: str) -> None:
    """Add the rows to a model card's `model-index`; equal metrics of the data set are replaced.

    The model is called as the card says, or else as the card's folder.
    """
    card = ModelCard.load(path)
    data = card.data
    if not isinstance(data, ModelCardData):
        raise TypeError(f"{path} is no model card")
    new = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=dataset_id,
            dataset_name=dataset_id,
            dataset_split=row["split"],
            metric_type=row["metric"],
            metric_value=row["value"],
            metric_args={"interval": [row["low"], row["high"]], "n": row["n"]},
        )
        for row in rows
    ]
    taken = {(one.dataset_type, one.dataset_split, one.metric_type) for one in new}
    kept = [
        one
        for one in data.eval_results or []
        if (one.dataset_type, one.dataset_split, one.metric_type) not in taken
    ]
    data.eval_results = kept + new
    data.model_name = data.model_name or path.resolve().parent.name
    _write(path, str(card))


def _write(path: Path, text: str) -> None:
    """Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".aside")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)
