"""Images without their key regions: what visual reliance takes away, and its controls.

What it is: regions from boxes or masks, an equal region elsewhere, and four fills. What it is not:
an inpainting model; a fill says nothing about what could have been there.

    region = region_of(expressions, image.size, "bbox")
    perturb(image, region, "mean"); perturb(image, elsewhere(region, seed=0), "mean")
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

from firsthand.processing import masks

Fill = Literal["mean", "black", "noise", "blur"]
Region = Literal["bbox", "mask"]
CLIP_MEAN = (122, 116, 104)  # of most image processors, in 0..255; the least surprising grey
BLUR = 0.1  # radius of the blur as a share of the image's longer side
TRIES = 64


def region_of(
    expressions: Iterable[Mapping[str, Any]], size: tuple[int, int], kind: Region = "bbox"
) -> np.ndarray:
    """Bool [H, W]: all boxes (FiVL's choice), or all masks, of some expressions together.

    Args:
        expressions: with `boxes` in pixels and `mask` (COCO RLE), of the original image.
        size: of the image, (width, height).
        kind: "bbox" or "mask".

    Raises:
        ValueError: for another kind, or a mask of another size.
    """
    if kind not in get_args(Region):
        raise ValueError(f"region is {kind!r}; it must be one of {', '.join(get_args(Region))}")
    region = np.zeros(size[::-1], bool)
    for one in expressions:
        if kind == "mask" and one["mask"]:
            mask = masks.decode(one["mask"])
            if mask.shape != region.shape:
                raise ValueError(f"a mask is {mask.shape}, its image {region.shape} (H, W)")
            region |= mask
        elif kind == "bbox":
            for left, top, right, bottom in one["boxes"]:
                low = max(int(np.floor(left)), 0), max(int(np.floor(top)), 0)
                region[low[1] : int(np.ceil(bottom)), low[0] : int(np.ceil(right))] = True
    return region


def elsewhere(region: np.ndarray, seed: int | str = 0) -> np.ndarray | None:
    """The same shape at another place of the image, without overlap; None where there is no room.

    Equal in area and form, drawn by `seed` among the places where it lies inside the image.
    """
    if not region.any():
        return None
    left, top, right, bottom = (int(x) for x in masks.boxes_of(region[None])[0])
    height, width = region.shape
    across, down = range(-left, width - right + 1), range(-top, height - bottom + 1)
    draw = random.Random(seed)
    corners = [(x, y) for x in (across[0], across[-1]) for y in (down[0], down[-1])]
    draws = [(draw.choice(across), draw.choice(down)) for _ in range(TRIES)]
    draw.shuffle(corners)
    for x, y in draws + corners:
        moved = np.zeros_like(region)
        moved[top + y : bottom + y, left + x : right + x] = region[top:bottom, left:right]
        if not (moved & region).any():
            return moved
    return None


def perturb(
    image: Image.Image,
    region: np.ndarray,
    fill: Fill = "mean",
    seed: int = 0,
    colour: tuple[int, int, int] = CLIP_MEAN,
) -> Image.Image:
    """The image with a region filled, RGB.

    Args:
        image: any PIL image.
        region: bool [H, W].
        fill: "mean" (one `colour`), "black", "noise" (uniform, drawn by `seed`) or "blur".
        colour: of "mean", 0..255.

    Raises:
        ValueError: for another fill, or a region of another size.
    """
    if fill not in get_args(Fill):
        raise ValueError(f"fill is {fill!r}; it must be one of {', '.join(get_args(Fill))}")
    pixels = np.array(image.convert("RGB"))
    if region.shape != pixels.shape[:2]:
        raise ValueError(f"the region is {region.shape}, the image {pixels.shape[:2]} (H, W)")
    if fill == "noise":
        content: Any = np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8)
    elif fill == "blur":
        radius = BLUR * max(image.size)
        content = np.array(image.convert("RGB").filter(ImageFilter.GaussianBlur(radius)))
    else:
        one = np.array(colour if fill == "mean" else (0, 0, 0), dtype=np.uint8)
        content = np.broadcast_to(one, pixels.shape)
    pixels[region] = content[region]
    return Image.fromarray(pixels)


def mean_colour(processor: Any) -> tuple[int, int, int]:
    """What an image processor maps to zero: its `image_mean`, in 0..255; else CLIP's."""
    mean = processor.image_processor.to_dict().get("image_mean")
    if not mean or len(mean) != 3:
        return CLIP_MEAN
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue
