"""The options of `firsthand measure`.

What it is: argparse only, imported by every call of `firsthand`. What it is not: work.

    firsthand measure --help
"""

from __future__ import annotations

import argparse

from firsthand.recipes.cli_options import answering, chair_truth, common_model


def measure_answers(parser: argparse.ArgumentParser) -> None:
    """Fills the parser of `answers`, which has the options of whom to ask."""
    parser.add_argument(
        "--data", required=True, help="JSONL rows, Parquet or a Hub id: questions about images"
    )
    parser.add_argument("--images", help="folder that the rows' image paths start from")
    parser.add_argument("--split", default="train", help="of the Hub's data set")
    parser.add_argument("--out", required=True, help="write prediction rows to this JSONL file")
    parser.add_argument("--cache", help="folder of answers given; beside --out if absent")
    parser.set_defaults(module="measure_answers")


def _measure_reliance(metrics: argparse._SubParsersAction) -> argparse.ArgumentParser:
    reliance = metrics.add_parser(
        "visual-reliance",
        help="drop without key regions: asks about --data, or scores rows with `condition`",
    )
    reliance.add_argument(
        "--data", help="grounded samples: Parquet or Hub id; `scenes` are the demo's"
    )
    common_model(reliance)
    reliance.add_argument("--count", type=int, help="scenes or samples; all if absent")
    reliance.add_argument("--answers", help="JSON {id: [accepted answer, ...]}, scored as VQA does")
    reliance.add_argument("--region", default="bbox", choices=("bbox", "mask"))
    reliance.add_argument("--fill", default="mean", choices=("mean", "black", "noise", "blur"))
    reliance.add_argument("--seed", type=int, default=0, help="of noise and of the control's place")
    reliance.add_argument("--max-new-tokens", type=int, default=16)
    reliance.add_argument("--batch-size", type=int, default=8)
    return reliance


def _measure_key_expressions(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser(
        "key-expressions", help="a judge's view of expressions and masks (FiVL's evaluation)"
    )
    parser.add_argument("--data", required=True, help="grounded samples; `scenes` are the demo's")
    parser.add_argument("--split", default="train", help="of the Hub's data set or the scenes")
    parser.add_argument("--count", type=int, help="samples; all if absent")
    parser.add_argument("--endpoint", required=True, help="base URL of an OpenAI-compatible server")
    parser.add_argument("--judge", required=True, help="the model's name there")
    parser.add_argument("--out", required=True, help="write result rows to this JSON file")
    parser.add_argument("--details", help="write every reply to this JSONL file")
    parser.add_argument("--cache", help="folder of answered requests; beside --out if absent")
    parser.set_defaults(module="measure_key_expressions")


COMPARED = ("chair", "pope", "amber", "mementos", "mmhal", "gqa", "gavie", "visual-reliance")


def _measured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="write result rows to this JSON file")
    parser.add_argument("--split", default="all", help="name of the split")


def _answered_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoding", default="as given", help="of the answers, for the protocol")
    parser.add_argument("--max-new-tokens", type=int, help="of the answers, for the protocol")
    parser.add_argument(
        "--skip-bad", action="store_true", help="count rows that cannot be scored, and go on"
    )


def _chair_options(parser: argparse.ArgumentParser) -> None:
    chair = chair_truth(parser)
    chair.add_argument("--at-words", type=int, metavar="N", help="of the first N words a caption")
    chair.add_argument(
        "--at-recall", type=float, metavar="R", help="of captions cut alike to where R is reached"
    )


def _pope_options(parser: argparse.ArgumentParser) -> None:
    pope = parser.add_argument_group("pope")
    pope.add_argument("--questions", help="POPE's published file, where rows lack `answer`")
    pope.add_argument(
        "--parser",
        default="strict",
        choices=("strict", "pope", "opera", "lmms_eval", "exact", "vcd"),
        help="how an answer is read; the others are as published",
    )


def _amber_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("amber").add_argument(
        "--amber-data", help="AMBER's folder `data`: annotations, relation and safe words"
    )


def _mementos_options(parser: argparse.ArgumentParser) -> None:
    mementos = parser.add_argument_group("mementos")
    mementos.add_argument("--references", help="JSON {image_id: description, or lists of keywords}")
    mementos.add_argument(
        "--keywords", help='JSON {"objects": [[term, synonym, ...], ...], "behaviours": [...]}'
    )


def _judge_options(parser: argparse.ArgumentParser) -> None:
    judge = parser.add_argument_group("judge, of mmhal, gqa and gavie")
    judge.add_argument("--endpoint", help="the judge's URL; its key is read from OPENAI_API_KEY")
    judge.add_argument(
        "--judge-model", help="its name there; without --endpoint a model of this process"
    )
    judge.add_argument("--cache", help="folder of answered requests; beside --out if absent")
    judge.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    judge.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer")
    judge.add_argument(
        "--price",
        nargs=2,
        type=float,
        default=(0.0, 0.0),
        metavar=("PROMPT", "COMPLETION"),
        help="US dollars per million tokens",
    )


