"""The options of `firsthand augment lrv` and `firsthand measure answers`; `cli` names both verbs.

What it is: argparse only, imported by every call of `firsthand`. What it is not: work.

    firsthand augment lrv --help
"""

from __future__ import annotations

import argparse


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
