"""`firsthand explain logits`: what word each image token says, drawn or measured against masks.

With `--image`: one labelled overlay and a soft map for each of the most frequent words. With
`--data`: the overlap of each word's region with its mask, which is the table of FiVL (arXiv
2412.14672) with given masks in place of a detector's; arm "shuffled" uses the masks of the sample
before. A question changes nothing here, since image tokens come before it.

firsthand explain logits --image photo.jpg --out logits
firsthand explain logits --data scenes --samples 30 --out logits
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from firsthand.metrics.results import protocol, result_rows, table, write_results
from firsthand.modeling.families import image_grids, unwrap
from firsthand.modeling.placement import input_device
from firsthand.modeling.vision_modeling import vision_logits
from firsthand.processing.generation import one_view, prepare_inputs
from firsthand.processing.masks import encode, frame_of, patch_coverage
from firsthand.processing.overlays import PALETTE, cell_labels, contact_sheet, heatmap, regions
from firsthand.processing.vision_words import Reading, best_iou, read_words, region_iou
from firsthand.recipes.grounded import (
    Reasons,
    Sample,
    drop,
    last_sample,
    usable_expressions,
    usable_samples,
)
from firsthand.recipes.inputs import load_model, open_image, write_rows

QUESTION = "Describe the image."  # stands behind the image, so that no image token sees it
DRAWN = 12  # samples whose overlay is drawn
METRICS = (
    "vision_logits_iou",
    "vision_logits_iou_found",
    "vision_logits_iou_ceiling",
    "words_found",
    "words_grounded",
    "words_per_sample",
)


def run(args: argparse.Namespace) -> int:
    """Draw one image, or measure on grounded samples."""
    if (args.image is None) == (args.data is None):
        raise ValueError("give either --image (to draw) or --data (to measure)")
    return _draw(args) if args.image is not None else _measure(args)


@torch.inference_mode()
def read_image(
    model: Any, processor: Any, image: Image.Image
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Vision logits [R * C, V] of one image, and (R, C)."""
    inner = unwrap(model)
    inputs = prepare_inputs(processor, [{"image": image, "question": QUESTION}])
    inputs = inputs.to(input_device(inner), inner.dtype)
    return vision_logits(model, **inputs)[0], image_grids(inner.config, inputs)[0]


