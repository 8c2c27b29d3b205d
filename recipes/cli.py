"""The command line: `firsthand <verb>`; every parser stands here and every handler is imported
late.

What it is: argparse and one dispatch. What it is not: a place for work; verbs live in the module
that their parser names.

    firsthand --help
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

EXPECTED = (ValueError, OSError, ImportError)  # the user's input or machine, not our bug


def _common_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hub id or path; the demo model if absent")


def _demo(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("demo", help="answer, measure, explain, steer and measure again")
    parser.add_argument("--out", default="firsthand-demo", help="folder for results and report")
    _common_model(parser)
    parser.add_argument("--images", help="a folder of your images, explained beside the scenes")
    parser.add_argument("--question", default="Describe the image.", help="asked about --images")
    parser.add_argument("--scenes", type=int, default=32, help="scenes of each test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(module="demo")


def _env(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("env", help="what is installed here, for bug reports")
    parser.set_defaults(module="env")


def _measure(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("measure", help="score prediction rows")
    metrics = parser.add_subparsers(dest="metric", required=True, metavar="METRIC")
    chair = metrics.add_parser("chair", help="hallucinated objects in captions")
    pope = metrics.add_parser("pope", help="yes/no questions on existence; rows carry `answer`")
    reliance = metrics.add_parser(
        "visual-reliance", help="drop without key regions; rows carry `answer` and `condition`"
    )
    for one in (chair, pope, reliance):
        one.add_argument(
            "--predictions", required=True, help="prediction rows, .jsonl or .jsonl.gz"
        )
        one.add_argument("--out", help="write result rows to this JSON file")
        one.add_argument("--arm", default="plain", help="name of the model or method")
        one.add_argument("--split", default="all", help="name of the split")
        one.set_defaults(module="measure")
    chair.add_argument("--objects", required=True, help="JSON {image_id: [object, ...]}")
    chair.add_argument("--nouns", help="text file of nouns, one a line, instead of COCO's lexicon")
    chair.add_argument("--details", help="write one row a caption to this JSONL file")
    pope.add_argument("--parser", default="strict", choices=("strict", "pope", "exact"))


def _explain(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("explain", help="where an answer came from")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    tokens = kinds.add_parser("tokens", help="a heatmap for every word of the answer")
    _common_model(tokens)
    tokens.add_argument("--image", required=True)
    tokens.add_argument("--question", default="Describe the image.")
    tokens.add_argument("--answer", help="explain this answer instead of the model's own")
    tokens.add_argument("--out", default="firsthand-explanation", help="folder for maps and figure")
    tokens.set_defaults(module="explain_tokens")


def _steer(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("steer", help="fit a steering vector, or answer with one")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fit = actions.add_parser("fit", help="from contrast pairs (JSONL), or the demo's scenes")
    _common_model(fit)
    fit.add_argument("--pairs", help='JSONL rows {"positive": {image, question, answer}, ...}')
    fit.add_argument("--method", default="mean", choices=("mean", "svd", "pca"))
    fit.add_argument("--out", required=True, help="folder for the vector")
    apply = actions.add_parser("apply", help="plain and steered answer side by side")
    _common_model(apply)
    apply.add_argument("--vector", required=True, help="folder or Hub id of a steering vector")
    apply.add_argument("--strength", type=float, help="the vector's own if absent")
    apply.add_argument("--image", required=True)
    apply.add_argument("--question", default="Describe the image.")
    for one in (fit, apply):
        one.set_defaults(module="steer")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="firsthand",
        description="Find out, explain and mend hallucination in vision-language models.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_demo, _measure, _explain, _steer, _env):
        add(verbs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Expected failures become one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        return import_module(f"firsthand.recipes.{args.module}").run(args)
    except KeyboardInterrupt:
        print(
            "\nfirsthand: stopped; what was finished is kept, run again to go on", file=sys.stderr
        )
        return 130
    except EXPECTED as error:
        if os.environ.get("FIRSTHAND_DEBUG"):
            raise
        print(f"firsthand: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
