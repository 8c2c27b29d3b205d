"""The demo's explanations: support and heatmap of every object word, and the warning's threshold.

The support of a word is how much the image raises its probability (`processing/support.py`).

    words = word_maps(model, processor, [(image, question)], threshold, "photographs")
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from firsthand.datasets_scripts.scenes import scenes
from firsthand.processing import support
from firsthand.recipes.demo_measure import LEXICON
from firsthand.recipes.demo_rows import swapped_caption

CALIBRATION_SCENES = 24


def supports(
    model: Any, processor: Any, image: Image.Image, question: str, answer: str
) -> list[dict[str, Any]]:
    """`{text, span, node, support}` of each object word of the answer."""
    mentions = LEXICON.mentions(answer)
    spans = [(mention.start, mention.end) for mention in mentions]
    found = support.supports(model, processor, image, question, answer, spans)
    return [
        {"text": answer[a:b], "span": [a, b], "node": mention.node, "support": value}
        for (a, b), mention, value in zip(spans, mentions, found, strict=True)
    ]


def calibrate(
    work: Any, model: Any, processor: Any, rows: list[dict], seed: int
) -> tuple[float, float]:
    """(threshold, AUROC) of telling true words from swapped-in ones on validation scenes.

    Each scene's true caption is read beside one where a likely absent noun replaces a true one. The
    threshold maximises balanced accuracy; the rows it comes from are kept as a stage.
    """

    def make() -> list[dict[str, Any]]:
        words, rng = [], random.Random(seed)
        for row in tqdm(rows[:CALIBRATION_SCENES], desc="calibrating", unit="scene"):
            shown = {o["noun"] for o in row["objects"]}
            for caption in (row["caption"], swapped_caption(row, rng)):
                found = supports(model, processor, row["image"], scenes.CAPTION_QUESTION, caption)
                words += [{**w, "true": w["node"] in shown} for w in found]
        return words

    words = work.rows("warning", make)
    return best_threshold(words), auroc(words)


def best_threshold(words: list[dict[str, Any]]) -> float:
    """Midpoint between neighbouring supports with the highest balanced accuracy."""
    true = np.array([w["support"] for w in words if w["true"]])
    false = np.array([w["support"] for w in words if not w["true"]])
    points = np.unique(np.concatenate([true, false]))
    middles = (points[:-1] + points[1:]) / 2
    accuracy = [(true > m).mean() + (false <= m).mean() for m in middles]
    return float(middles[int(np.argmax(accuracy))])


def auroc(words: list[dict[str, Any]]) -> float:
    """Chance that a true word has more support than a false one; 0.5 is guessing, 1 the best."""
    true = np.array([w["support"] for w in words if w["true"]])[:, None]
    false = np.array([w["support"] for w in words if not w["true"]])
    return float(((true > false) + 0.5 * (true == false)).mean())


def word_maps(
    model: Any, processor: Any, asked: list[tuple[Image.Image, str]], threshold: float, name: str
) -> list[dict[str, Any]]:
    """Answers with heatmaps: `{image, answer, words: [{text, span, support, warned, map}]}`."""
    from firsthand.modeling import explain
    from firsthand.modeling.explanation import tokens_within
    from firsthand.processing.generation import generate_answers
    from firsthand.processing.overlays import heatmap

    rows = [
        {"id": str(i), "image_id": str(i), "image": image, "question": question}
        for i, (image, question) in enumerate(asked)
    ]
    answers = list(generate_answers(model, processor, rows, 48, progress=False))
    found = []
    for (image, question), said in zip(
        tqdm(asked, desc=f"explaining {name}", unit="image"), answers, strict=True
    ):
        answer, words = said["prediction"], []
        mentions = supports(model, processor, image, question, answer) if answer else []
        offsets = processor.tokenizer(
            answer, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        wanted = sorted({t for w in mentions for t in tokens_within(offsets, *w["span"])})
        if wanted:
            explanation = explain(model, processor, image, question, answer, tokens=wanted)
            for word in mentions:
                grid = explanation.span(*word["span"]).smooth_map
                warned = word["support"] <= threshold
                words.append({**word, "warned": warned, "map": heatmap(image, grid)})
        found.append({"image": image, "answer": answer, "words": words})
    return found
