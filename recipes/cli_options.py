"""Options that several verbs share.

What it is: argparse only, imported by every call of `firsthand`. What it is not: work.

    firsthand --help
"""

from __future__ import annotations

import argparse
from typing import Any


def common_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`."""
    parser.add_argument("--model", help="Hub id or path; the demo model if absent")


def answering(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Adds who answers, and how long an answer may be."""
    common_model(parser)
    parser.add_argument("--endpoint", help="base URL; its key is read from OPENAI_API_KEY")
    parser.add_argument("--endpoint-model", help="the name that the endpoint knows the model by")
    parser.add_argument("--max-new-tokens", type=int, default=tokens, help="of an answer")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in one call of generate")


def chair_truth(parser: argparse.ArgumentParser) -> Any:
    """Adds CHAIR's ground truth and words; returns their group."""
    chair = parser.add_argument_group("chair")
    chair.add_argument("--objects", help="ground truth: JSON {image_id: [object, ...]}")
    chair.add_argument("--coco-instances", nargs="+", metavar="FILE", help="or instances_*.json")
    chair.add_argument("--coco-captions", nargs="+", metavar="FILE", help="with captions_*.json")
    chair.add_argument(
        "--variant",
        default="original",
        choices=("original", "opera", "sima", "objhal", "fixed"),
        help="whose CHAIR: published implementations do not agree",
    )
    chair.add_argument("--nouns", help="text file of nouns, one a line, instead of COCO's lexicon")
    return chair
