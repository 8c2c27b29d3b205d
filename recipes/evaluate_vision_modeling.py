"""What does vision modeling change? Trained arms against each other on scenes, with intervals.

What it is: the demo model, plain fine-tuning of it and vision modeling of it (several seeds each),
measured on the same scenes. What it is not: a training recipe; the adapters come from
`train_vision_modeling`.

    python recipes/evaluate_vision_modeling.py --arm sft=sft0,sft1,sft2 --arm vm=vm0,vm1,vm2 \
        --compare vm-sft --split test --split test_unseen --split test_prior --count 80 \
        --out docs/results/fivl_training.csv

Options as in `recipes/study.py`.
"""

from __future__ import annotations

from typing import Any

from firsthand.processing import masks
from firsthand.processing.collator import word_token
from firsthand.processing.segmenter_vision_logits import VisionLogits
from firsthand.processing.segmenters import mask_iou
from firsthand.recipes import study
from firsthand.recipes.demo_saliency import load_saliency

LABELLED = 0.25  # covered share from which an image token must say the object's noun


def measure(model: Any, processor: Any, rows: list[dict], seed: int) -> study.Measured:
    """What one model answers about some scenes, and what its image tokens say."""
    found = study.answer_measures(model, processor, rows, seed)
    return found | vision_measures(model, processor, rows, load_saliency())


def vision_measures(model: Any, processor: Any, rows: list[dict], saliency: Any) -> study.Measured:
    """What image tokens say: accuracy on labelled tokens, and IoU of each object's mask.

    `vision_iou` is that of blocks of image tokens, `vision_iou_sharpened` that of the segmenter
    `vision-logits` with saliency, `vision_iou_shuffled` the same for the noun of another object of
    the same image or, where there is none, of the next scene: the control.
    """
    names = ("vision_label_accuracy", "vision_iou", "vision_iou_sharpened", "vision_iou_shuffled")
    found: study.Measured = {name: {"columns": [], "groups": []} for name in names}
    blocks = VisionLogits(model, processor)
    sharp = VisionLogits(model, processor, saliency)

    def add(name: str, numerator: float, denominator: float, scene: str) -> None:
        found[name]["columns"].append([numerator, denominator])
        found[name]["groups"].append(scene)

    for at, row in enumerate(rows):
        said = blocks.word_maps(row["image"])
        nouns = [thing["noun"] for thing in row["objects"]]
        wrong = nouns[1:] + [rows[(at + 1) % len(rows)]["objects"][0]["noun"]]
        coarse = blocks.segment_from(row["image"], nouns, said)
        fine = sharp.segment_from(row["image"], nouns, said)
        control = sharp.segment_from(row["image"], wrong, said)
        for i, thing in enumerate(row["objects"]):
            true = masks.decode(thing["mask"])
            covered = masks.patch_coverage(true, tuple(said.shape[:2])) >= LABELLED  # type: ignore[arg-type]
            token = word_token(processor.tokenizer, thing["noun"])
            right = said.argmax(-1).numpy()[covered] == token
            add("vision_label_accuracy", int(right.sum()), int(covered.sum()), row["id"])
            for name, segments in zip(names[1:], (coarse, fine, control), strict=True):
                segment = segments[i]
                iou = 0.0 if segment is None else mask_iou(segment.mask, true)
                add(name, iou, 1, row["id"])
    return found


if __name__ == "__main__":
    study.run(study.parse(None, "Measure vision modeling against fine-tuning."), measure)
