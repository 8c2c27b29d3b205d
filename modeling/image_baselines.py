"""An image without what it shows: what an answer's tokens are compared with.

Blank, blurred or drowned in noise, always of the same size, so that a model reads as many image
tokens. It is no attack and no augmentation: nothing is random that a seed does not fix.

    import numpy as np; baseline_image(np.asarray(image.convert("RGB")), "noise")
"""

from typing import Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

Baseline = Literal["blank", "blur", "noise"]
BLUR_GRID = 8  # means on each side
NOISE_STEP, NOISE_STEPS = 500, 1000  # as visual contrastive decoding (arXiv 2311.16922) has it


def signal_kept(step: int) -> torch.Tensor:
    """What a forward diffusion leaves of an image: the product of 1 - beta up to `step`, from 0.

    Beta rises from 1e-5 to 5e-3 along a sigmoid over 1000 steps: VCD's schedule, which POVID (arXiv
    2402.11411) shares. x_t = sqrt(kept) x + sqrt(1 - kept) noise. A scalar, float32.
    """
    betas = torch.linspace(-6, 6, NOISE_STEPS).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)[step]


def baseline_image(image: np.ndarray, baseline: Baseline, seed: int = 0) -> np.ndarray:
    """The image without its content.

    Args:
        image: uint8 [H, W, 3].
        baseline: "blank" (its mean colour everywhere, in whole numbers, rounded down), "blur" (the
            means of 8 x 8 fields, faded into one another) or "noise" (500 of 1000 steps of a
            diffusion process, on pixels from -1 to 1, cut to their range).
        seed: of the noise.

    Returns:
        uint8 [H, W, 3].
    """
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    if baseline == "blank":
        changed = pixels.double().mean((2, 3), keepdim=True).floor().expand_as(pixels)
    elif baseline == "blur":
        means = interpolate(pixels, size=(BLUR_GRID, BLUR_GRID), mode="area")
        changed = interpolate(means, size=pixels.shape[2:], mode="bicubic")
    else:
        generator = torch.Generator().manual_seed(seed)
        kept = float(signal_kept(NOISE_STEP))
        noise = torch.randn(pixels.shape, generator=generator)
        noised = kept**0.5 * (pixels / 127.5 - 1) + (1 - kept) ** 0.5 * noise
        changed = (noised + 1) * 127.5
    return changed[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
