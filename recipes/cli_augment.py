"""The options of `firsthand augment`.

What it is: argparse only, imported by every call of `firsthand`. What it is not: work.

    firsthand augment --help
"""

from __future__ import annotations

import argparse

from firsthand.recipes.cli_options import answering, chair_truth


def augment_lrv(kinds: argparse._SubParsersAction) -> None:
    """Adds `lrv`."""
    parser = kinds.add_parser("lrv", help="instructions, true and misleading, from dense captions")
    parser.add_argument(
        "--data",
        required=True,
        help="region_descriptions.json, COCO instances, JSONL, a folder of chart tables, scenes",
    )
    parser.add_argument("--images", help="folder of the images, where records do not carry them")
    parser.add_argument("--captions", help="COCO's captions_*.json, beside its instances")
    parser.add_argument("--out", required=True, help="folder for Parquet and card")
    parser.add_argument(
        "--generator", default="rules", choices=("rules", "endpoint"), help="rules: offline"
    )
    parser.add_argument("--endpoint", help="base URL; its key is read from OPENAI_API_KEY")
    parser.add_argument("--endpoint-model", help="the name that the endpoint knows the model by")
    parser.add_argument("--positives", type=int, default=10, help="an image")
    parser.add_argument("--negatives", type=int, default=3, help="an image, of each kind")
    parser.add_argument("--max-words", type=int, default=30, help="of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the rules")
    parser.add_argument("--split", default="train", help="of the scenes or the Hub's data set")
    parser.add_argument("--workers", type=int, default=1, help="shards under way at once")
    parser.set_defaults(module="augment_lrv")


def _staged(parser: argparse.ArgumentParser, data: str) -> None:
    parser.add_argument("--data", required=True, help=f"Parquet or Hub id of {data}")
    parser.add_argument("--split", default="train", help="of the Hub's data set")
    parser.add_argument("--out", required=True, help="folder for Parquet")
    parser.add_argument("--workers", type=int, default=1, help="shards under way at once")


def _augment_responses(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("responses", help="a model's own answers, greedy and drawn")
    _staged(parser, "prompts (images, question)")
    answering(parser, 1024)
    parser.add_argument("--candidates", type=int, default=1, help="drawn answers a prompt")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0, help="of drawn answers")
    parser.set_defaults(module="augment_responses")


def _augment_critique(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("critique", help="which of a prompt's responses is better")
    _staged(parser, "responses")
    answering(parser, 512)
    parser.add_argument(
        "--scorer",
        default="critic",
        help="critic, chair, evidence (what the model sees of object words), gavie, or "
        "package.module:function",
    )
    critic = parser.add_argument_group("critic")
    critic.add_argument(
        "--orders", default="both", choices=("both", "one"), help="one: drawn response first"
    )
    critic.add_argument(
        "--reading",
        default="strict",
        choices=("strict", "published", "choice"),
        help="of a verdict; choice: the more probable of 1 and 2, without a reason",
    )
    critic.set_defaults(temperature=1.0, top_p=1.0, seed=0)
    chair_truth(parser).add_argument(
        "--recall-weight", type=float, default=0.0, help="score: weight * recall - CHAIR_i"
    )
    parser.add_argument_group("gavie").add_argument(
        "--regions", help="dense captions of the images: JSON, Visual Genome's file, or `scenes`"
    )
    evidence = parser.add_argument_group("evidence")
    evidence.add_argument("--support-weight", type=float, default=0.5)
    evidence.add_argument("--ceiling", type=float, default=5.0, help="nats of support that count")
    evidence.add_argument("--threshold", type=float, default=0.0, help="nats of a clean word")
    parser.set_defaults(module="augment_critique")


def _augment_preferences(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("preferences", help="critiques as preference rows for training")
    _staged(parser, "critiques")
    parser.add_argument(
        "--clean-only", action="store_true", help="only responses without hallucination are chosen"
    )
    parser.add_argument("--min-margin", type=float, default=0.0, help="least difference of scores")
    parser.add_argument(
        "--weights", action="store_true", help="weigh each pair by its difference of scores"
    )
    parser.set_defaults(module="augment_preferences")


def add(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb."""
    parser = verbs.add_parser("augment", help="make training data out of conversations")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (
        *(_augment_responses, _augment_critique, _augment_preferences),
        augment_lrv,
    ):
        add(kinds)
    fivl = kinds.add_parser("fivl", help="key expressions of answers and their masks")
    fivl.add_argument("--data", required=True, help="LLaVA-format JSON(L), Parquet or Hub id")
    fivl.add_argument("--images", help="folder that the records' image paths start from")
    fivl.add_argument("--out", required=True, help="folder for Parquet and card")
    fivl.add_argument(
        "--segmenter",
        default="vision-logits",
        choices=(
            "vision-logits",
            "annotated",
            "sam3",
            "grounding-dino+sam",
            "mm-grounding-dino+sam2",
            "grounding-dino+segment-anything",
        ),
        help="what finds an expression in the image; annotated: masks that the records carry",
    )
    fivl.add_argument("--model", help="of vision-logits (the demo model if absent) or sam3")
    fivl.add_argument("--detector", help="of grounding-dino+..., where not its published one")
    fivl.add_argument("--mask-model", help="of ...+sam, ...+sam2 or ...+segment-anything")
    fivl.add_argument("--expressions", default="noun-phrases", choices=("noun-phrases", "endpoint"))
    fivl.add_argument("--endpoint", help="base URL; its key is read from OPENAI_API_KEY")
    fivl.add_argument("--endpoint-model", help="the name that the endpoint knows the model by")
    fivl.add_argument("--split", default="train", help="of --data, where it has splits")
    fivl.add_argument("--workers", type=int, default=1, help="shards under way at once")
    fivl.set_defaults(module="augment_fivl")
