"""`firsthand explain tokens`: a heatmap for every word of an answer, and what speaks for the word.

It prints the share of the image in the word's relevancy, how much likelier the image makes it than
a blank one does (nats), and its probability. It gives no verdict.

firsthand explain tokens --image photo.jpg --question "Describe the image." --out explanation
"""

from __future__ import annotations

import argparse
from pathlib import Path

from firsthand.recipes.inputs import load_model, open_image


def run(args: argparse.Namespace) -> int:
    """Write explanation.safetensors, explanation.json and words.png; print a line a word."""
    image = open_image(args.image)
    model, processor = load_model(args.model)
    from firsthand.modeling import explain
    from firsthand.processing.generation import one_view
    from firsthand.processing.overlays import contact_sheet, heatmap

    explanation = explain(
        model, one_view(processor), image, args.question, args.answer, baseline="blank"
    )
    out = Path(args.out)
    explanation.save(out)
    words = [explanation.word(i) for i in range(len(explanation.words))]
    print(f"{args.question} -> {explanation.answer}")
    for word in words:
        print(
            f"  {word.text:16} visual contribution {word.visual_contribution:.2f}"
            f"  against blank {word.log_likelihood_ratio:+.2f}  probability {word.probability:.2f}"
        )
    maps = [heatmap(image, word.smooth_map) for word in words]
    sheet = contact_sheet(maps, [f"{w.text} ({w.visual_contribution:.2f})" for w in words])
    sheet.save(out / "words.png")
    print(f"maps and figure: {out}")
    return 0
