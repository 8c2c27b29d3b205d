"""`firsthand measure lmms-eval`: lmms-eval's tasks on our models, plain or steered.

What it is: lmms-eval's own evaluator on `FirsthandModel`, its figures as result rows, its logged
samples as prediction rows. What it is not: a benchmark of ours; prompts, parsing and scores are
lmms-eval's. docs/lmms_eval.md says how it is installed beside CPU torch.

    firsthand measure lmms-eval --tasks gqa,textvqa_val --model org/model --out results.json
    firsthand measure lmms-eval --tasks gqa --vector vector --strength 0.8 --out steered.json
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

from firsthand.metrics import results
from firsthand.recipes.inputs import load_model, write_rows

Row = dict[str, Any]
REQUIREMENTS = Path(__file__).parent / "configs" / "lmms_eval.txt"
VERSION = "0.7.3"  # the one that was tried; its interface changes with every release
JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")  # what lmms-eval's judges read


def run(args: argparse.Namespace) -> int:
    """Measure task by task; what is measured is written before the next task starts.

    Raises ValueError where lmms-eval is absent, a task is unknown, or, at the end, for the tasks
    that failed.
    """
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if args.strength is not None and args.vector is None:
        raise ValueError("--strength is that of a steering vector: add --vector")
    manager = _manager(args, names)
    model, processor = load_model(args.model)
    made: list[Row] = []
    details: list[Row] = []
    failed: dict[str, str] = {}
    with _steering(model, args):
        for name in names:
            try:
                rows, samples, unjudged = evaluate_task(args, name, manager, model, processor)
            except (ValueError, OSError, ImportError) as error:
                failed[name] = " ".join(str(error).split())
                continue
            failed |= unjudged
            made, details = made + rows, details + samples
            results.write_results(args.out, made)
            if args.details:
                write_rows(args.details, details)
    print(results.table(made))
    if failed:
        raise ValueError(
            "; ".join(f"{name} was not measured: {why}" for name, why in failed.items())
        )
    return 0


def _manager(args: argparse.Namespace, names: list[str]) -> Any:
    """lmms-eval's index of tasks, which has all names."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(
            "lmms-eval is not installed. It requires torchvision, which does not load beside CPU "
            f"torch, so install it without: pip install -r {REQUIREMENTS} && pip install --no-deps "
            f"lmms-eval=={VERSION} (docs/lmms_eval.md)"
        )
    import lmms_eval.evaluator  # noqa: F401  it sets up lmms-eval's logging
    from lmms_eval.tasks import TaskManager

    if args.include_path and not Path(args.include_path).is_dir():
        raise FileNotFoundError(f"{args.include_path}: no such folder of tasks")
    manager = TaskManager("WARNING", include_path=args.include_path, model_name="firsthand")
    if not names or (unknown := sorted(set(names) - set(manager.all_tasks))):
        missing = ", ".join(unknown) if names else "nothing"
        raise ValueError(
            f"lmms-eval {metadata.version('lmms-eval')} has no task {missing}. Names are those of "
            "`lmms-eval tasks list`; --include-path adds a folder of your own"
        )
    return manager


def _steering(model: Any, args: argparse.Namespace) -> AbstractContextManager[Any]:
    if args.vector is None:
        return nullcontext()
    from firsthand.modeling import SteeringVector, attach_steering

    return attach_steering(model, SteeringVector.from_pretrained(args.vector), args.strength)


def evaluate_task(
    args: argparse.Namespace, name: str, manager: Any, model: Any, processor: Any
) -> tuple[list[Row], list[Row], dict[str, str]]:
    """Result rows and prediction rows of a task, or of all tasks of a group, and the figures that
    lack their judge's verdicts, each with the reason.

    Raises ValueError where the task cannot be put to our models, or none of its documents can.
    """
    from lmms_eval.evaluator import simple_evaluate

    from firsthand.recipes.lmms_eval_adapter import FirsthandModel

    asked = FirsthandModel(model, processor, args.batch_size)
    folder = str(Path(args.out).parent)  # where some tasks write files to be submitted
    found = simple_evaluate(
        model=asked,
        tasks=[name],
        task_manager=manager,
        limit=args.limit,
        gen_kwargs=args.gen_kwargs,
        bootstrap_iters=0,  # the intervals are ours
        cli_args=argparse.Namespace(
            output_path=folder, process_with_media=False, reasoning_tags=None
        ),
        verbosity="WARNING",
    )
    made: list[Row] = []
    details: list[Row] = []
    unjudged: dict[str, str] = {}
    for task, samples in found["samples"].items():
        errors = {doc: why for (of, doc), why in asked.errors.items() if of == task}
        _report(task, errors, len(samples))
        details += prediction_rows(task, found, asked)
        for row in task_rows(args, task, found, asked, len(errors)):
            if reason := judge_failure(task, row["metric"], samples):
                unjudged[f"{task}'s {row['metric']}"] = reason
            else:
                made.append(row)
    return made, details, unjudged


