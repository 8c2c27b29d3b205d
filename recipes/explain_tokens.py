"""`firsthand explain tokens`: a heatmap for every word of an answer.

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

    explanation = explain(model, one_view(processor), image, args.question, args.answer)
    out = Path(args.out)
    explanation.save(out)
    words = [explanation.word(i) for i in range(len(explanation.words))]
    print(f"{args.question} -> {explanation.answer}")
    for word in words:
        share, chance = word.visual_contribution, word.probability
        print(f"  {word.text:16} visual contribution {share:.2f}  probability {chance:.2f}")
    maps = [heatmap(image, word.smooth_map) for word in words]
    sheet = contact_sheet(maps, [f"{w.text} ({w.visual_contribution:.2f})" for w in words])
    sheet.save(out / "words.png")
    print(f"maps and figure: {out}")
    return 0
