"""The parsers of `firsthand steer`: imported by `cli.py`, without anything heavy.

firsthand steer --help
"""

from __future__ import annotations

import argparse

FITTED = ("mean", "svd", "pca", "valse", "vti", "vista", "cas")
CONTRASTED = ("vcd", "vcd-blur", "icd", "m3id", "pai")


def _asked(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", default="Describe the image.")
    parser.add_argument("--max-new-tokens", type=int, default=64)


def _fitted_on(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", help='JSONL rows {"positive": {image, question, answer}, ...}')
    parser.add_argument("--count", type=int, help="pairs drawn by --seed; all if absent")
    parser.add_argument(
        "--layers", help="decoder layers such as 4-11 or 4,6; the method's if absent"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in one forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of pairs, noise and masks")
    parser.add_argument("--work", help="folder to go on from after a stop; beside --out if absent")


def _fit(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    fit = actions.add_parser("fit", help="from contrast pairs (JSONL), or the demo's scenes")
    _fitted_on(fit)
    fit.add_argument("--method", default="mean", choices=FITTED)
    fit.add_argument("--gate", type=float, help="steer only tokens of lower visual support (-1..1)")
    fit.add_argument("--out", required=True, help="folder for the vector")
    valse = fit.add_argument_group("valse (rows of --pairs: image, question, perhaps answer)")
    valse.add_argument("--threshold", type=float, default=1.0, help="nats of a visual token")
    valse.add_argument("--noise-step", type=int, default=500, help="of 1000, on the other image")
    valse.add_argument("--artefact", default="median", choices=("median", "none"))
    valse.add_argument("--together", default="max", choices=("max", "mean"), help="of tokens' maps")
    valse.add_argument("--keep", type=float, default=0.5, help="share of the image's cells")
    vti = fit.add_argument_group("vti (rows of --pairs for the vision side: image)")
    vti.add_argument("--side", default="text", choices=("text", "vision", "both"))
    vti.add_argument("--trials", type=int, default=50, help="maskings an image")
    vti.add_argument("--mask-ratio", type=float, default=0.99, help="share of masked patches")
    vista = fit.add_argument_group("vista (one prompt)")
    vista.add_argument("--image", help="the prompt's image")
    vista.add_argument("--question", default="Describe the image.")
    return fit


def _apply(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    apply = actions.add_parser("apply", help="plain and steered answer side by side")
    apply.add_argument("--vector", required=True, help="folder or Hub id of a steering vector")
    apply.add_argument("--strength", type=float, help="signed; the vector's own if absent")
    apply.add_argument("--gate", type=float, help="instead of the vector's own")
    apply.add_argument(
        "--early", type=float, default=0.0, help="share of early layers' logits; VISTA takes 0.3"
    )
    _asked(apply)
    return apply


def _contrast(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    contrast = actions.add_parser("contrast", help="plain and contrastively decoded answer")
    contrast.add_argument("--method", default="vcd", choices=CONTRASTED)
    contrast.add_argument(
        "--alpha", type=float, help="weight (m3id: decay); the method's if absent"
    )
    contrast.add_argument("--beta", type=float, help="least share of the top token's probability")
    contrast.add_argument("--seed", type=int, default=0, help="of the noise")
    _asked(contrast)
    return contrast


def _fold(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    fold = actions.add_parser("fold", help="write an additive vector into a stock checkpoint")
    fold.add_argument("--vector", required=True, help="folder or Hub id of a steering vector")
    fold.add_argument("--strength", type=float, help="signed; the vector's own if absent")
    fold.add_argument("--out", required=True, help="folder for model and processor")
    return fold


def _cut(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    cut = actions.add_parser("cut", help="Nullu: cut hallucinated directions out of the weights")
    _fitted_on(cut)
    cut.add_argument("--rank", type=int, default=4, help="directions a layer")
    cut.add_argument("--out", required=True, help="folder for model and processor")
    return cut


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `steer` with its actions."""
    parser = verbs.add_parser("steer", help="fit, apply, fold vectors; decode contrastively")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for one in (_fit, _apply, _contrast, _fold, _cut):
        action = one(actions)
        action.add_argument("--model", help="Hub id or path; the demo model if absent")
        action.set_defaults(module="steer")
