"""VTI's vision side: the direction from an image's features towards those that masking leaves.

What it is: hidden states of the vision encoder, averaged over many random maskings of the image,
minus those of the whole image; images only, no question and no answer (arXiv 2410.15778, section on
visual features). What it is not: the text side (`steering_fit.py`, method "vti").

    vector = fit_vti_vision(model, processor, images)
    attach_steering(model, text | vector)
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.logging import tqdm

from .families import unwrap, vision_layers
from .placement import input_device
from .steering import SteeringVector, check_encoder
from .steering_fit import VTI_ANGLE, evaluating, prompt_inputs

TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@torch.no_grad()
def fit_vti_vision(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Iterable[Any],
    mask_ratio: float = 0.99,
    trials: int = 50,
    seed: int = 0,
    batch_size: int = 10,
    progress: bool = True,
    folder: str | Path | None = None,
) -> SteeringVector:
    """One direction a vision layer and token, about 0.1 radians at strength 1 (VTI's alpha).

    The mean over images is taken; VTI adds the first principal component, of length 1 beside it,
    which turns it by about 2 degrees and would need all differences at once.

    Args:
        model: a supported model.
        processor: its processor, with a chat template.
        images: PIL images. Of a sequence, items are read when they are needed.
        mask_ratio: share of patches that are filled with their image's mean colour, in (0, 1).
        trials: maskings an image.
        seed: of the maskings; image i draws from seed and i.
        batch_size: maskings in one pass of the encoder.
        progress: show a progress bar.
        folder: where each image's difference is kept; the same call goes on from there.

    Returns:
        A vector of the vision side only: [T, D] a layer, or [D] where the encoder's tokens lie in
        one list (Qwen), whose number changes with the image.

    Raises:
        ValueError: for no images, a ratio outside (0, 1), trials or batches below 1, or a
            convolutional encoder, which has no tokens.
    """
    if not 0 < mask_ratio < 1 or trials < 1 or batch_size < 1:
        raise ValueError(
            f"mask_ratio is {mask_ratio}, trials {trials}, batch_size {batch_size}; the ratio must "
            "lie between 0 and 1, the others be at least 1."
        )
    check_encoder(model)
    kept = None if folder is None else Path(folder)
    total, count = None, 0
    pictures = images if isinstance(images, Sequence) else list(images)
    with evaluating(model):
        bar = tqdm(range(len(pictures)), desc="fit vision", unit="image", disable=not progress)
        for index in bar:
            name = f"vision-{seed}-{trials}-{mask_ratio:g}-{index:05d}.safetensors"
            file = kept / name if kept is not None else None
            if file is not None and file.exists():
                difference = load_file(file)["difference"]
            else:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
                inputs = _image_inputs(model, processor, pictures[index])
                difference = _difference(model, inputs, mask_ratio, trials, batch_size, generator)
                _write(file, difference)
            total = difference if total is None else total + difference
            count += 1
    if total is None:
        raise ValueError("There are no images; give at least one.")
    directions = VTI_ANGLE * F.normalize(total / count, dim=-1)
    return SteeringVector(
        directions={},
        vision=dict(enumerate(directions)),
        method="vti",
        base_model=unwrap(model).config.name_or_path or "",
        mode="turn",
        pairs=count,
        seed=seed,
    )


def _write(file: Path | None, difference: torch.Tensor) -> None:
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"difference": difference.contiguous()}, file.with_suffix(".aside"))
    os.replace(file.with_suffix(".aside"), file)


def _image_inputs(model: nn.Module, processor: ProcessorMixin, image: Any) -> dict[str, Any]:
    base: Any = unwrap(model)
    inputs = prompt_inputs(processor, image, "What?")
    shown = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
    return dict(BatchFeature(shown).to(input_device(base), base.dtype))


def _difference(
    model: nn.Module,
    inputs: dict[str, Any],
    ratio: float,
    trials: int,
    batch_size: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean masked minus whole states of one image: float32 [L, T, D] or [L, D] on the CPU."""
    pixels, patch = inputs["pixel_values"], unwrap(model).config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]  # InternVL: a pair of equal sides
    whole = _states(model, inputs)[:, 0]
    total = torch.zeros_like(whole)
    for start in range(0, trials, batch_size):
        size = min(batch_size, trials - start)
        masked = [masked_patches(pixels, patch, ratio, generator) for _ in range(size)]
        batch = {k: torch.cat([v] * size) for k, v in inputs.items() if k != "pixel_values"}
        states = _states(model, {**batch, "pixel_values": torch.cat(masked)}, size)
        total += states.sum(1)
    return total / trials - whole


def _states(model: nn.Module, inputs: dict[str, Any], images: int = 1) -> torch.Tensor:
    """Outputs of the encoder's layers: float32 [L, images, T, D], or [L, images, D] of lists."""
    base: Any = unwrap(model)
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        parts = hidden.float().cpu().reshape(images, -1, *hidden.shape[1:])
        found.append(parts.mean(1))  # over the tiles of an image, or the tokens of a list

    handles = [layer.register_forward_hook(keep) for layer in vision_layers(model)]
    try:
        base.get_image_features(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def masked_patches(
    pixels: torch.Tensor, patch: int, ratio: float, generator: torch.Generator
) -> torch.Tensor:
    """Pixels with `ratio` of the patches filled with the mean of their channel.

    Args:
        pixels: [..., C, H, W], or Qwen's list of patches [N, 3 * ...].
        patch: side of a patch in pixels.
        ratio: share of patches to fill; the nearest number of them.
        generator: which draws the patches.
    """
    if pixels.ndim == 2:
        hidden = _drawn(len(pixels), ratio, generator).to(pixels.device)
        colours = pixels.view(len(pixels), 3, -1)
        fill = colours.mean((0, 2), keepdim=True).expand_as(colours).reshape_as(pixels)
        return torch.where(hidden[:, None], fill, pixels)
    height, width = pixels.shape[-2:]
    rows, columns = -(-height // patch), -(-width // patch)
    hidden = _drawn(rows * columns, ratio, generator).view(rows, columns).to(pixels.device)
    area = hidden.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:height, :width]
    return torch.where(area, pixels.mean((-2, -1), keepdim=True), pixels)


def _drawn(count: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: round(ratio * count)]] = True
    return hidden
