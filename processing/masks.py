"""Masks as COCO run-length encoding, and how much of each image token they cover.

A mask belongs to the original image; a *frame* says which part of it the model saw: all of it
squashed ("resize") or kept ("native"), the central square ("center_crop"), or the square around it
("pad"). What it is not: a segmenter, or drawing (overlays.py).

    coverage = patch_coverage(decode(row["mask"]), image_grid(config), "resize")
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

Frame = Literal["resize", "native", "center_crop", "pad"]
RLE = dict[str, Any]
Box = tuple[float, float, float, float]


def encode(mask: Any) -> RLE:
    """`{"size": [H, W], "counts": str}` of a mask [H, W], true inside: COCO's compressed form."""
    inside = np.asarray(mask).astype(bool)
    if inside.ndim != 2:
        raise ValueError(f"a mask is [H, W]; this one has shape {inside.shape}")
    encoded = coco_mask.encode(np.asfortranarray(inside, dtype=np.uint8))
    return {"size": list(inside.shape), "counts": encoded["counts"].decode("ascii")}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Bool [H, W] of an `encode`d mask.

    Raises:
        ValueError: when `size` or `counts` are not those of a compressed mask.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if size is None or len(size) != 2 or not isinstance(counts, str | bytes):
        raise ValueError(f'a mask is {{"size": [H, W], "counts": str}}; this is {_short(rle)}')
    return coco_mask.decode({"size": [int(s) for s in size], "counts": counts}).astype(bool)


def boxes_of(masks: Any) -> np.ndarray:
    """Tight boxes x0, y0, x1, y1 in pixels (x1, y1 outside), int64 [N, 4], of masks [N, H, W].

    An empty mask has the box 0, 0, 0, 0.
    """
    inside: Any = np.asarray(masks).astype(bool)
    boxes = np.zeros((len(inside), 4), dtype=np.int64)
    for axis, first in ((1, 0), (2, 1)):  # x from the columns, y from the rows
        hit = inside.any(axis=axis)
        boxes[:, first] = hit.argmax(axis=1)
        boxes[:, first + 2] = hit.shape[1] - hit[:, ::-1].argmax(axis=1)
    return boxes * inside.any(axis=(1, 2))[:, None]


def seen_area(size: tuple[int, int], frame: Frame) -> Box:
    """The part that the model saw of an image of `size` (width, height): a box in its pixels.

    With "pad" it reaches beyond the image.

    Raises:
        ValueError: for an unknown frame.
    """
    width, height = size
    if frame in ("resize", "native"):
        return 0, 0, width, height
    if frame not in ("center_crop", "pad"):
        raise ValueError(f"frame is {frame!r}; it must be resize, native, center_crop or pad")
    side = min(size) if frame == "center_crop" else max(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def frame_of(processor: Any) -> Frame:
    """What a transformers processor shows of an image, by its image processor's settings.

    "center_crop" where the shorter side is fitted and the centre cut out (CLIP's), "pad" where the
    image is padded to a square first (LLaVA's own), else "resize": squashed to a size of the
    processor's, with or without its shape.
    """
    settings = processor.image_processor.to_dict()
    size = settings.get("size") or {}
    kind = settings.get("image_processor_type") or type(processor.image_processor).__name__
    if kind.startswith("LlavaImageProcessor") and settings.get("do_pad"):
        return "pad"
    if settings.get("do_center_crop") and "shortest_edge" in dict(size):
        return "center_crop"
    return "resize"


def to_frame(boxes: Any, size: tuple[int, int], frame: Frame) -> np.ndarray:
    """Boxes [N, 4] in pixels of the original image -> the same in 0..1 of what the model saw.

    Boxes outside of what it saw reach outside 0..1. Multiply by the model's width and height for
    its pixels. `from_frame` turns back.
    """
    left, top, right, bottom = seen_area(size, frame)
    origin, extent = (left, top) * 2, (right - left, bottom - top) * 2
    return (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) - origin) / extent


def from_frame(boxes: Any, size: tuple[int, int], frame: Frame) -> np.ndarray:
    """Boxes [N, 4] in 0..1 of what the model saw -> pixels of the original image."""
    left, top, right, bottom = seen_area(size, frame)
    origin, extent = (left, top) * 2, (right - left, bottom - top) * 2
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * extent + origin


def patch_coverage(mask: Any, grid: tuple[int, int], frame: Frame = "resize") -> np.ndarray:
    """The share of each image token's area that a mask covers: exact, no resampling.

    Args:
        mask: [H, W] of the original image, true inside.
        grid: R rows and C columns of image tokens.
        frame: the part of the image that the grid spans. What "pad" adds is not covered.

    Returns:
        float64 [R, C] in 0..1.

    Raises:
        ValueError: for a mask that is not [H, W], an empty grid or an unknown frame.
    """
    inside = np.asarray(mask).astype(bool)
    if inside.ndim != 2 or not inside.size:
        raise ValueError(f"a mask is [H, W]; this one has shape {inside.shape}")
    if min(grid) < 1:
        raise ValueError(f"grid is {grid}; it needs at least one row and one column")
    height, width = inside.shape
    left, top, right, bottom = seen_area((width, height), frame)
    down = _overlap(top, bottom, grid[0], height)
    across = _overlap(left, right, grid[1], width)
    cell = (bottom - top) / grid[0] * (right - left) / grid[1]
    x0, y0, x1, y1 = boxes_of(inside[None])[0]  # all else is zero
    part = inside[y0:y1, x0:x1].astype(np.float64)
    return np.clip(down[:, y0:y1] @ part @ across[:, x0:x1].T / cell, 0, 1)


@lru_cache(maxsize=64)
def _overlap(low: float, high: float, cells: int, pixels: int) -> np.ndarray:
    """[cells, pixels]: how much of each pixel, 0..1, lies in each cell of low to high."""
    edges, start = np.linspace(low, high, cells + 1), np.arange(pixels)
    shared = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    return np.maximum(shared, 0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
