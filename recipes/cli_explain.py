"""The options of `firsthand explain`.

What it is: argparse only, imported by every call of `firsthand`. What it is not: work.

    firsthand explain --help
"""

from __future__ import annotations

import argparse

from firsthand.recipes.cli_options import common_model


def add(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb."""
    parser = verbs.add_parser("explain", help="where an answer came from")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    tokens = kinds.add_parser("tokens", help="a heatmap for every word of the answer")
    _one_answer(tokens, "explain")
    tokens.add_argument("--out", default="firsthand-explanation", help="folder for maps and figure")
    tokens.set_defaults(module="explain_tokens")
    for add in (_explain_warn, _explain_heads, _explain_head, _explain_logits):
        add(kinds)


def _one_answer(parser: argparse.ArgumentParser, does: str) -> None:
    """Adds the model, an image, what is asked of it, and the answer that a verb `does` read."""
    common_model(parser)
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", default="Describe the image.")
    parser.add_argument("--answer", help=f"{does} this answer instead of the model's own")


def _explain_warn(kinds: argparse._SubParsersAction) -> None:
    warn = kinds.add_parser("warn", help="the chance that each object word is made up")
    _one_answer(warn, "judge")
    warn.add_argument("--warning", help="what fit_warning wrote; the demo model's if absent")
    warn.add_argument("--max-new-tokens", type=int, default=64, help="of the model's own answer")
    warn.add_argument("--out", default="firsthand-warning", help="folder for page and numbers")
    warn.set_defaults(module="explain_warn")


def _explain_heads(kinds: argparse._SubParsersAction) -> None:
    heads = kinds.add_parser("heads", help="how well each attention head looks at what is named")
    common_model(heads)
    _grounded_data(heads)
    heads.add_argument("--generated", action="store_true", help="on the model's own answers")
    heads.add_argument(
        "--smallest-mask", action="store_true", help="one expression a turn, as FiVL"
    )
    heads.add_argument("--max-new-tokens", type=int, default=64, help="of a generated answer")
    heads.add_argument("--out", default="firsthand-heads", help="folder for grids and figure")
    heads.set_defaults(module="explain_heads")


def _grounded_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="scenes", help="grounded Parquet or Hub id, or `scenes`")
    parser.add_argument("--split", default="validation", help="of the scenes or Hub data")
    parser.add_argument("--samples", type=int, help="only the first ones")


def _explain_head(kinds: argparse._SubParsersAction) -> None:
    head = kinds.add_parser("head", help="one attention head's view for every token")
    head.add_argument("--layer", type=int, required=True)
    head.add_argument("--head", type=int, required=True)
    _one_answer(head, "read")
    head.add_argument("--max-new-tokens", type=int, default=64, help="of the model's own answer")
    head.add_argument("--out", default="firsthand-head", help="folder for numbers and overlays")
    head.set_defaults(module="explain_heads")


def _explain_logits(kinds: argparse._SubParsersAction) -> None:
    logits = kinds.add_parser("logits", help="the word that each image token says, and its IoU")
    common_model(logits)
    logits.add_argument("--image", help="one image, drawn; or give --data")
    _grounded_data(logits)
    logits.set_defaults(data=None)
    logits.add_argument("--words", help="draw and merge these, separated by commas")
    logits.add_argument("--out", default="firsthand-logits", help="folder for maps and figures")
    logits.set_defaults(module="explain_logits")
