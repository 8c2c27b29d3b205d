"""Images that no longer show what an answer says: the rejected side of an image preference.

What it is: five corruptions (crop, diffusion, mask, another image, blank), each the same picture
whenever seed and image are, and of the image's own size, so that a processor gives it as many image
tokens. What it is not: perturb.py's regions, which take away something in particular.

    corrupt(image, "crop", seed="0|row 7")
    diffuse(inputs["pixel_values"], seed=0)
"""

from __future__ import annotations

import math
import random
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from firsthand.modeling.image_baselines import NOISE_STEP, signal_kept
from firsthand.processing.perturb import CLIP_MEAN, perturb

Corruption = Literal["crop", "diffusion", "mask", "other", "blank"]
CROP_AREA = (0.01, 0.2)  # share of the image that mDPO keeps
CROP_RATIO = (3 / 4, 4 / 3)  # width by height of what is kept
MASKED = 0.3  # share of the patches that OPA-DPO masks
GRID = 24  # patches a side, those of CLIP ViT-L/14 at 336 pixels


def corrupt(
    image: Image.Image,
    kind: Corruption,
    seed: int | str = 0,
    colour: tuple[int, int, int] = CLIP_MEAN,
    other: Image.Image | None = None,
) -> Image.Image:
    """A corrupted RGB image of the same size.

    Args:
        image: any PIL image.
        kind: "crop" (1 to 20 % of its area, scaled up: mDPO, arXiv 2406.11839), "mask" (30 % of
            24 x 24 patches: OPA-DPO, arXiv 2501.09695), "blank", or "other"; "diffusion" gives the
            image as it is, since its noise is for normalised pixels (`diffuse`).
        seed: decides crop and mask.
        colour: of "mask" and "blank", 0..255; `perturb.mean_colour(processor)` is what a processor
            maps to zero.
        other: the image of "other"; it is scaled to the size of this one.

    Raises:
        ValueError: for another kind, or "other" without an image.
    """
    if kind not in get_args(Corruption):
        names = ", ".join(get_args(Corruption))
        raise ValueError(f"corruption is {kind!r}; it must be one of {names}")
    if kind == "crop":
        box = _crop_box(image.size, random.Random(seed))
        return image.convert("RGB").resize(image.size, Image.Resampling.BICUBIC, box=box)
    if kind == "mask":
        return perturb(image, _patches(image.size, random.Random(seed)), "mean", colour=colour)
    if kind == "blank":
        return Image.new("RGB", image.size, colour)
    if kind == "other":
        if other is None:
            raise ValueError("corruption 'other' needs the other image; give other=")
        return other.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
    return image.convert("RGB")


def _crop_box(size: tuple[int, int], draw: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random part: its area and shape first, then its place."""
    area = size[0] * size[1] * draw.uniform(*CROP_AREA)
    ratio = math.exp(draw.uniform(*(math.log(bound) for bound in CROP_RATIO)))
    width = min(max(round(math.sqrt(area * ratio)), 1), size[0])
    height = min(max(round(math.sqrt(area / ratio)), 1), size[1])
    left, top = draw.randint(0, size[0] - width), draw.randint(0, size[1] - height)
    return left, top, left + width, top + height


def _patches(size: tuple[int, int], draw: random.Random) -> np.ndarray:
    """Bool [H, W]: a share of MASKED of the patches of a grid of at most GRID x GRID."""
    columns, rows = min(GRID, size[0]), min(GRID, size[1])
    chosen = draw.sample(range(rows * columns), round(MASKED * rows * columns))
    grid = np.zeros(rows * columns, bool)
    grid[chosen] = True
    down = np.arange(size[1]) * rows // size[1]
    across = np.arange(size[0]) * columns // size[0]
    return grid.reshape(rows, columns)[down[:, None], across]


def diffuse(pixels: Tensor, seed: int = 0) -> Tensor:
    """Normalised pixels after 500 of 1000 steps of forward diffusion (POVID, arXiv 2402.11411).

    x_t = sqrt(a) x + sqrt(1 - a) noise with a = 0.745 (`signal_kept`). The noise of a tile is
    drawn by `seed` and the tile's own values, so that it does not depend on what else is in the
    batch. A tile of zeros is padding, and stays.

    Args:
        pixels: float [..., 3, H, W], what an image processor gives.
        seed: of the noise.

    Returns:
        As `pixels`.
    """
    kept = float(signal_kept(NOISE_STEP))
    tiles = pixels.flatten(end_dim=-4) if pixels.dim() > 3 else pixels[None]
    noised = [
        math.sqrt(kept) * tile + math.sqrt(1 - kept) * _noise(tile, seed) if tile.any() else tile
        for tile in tiles
    ]
    return torch.stack(noised).reshape(pixels.shape)


def _noise(tile: Tensor, seed: int) -> Tensor:
    content = tile.float().cpu().contiguous().numpy().tobytes()
    digest = blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(tile.shape, generator=generator).to(tile)