def _gavie_options(parser: argparse.ArgumentParser) -> None:
    gavie = parser.add_argument_group("gavie")
    gavie.add_argument(
        "--regions", help="dense captions: vg_annotation.json, region_descriptions.json or `scenes`"
    )
    gavie.add_argument("--offline", action="store_true", help="marks by rule, for --regions scenes")
    gavie.add_argument("--samples", type=int, default=1, help="times that each answer is judged")
    gavie.add_argument(
        "--bbox-format",
        default="fixed",
        choices=("fixed", "legacy"),
        help="legacy: widths in place of heights, as published",
    )


def _measure_gavie(metrics: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = metrics.add_parser("gavie", help="a judge's marks for relevance and accuracy, 0 to 10")
    parser.add_argument(
        "--mode",
        default="single",
        choices=("single", "joint"),
        help="joint: answers of all files in one prompt, as published",
    )
    parser.add_argument("--others", nargs="+", metavar="FILE", help="other models', for joint")
    parser.add_argument("--seed", type=int, default=0, help="of the answers' order in joint mode")
    return parser


def _measure_compare(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser(
        "compare", help="the paired difference of two files of predictions, with its interval"
    )
    parser.add_argument("a", help="prediction rows, .jsonl or .jsonl.gz")
    parser.add_argument("b", help="the other answers to the same questions")
    parser.add_argument("--metric", dest="compared", required=True, choices=COMPARED)
    parser.add_argument("--common", action="store_true", help="only the ids that both have")
    parser.add_argument("--arms", nargs=2, metavar=("A", "B"), help="names; the files' if absent")
    _measured(parser)
    _answered_by(parser)
    _chair_options(parser)
    _pope_options(parser)
    _amber_options(parser)
    _mementos_options(parser)
    _judge_options(parser)
    _gavie_options(parser)
    parser.set_defaults(module="measure_compare", data=None)


def _measure_export(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser("export", help="result rows as Hub Eval Results for a model's page")
    parser.add_argument("results", help="what --out of a measure wrote")
    parser.add_argument("--dataset-id", required=True, help="the benchmark's Hub id, org/data")
    parser.add_argument(
        "--task-id", required=True, help="the task there; {metric} and {split} are filled in"
    )
    parser.add_argument("--out", required=True, help="a file .eval_results/NAME.yaml")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--arm", help="whose results, where the file has several arms")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--source-url", help="link to the evaluation")
    parser.add_argument("--model-card", help="also add them to this README.md's model-index")
    parser.set_defaults(module="measure_export")


def _measure_lmms_eval(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser("lmms-eval", help="lmms-eval's tasks (MME, GQA, ...) on a model")
    parser.add_argument("--tasks", required=True, help="names of lmms-eval's, by commas")
    parser.add_argument("--include-path", help="a folder with tasks of your own")
    common_model(parser)
    parser.add_argument("--vector", help="folder or Hub id of a steering vector to attach")
    parser.add_argument("--strength", type=float, help="the vector's own if absent")
    parser.add_argument("--limit", type=int, help="only the first documents of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gen-kwargs", help="key=value,... over the tasks' generation settings")
    parser.add_argument("--arm", help="plain, or steered with --vector, if absent")
    parser.add_argument("--out", required=True, help="write result rows to this JSON file")
    parser.add_argument("--details", help="write a prediction row a document to this JSONL file")
    parser.set_defaults(module="measure_lmms_eval")


def _measure_answers(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser("answers", help="a model's answers, as prediction rows")
    answering(parser, 64)
    measure_answers(parser)


def add(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb."""
    parser = verbs.add_parser("measure", help="score prediction rows, compare and export results")
    metrics = parser.add_subparsers(dest="metric", required=True, metavar="METRIC")
    chair = metrics.add_parser("chair", help="hallucinated objects in captions")
    pope = metrics.add_parser("pope", help="yes/no questions on existence; rows carry `answer`")
    amber = metrics.add_parser("amber", help="AMBER's descriptions and questions, by exact words")
    mementos = metrics.add_parser("mementos", help="objects and behaviours told of image sequences")
    mmhal = metrics.add_parser("mmhal", help="a judge's rating of answers, from 0 to 6")
    gqa = metrics.add_parser("gqa", help="a judge's view of whether free answers are right")
    gavie = _measure_gavie(metrics)
    reliance = _measure_reliance(metrics)
    for one in (chair, pope, amber, mementos, mmhal, gqa, gavie, reliance):
        one.add_argument(
            "--predictions", required=True, help="prediction rows, .jsonl or .jsonl.gz"
        )
        one.add_argument("--arm", default="plain", help="name of the model or method")
        _measured(one)
        one.set_defaults(module="measure", common=False)
    gavie.set_defaults(module="measure_gavie")
    reliance.set_defaults(module="measure_visual_reliance", skip_bad=False, details=None)
    for one in (chair, pope, amber, mementos, mmhal, gqa, gavie):
        one.add_argument("--details", help="write what each row was read as to this JSONL file")
        _answered_by(one)
    _chair_options(chair)
    _pope_options(pope)
    _amber_options(amber)
    _mementos_options(mementos)
    for one in (mmhal, gqa, gavie):
        _judge_options(one)
    _gavie_options(gavie)
    _measure_key_expressions(metrics)
    _measure_compare(metrics)
    _measure_export(metrics)
    _measure_lmms_eval(metrics)
    _measure_answers(metrics)