def judge_failure(task: str, metric: str, samples: list[Row]) -> str | None:
    """Why a judge's figure is none: lmms-eval itself goes on, and reports 100 for LLaVA-Bench
    without a single verdict, and guesses for MMBench.
    """
    verdicts = [sample[metric] for sample in samples if isinstance(sample.get(metric), dict)]
    failed = [
        v for v in verdicts if v.get("eval_model") == "Failed Request" or -1 in v.get("scores", [])
    ]
    if failed:
        return f"the judge gave no verdict on {len(failed)} of {len(samples)} documents"
    asks = metric.startswith("gpt_") and "static" not in task  # lmms-eval's word for no judge
    if asks and not any(os.environ.get(name) for name in JUDGE_KEYS):
        return f"it asks a judge, and none of {', '.join(JUDGE_KEYS)} is set"
    return None


def _report(task: str, errors: Mapping[Any, str], count: int) -> None:
    if not errors:
        return
    first = next(iter(errors.values()))
    if len(errors) == count:
        raise ValueError(f"none of its {count} documents can be asked: {first}")
    print(
        f"{task}: {len(errors)} of {count} documents were not asked ({first}); lmms-eval scores "
        "their empty answers"
    )


def prediction_rows(task: str, found: Row, asked: Any) -> list[Row]:
    """`{id, image_id, question, prediction, answer, task, scores}` of lmms-eval's samples."""
    rows, figures = [], {m["metric"] for m in found["configs"][task]["metric_list"]}
    for sample in found["samples"][task]:
        key = (task, sample["doc_id"])
        said = sample["filtered_resps"][0]
        row = {
            "id": f"{task}/{sample['doc_id']}",
            "image_id": asked.images[key],
            "question": sample["arguments"][0],
            "prediction": said if isinstance(said, str) else said[0],
            "answer": sample["target"],
            "task": task,
            "scores": {m: v for m, v in sample.items() if m in figures and isinstance(v, Real)},
        }
        rows.append(row | ({"error": asked.errors[key]} if key in asked.errors else {}))
    return rows


def task_rows(
    args: argparse.Namespace, task: str, found: Row, asked: Any, n_errors: int
) -> list[Row]:
    """A result row a figure of the task; its split is named `<task>`.

    The interval is a bootstrap over images where the figure is the mean of its samples' numbers;
    where the task has its own aggregation it is undefined (NaN).
    """
    samples, config = found["samples"][task], found["configs"][task]
    averaged = {m["metric"] for m in config["metric_list"] if m.get("aggregation") == "mean"}
    groups = [asked.images[(task, sample["doc_id"])] for sample in samples]
    protocol = _protocol(args, task, found, n_errors)
    rows = []
    for key, value in found["results"][task].items():
        metric, _, kept = key.partition(",")
        if not kept or "_stderr" in metric or not isinstance(value, Real):
            continue
        name = metric if kept == "none" else f"{metric}_{kept}"
        interval = (float(value), math.nan, math.nan)
        columns = [sample.get(metric) for sample in samples]
        if metric in averaged and all(isinstance(column, Real) for column in columns):
            interval = (float(value), *results.bootstrap(columns, groups=groups)[1:])
        arm = args.arm or ("plain" if args.vector is None else "steered")
        row = results.result_row(
            name, interval, len(samples), arm=arm, split=task, protocol=protocol
        )
        rows.append(row)
    return rows


def _protocol(args: argparse.Namespace, task: str, found: Row, n_errors: int) -> Row:
    config = found["configs"][task]
    version = metadata.version("lmms-eval")
    wanted = config.get("generation_kwargs") or {}
    made = results.protocol(
        [f"{task}/{sample['doc_id']}" for sample in found["samples"][task]],
        decoding="greedy" + (f", {args.gen_kwargs}" if args.gen_kwargs else ""),
        max_new_tokens=wanted.get("max_new_tokens"),
        variant=f"lmms-eval {version}, {task} version {found['versions'][task]}",
        libraries=(*results.LIBRARIES, "lmms-eval"),
    )
    return made | {"task": task, "n_errors": n_errors}