def label_words(
    image: Image.Image, reading: Reading, words: Sequence[str], frame: Any
) -> Image.Image:
    """The labelled overlay, enlarged where the image is too small for names."""
    scale = max(1, -(-448 // min(image.size)))
    large = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    labels = np.full((len(reading.labels), len(reading.labels[0])), -1)
    for index, word in enumerate(words):
        labels[reading.region(word)] = index
    names = [f"{word} ({reading.share(word):.0%})" for word in words]
    return regions(large, labels, names, frame)


def _draw(args: argparse.Namespace) -> int:
    image = open_image(args.image)
    model, processor = load_model(args.model)
    asked = [w.strip().lower() for w in (args.words or "").split(",") if w.strip()]
    frame, tokenizer = frame_of(processor), processor.tokenizer
    logits, grid = read_image(model, one_view(processor), image)
    reading = read_words(tokenizer, logits, grid, asked)
    top = reading.words[: len(PALETTE)]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    label_words(image, reading, top, frame).save(out / "overlay.png")
    rows = [_word_row(image, reading, word, frame) for word in dict.fromkeys([*asked, *top])]
    if rows:
        maps = [heatmap(image, row["probability"], frame=frame, maximum=1.0) for row in rows]
        captions = [f"{r['word']}: up to {np.max(r['probability']):.2f}" for r in rows]
        contact_sheet(maps, captions).save(out / "words.png")
    content = {
        "model": args.model or "demo",
        "image": str(args.image),
        "frame": frame,
        "labels": reading.labels,
        "words": rows,
    }
    (out / "logits.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    print(f"{grid[0]} x {grid[1]} image tokens say {len(reading.words)} words")
    for row in rows:
        print(f"  {row['word']:16} of the image {row['share']:.2f}")
    print(f"overlay and maps: {out}")
    return 0


def _word_row(image: Image.Image, reading: Reading, word: str, frame: Any) -> dict[str, Any]:
    """A word's share and probability [R][C] on image tokens, and its mask on the original image."""
    region = cell_labels(reading.region(word).astype(int), image.size, frame) == 1
    soft = [[round(float(p), 6) for p in row] for row in reading.soft(word)]
    share = reading.share(word)
    return {"word": word, "share": share, "probability": soft, "mask": encode(region)}


def masks_by_word(sample: Sample, dropped: Reasons) -> dict[str, np.ndarray]:
    """The union of all masks of each word (the last noun of an expression), bool [H, W]."""
    found: dict[str, np.ndarray] = {}
    for turn in range(len(sample["turns"])):
        for expression in usable_expressions(sample, turn, dropped):
            if not expression.nouns:
                drop(dropped, sample, expression.text, "no noun")
                continue
            word = expression.nouns[-1].lower()
            found[word] = found.get(word, np.zeros_like(expression.mask)) | expression.mask
    return found


def score_words(
    reading: Reading, masks: Mapping[str, np.ndarray], frame: Any
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The IoU of each given word that can be seen (0 where no token says it), and METRICS' pairs.

    The pairs are (numerator, denominator) of one sample, for `metrics.results`.
    """
    grid = len(reading.labels), len(reading.labels[0])
    covers = {word: patch_coverage(mask, grid, frame).round(9) for word, mask in masks.items()}
    ious = {w: region_iou(reading.region(w), cover) for w, cover in covers.items() if cover.any()}
    said = set(reading.words)
    found, total = [ious[w] for w in ious if w in said], float(sum(ious.values()))
    pairs = [
        (total, len(ious)),
        (float(sum(found)), len(found)),
        (sum(best_iou(covers[word]) for word in ious), len(ious)),
        (len(found), len(ious)),
        (len(found), len(said)),
        (len(said), 1),
    ]
    return ious, dict(zip(METRICS, pairs, strict=True))


def measure(
    model: Any, processor: Any, samples: Any, count: int | None = None
) -> tuple[dict[str, list], list[dict[str, Any]], list[Image.Image], Reasons]:
    """Arm -> one METRICS' pairs a sample; one row a sample; the first overlays; what was left out.

    The control arm scores a sample's logits against the words and masks of the sample before, with
    that sample's words merged in the same way.
    """
    arms: dict[str, list] = {"plain": [], "shuffled": []}
    rows: list[dict[str, Any]] = []
    drawn: list[Image.Image] = []
    dropped: Reasons = []
    frame, tokenizer = frame_of(processor), processor.tokenizer
    other = last_sample(samples)
    for sample in usable_samples(samples, count, dropped):
        masks = masks_by_word(sample, dropped)
        if not masks:
            drop(dropped, sample, None, "no word with a mask")
            continue
        try:
            logits, grid = read_image(model, processor, sample["image"])
        except ValueError as error:
            drop(dropped, sample, None, str(error))
            continue
        reading = read_words(tokenizer, logits, grid, masks)
        ious, pairs = score_words(reading, masks, frame)
        arms["plain"].append(pairs)
        rows.append({"id": str(sample["id"]), "iou": ious, "words": reading.words})
        foreign = masks_by_word(other, []) if other and other["id"] != sample["id"] else {}
        if foreign:
            control = read_words(tokenizer, logits, grid, foreign)
            arms["shuffled"].append(score_words(control, foreign, frame)[1])
        other = sample
        if len(drawn) < DRAWN:
            drawn.append(label_words(sample["image"], reading, reading.words[:8], frame))
    return arms, rows, drawn, dropped


def _measure(args: argparse.Namespace) -> int:
    from firsthand.recipes.train_vision_modeling import load_samples

    samples = load_samples(None if args.data == "scenes" else args.data, args.split)
    model, processor = load_model(args.model)
    arms, rows, drawn, dropped = measure(model, one_view(processor), samples, args.samples)
    if not rows:
        reasons = "; ".join(dict.fromkeys(d["reason"] for d in dropped)) or "it has no samples"
        raise ValueError(f"{args.data}: no sample could be measured ({reasons})")
    about = protocol([r["id"] for r in rows], decoding="argmax", variant=frame_of(processor))
    results = []
    for arm, pairs in arms.items():
        columns = {m: np.array([p[m] for p in pairs]).reshape(-1, 2) for m in METRICS}
        results += result_rows(columns, arm=arm, split=args.split, protocol=about)
    out = Path(args.out)
    write_results(out / "results.json", results)
    write_rows(out / "samples.jsonl", [*rows, *dropped])
    contact_sheet(drawn, [r["id"] for r in rows[: len(drawn)]], tile=320).save(out / "overlays.png")
    print(table(results))
    print(f"{len(rows)} samples; left out: {len(dropped)} (reasons in {out / 'samples.jsonl'})")
    return 0
