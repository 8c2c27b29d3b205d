"""Inputs of contrastive decoding: each row, and the same row with less to see, in one batch.

What it is: the second branches of VCD (a noised or blurred image), ICD (a disturbed instruction),
M3ID and PAI (no image), padded to one length. What it is not: the decoding
(`modeling/contrastive.py`).

    inputs = both_branches(processor, rows, method="vcd")
    model.generate(**inputs, custom_generate=CONTRASTS["vcd"])
    generate_answers(model, processor, rows, **contrast_settings("vcd"))  # or many rows in batches
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from firsthand.modeling.contrastive import CONTRASTS
from firsthand.modeling.image_baselines import NOISE_STEP, signal_kept
from firsthand.processing.generation import Row, build_prompt
from firsthand.processing.perturb import perturb

BRANCHES = {"vcd": "noise", "vcd-blur": "blur", "icd": "instruction", "m3id": "none", "pai": "none"}
METHODS = tuple(BRANCHES)
DISTURBANCE = "You are a confused detector that mixes up what it sees. "


def contrast_settings(
    method: str, alpha: float | None = None, beta: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """Settings of `generate_answers` for one of METHODS.

    Args:
        method: one of METHODS.
        alpha: weight of the contrast instead of the method's own (m3id: its rate of forgetting).
        beta: cutoff instead of the method's own.
        seed: of the noise.

    Raises:
        ValueError: for an unknown method, or values that it cannot have.
    """
    check_method(method)
    contrast = CONTRASTS[method.removesuffix("-blur")]
    if alpha is not None:
        contrast = replace(contrast, **{"decay" if method == "m3id" else "alpha": alpha})
    if beta is not None:
        contrast = replace(contrast, beta=beta)
    return {
        "custom_generate": contrast,
        "prepare": partial(both_branches, method=method, seed=seed),
    }


def check_method(method: str) -> None:
    """Raise ValueError for a method that is not in METHODS."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")


def both_branches(
    processor: Any, rows: list[Row], device: Any = "cpu", *, method: str, seed: int = 0
) -> Any:
    """Left-padded inputs of B rows (`image`, `question`, perhaps `start`) and their contrasts.

    Args:
        processor: the model's own, with a chat template.
        rows: as in `prepare_inputs`.
        device: where the inputs go.
        method: one of METHODS.
        seed: of the noise, which is the same for every image of one size, in whatever batch.

    Returns:
        What the processor gives: input_ids and attention_mask [2B, T], ...; the contrasts follow
        the rows. Without an image there are pixel values of B images only.

    Raises:
        ValueError: for an unknown method, or a processor without chat template.
    """
    check_method(method)
    branch = BRANCHES[method]
    images = [[row["image"].convert("RGB")] for row in rows]
    inputs = processor(
        images=images + [_other_image(branch, image) for [image] in images],
        text=[_text(processor, row, "") for row in rows]
        + [_text(processor, row, branch) for row in rows],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    if branch == "noise":
        _add_noise(inputs, seed)
    return inputs.to(device)


def _text(processor: Any, row: Row, branch: str) -> str:
    question = DISTURBANCE + row["question"] if branch == "instruction" else row["question"]
    return build_prompt(processor, question, branch != "none") + row.get("start", "")


def _other_image(branch: str, image: Any) -> list[Any]:
    if branch == "blur":
        return [perturb(image, np.ones((image.height, image.width), bool), "blur")]
    return [] if branch == "none" else [image]


def _add_noise(inputs: Any, seed: int) -> None:
    """Noise on the second half of the images, in the processor's normalised units."""
    pixels = inputs["pixel_values"]
    half = len(pixels) // 2
    sizes = [1] * half
    if "image_grid_thw" in inputs:  # Qwen: the patches of all images in one list
        grids = inputs["image_grid_thw"].prod(-1).tolist()
        sizes = grids[len(grids) // 2 :]
    parts = pixels[half:].split(sizes)
    inputs["pixel_values"] = torch.cat([pixels[:half], *(diffused(part, seed) for part in parts)])


def diffused(pixels: torch.Tensor, seed: int = 0, step: int = NOISE_STEP) -> torch.Tensor:
    """Normalised pixels after `step` (1 to 1000) steps of VCD's forward diffusion; same shape."""
    kept = signal_kept(step - 1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise
