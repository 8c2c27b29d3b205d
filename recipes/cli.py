"""The command line: `firsthand <verb>`; parsers stand here and in `cli_<verb>.py`, and every
handler is imported late.

What it is: argparse and one dispatch. What it is not: a place for work; verbs live in the module
that their parser names.

    firsthand --help
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from firsthand.recipes import cli_augment, cli_explain, cli_measure, cli_steer
from firsthand.recipes.cli_options import common_model

EXPECTED = (ValueError, OSError, ImportError)  # the user's input or machine, not our bug


def _demo(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("demo", help="answer, measure, explain, steer and measure again")
    parser.add_argument("--out", default="firsthand-demo", help="folder for results and report")
    common_model(parser)
    parser.add_argument("--images", help="a folder of your images, explained beside the scenes")
    parser.add_argument("--question", default="Describe the image.", help="asked about --images")
    parser.add_argument("--scenes", type=int, default=32, help="scenes of each test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(module="demo")


def _env(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("env", help="what is installed here, for bug reports")
    parser.set_defaults(module="env")


def _train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("train", help="what follows training; recipes train")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = actions.add_parser("merge", help="put trained adapters into their model")
    merge.add_argument(
        "--adapter",
        required=True,
        action="append",
        help="the folder that LoRA training wrote; again for each later round, in order",
    )
    common_model(merge)
    merge.add_argument("--out", required=True, help="folder for the merged model and processor")
    merge.set_defaults(module="train_merge")
    _train_convert(actions)


def _train_convert(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("convert", help="a published checkpoint as a Hub-native one")
    parser.add_argument(
        "--kind",
        required=True,
        choices=(
            "llava",
            "llava-projector",
            "conv-llava",
            "minigpt4",
            "mplug-owl",
            "mplug-owl2",
            "lrv-lora",
        ),
        help="whose files; llava: LLaVA-1.5's and SIMA's",
    )
    parser.add_argument("--weights", required=True, help="the model's own file or folder")
    parser.add_argument("--vision", help="file or folder of the vision encoder, where it is apart")
    parser.add_argument("--qformer", help="file of BLIP-2's Q-Former (minigpt4)")
    parser.add_argument("--language", help="folder of the Llama; lrv-lora: of the converted model")
    parser.add_argument("--out", required=True, help="folder for model and processor, or adapter")
    parser.set_defaults(module="convert_checkpoint")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="firsthand",
        description="Find out, explain and mend hallucination in vision-language models.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _demo,
        cli_augment.add,
        _train,
        cli_measure.add,
        cli_explain.add,
        cli_steer.add,
        _env,
    ):
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
