"""Where in the image is what a phrase names? Segmenters behind one small interface.

What it is: `segment(image, phrases)` for every segmenter: one pass over the image for all of its
phrases, masks in pixels of the original image. What it is not: an annotation tool, or a choice of
phrases (`key_expressions.py`).

    segmenter = load_segmenter("grounding-dino+sam")
    segmenter.segment(image, ["a dog", "the red ball"])  # a Segment or None each

`annotated_segment` reads the masks that a data set already carries instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from firsthand.processing import masks

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original image
SEGMENTERS = (
    "sam3",
    "grounding-dino+sam",
    "mm-grounding-dino+sam2",
    "grounding-dino+segment-anything",
    "vision-logits",
)


@dataclass(frozen=True)
class Segment:
    """What one phrase names in an image.

    Attributes:
        mask: bool [H, W] in pixels of the original image: all instances together.
        score: 0 to 1, the segmenter's own confidence; not comparable between segmenters.
        boxes: one for each instance.
    """

    mask: np.ndarray
    score: float
    boxes: list[Box]


class Segmenter(Protocol):
    """What every segmenter offers."""

    name: str

    def segment(self, image: Image.Image, phrases: Sequence[str]) -> list[Segment | None]:
        """One Segment a phrase, None where it is not found; the image is encoded once."""
        ...


def load_segmenter(name: str, **options: Any) -> Segmenter:
    """A segmenter by name, with the published weights unless `options` name others.

    Args:
        name: one of SEGMENTERS.
        options: `sam3`: model, threshold. `grounding-dino+sam`, `mm-grounding-dino+sam2`,
            `grounding-dino+segment-anything`: detector, mask_model, threshold. `vision-logits`:
            model and processor (objects), saliency (a callable), threshold, floor.

    Raises:
        ValueError: for another name.
        ImportError: for `segment-anything`, naming the extra, where the package does not load.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"segmenter is {name!r}; it must be annotated, {', '.join(SEGMENTERS)}")
    if name == "vision-logits":
        from firsthand.processing.segmenter_vision_logits import VisionLogits

        return VisionLogits(**options)
    from firsthand.processing import segmenter_grounded

    return segmenter_grounded.load(name, **options)


def annotated_segment(record: Mapping[str, Any], phrases: Sequence[str]) -> list[Segment | None]:
    """The masks that a record carries, by name.

    Args:
        record: with `objects: [{noun (or name, text), mask, ...}]`, or with `turns` that hold
            `expressions: [{text, mask, ...}]`; a mask is COCO RLE in the image's pixels.
        phrases: a phrase finds all annotations whose name it is, or ends with.

    Raises:
        ValueError: when the record carries no annotations, or a mask is not COCO RLE.
    """
    named = list(_annotations(record))
    if not named:
        raise ValueError(
            "the record carries no masks: neither `objects` nor `expressions` have any"
        )
    found: list[Segment | None] = []
    for phrase in phrases:
        wanted = phrase.lower()
        ends = [n for n, _ in named if wanted == n or wanted.endswith(f" {n}")]
        longest = max(ends, key=len, default=None)
        hits = [mask for name, mask in named if name == longest]
        union = np.any(hits, axis=0) if hits and len({m.shape for m in hits}) == 1 else None
        boxes = [] if union is None else [_box(mask) for mask in hits]
        found.append(None if union is None else Segment(union, 1.0, boxes))
    return found


def _annotations(record: Mapping[str, Any]) -> Any:
    expressions = [e for turn in record.get("turns") or () for e in turn.get("expressions") or ()]
    for one in [*(record.get("objects") or ()), *expressions]:
        name = one.get("noun") or one.get("name") or one.get("text")
        if name and one.get("mask"):
            yield name.lower(), masks.decode(one["mask"])


def deduplicate(segments: Sequence[Segment | None], iou: float = 0.95) -> list[Segment | None]:
    """Segments whose masks overlap by more than `iou` share the first one's mask and boxes (FiVL).

    Each keeps its own score. Masks of different sizes, and empty ones, are left alone.
    """
    kept: list[Segment] = []
    out: list[Segment | None] = []
    for segment in segments:
        if segment is None:
            out.append(None)
            continue
        twin = next((k for k in kept if mask_iou(k.mask, segment.mask) > iou), None)
        if twin is None:
            kept.append(segment)
            out.append(segment)
        else:
            out.append(Segment(twin.mask, segment.score, twin.boxes))
    return out


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool masks [H, W]; 0 where both are empty or sizes differ."""
    if one.shape != other.shape:
        return 0.0
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def unite(found: Sequence[np.ndarray], boxes: Sequence[Box], scores: Sequence[float]) -> Segment:
    """One segment of several instances; its score is the best of theirs."""
    return Segment(np.any(found, axis=0), float(max(scores)), list(boxes))


def _box(mask: np.ndarray) -> Box:
    left, top, right, bottom = (float(x) for x in masks.boxes_of(mask[None])[0])
    return left, top, right, bottom


Saliency = Callable[[Image.Image], np.ndarray]  # float [H, W] of the original image, 0 to 1
