"""Grounded samples, one at a time: what cannot be used is left out and listed with its reason.

What it is: the checks that explain verbs need before a mask is compared with anything. What it is
not: a builder, or the place where samples come from (`train_vision_modeling.load_samples`).

    dropped = []
    for sample in usable_samples(samples, 30, dropped): usable_expressions(sample, 0, dropped)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from firsthand.processing.masks import decode, patch_coverage

Sample = Mapping[str, Any]
Reasons = list[dict[str, Any]]  # {"id", "expression", "reason"}
BROKEN = (OSError, ValueError, SyntaxError, TypeError, KeyError)  # Pillow and pycocotools raise all


class Expression(NamedTuple):
    """A key expression: `text` at characters start to end, its nouns, its mask bool [H, W]."""

    text: str
    start: int
    end: int
    nouns: list[str]
    mask: np.ndarray


def usable_samples(
    samples: Any, count: int | None, dropped: Reasons, progress: bool = True
) -> Iterator[Sample]:
    """The first `count` samples (all if None) whose image can be read; the others go to `dropped`.

    Args:
        samples: a list or `datasets.Dataset` of grounded samples.
        count: how many of them.
        dropped: what cannot be used is appended here.
        progress: show a progress bar.
    """
    indices = range(len(samples) if count is None else min(count, len(samples)))
    for index in tqdm(indices, desc="samples", unit="sample", disable=not progress):
        try:
            sample = samples[index]
            if sample["image"] is None:
                raise ValueError("no image")
            sample["image"].load()
        except BROKEN as error:
            dropped.append({"id": str(index), "expression": None, "reason": _reason(error)})
        else:
            yield sample


def last_sample(samples: Any) -> Sample | None:
    """The last of some samples: the control of the first. None where it cannot be used."""
    try:
        return samples[len(samples) - 1] if samples[len(samples) - 1]["image"] else None
    except (IndexError, *BROKEN):
        return None


def usable_expressions(sample: Sample, turn: int, dropped: Reasons) -> list[Expression]:
    """The expressions of one turn whose mask and characters are right; others go to `dropped`."""
    found = []
    for expression in sample["turns"][turn]["expressions"] or ():
        try:
            found.append(_expression(sample, sample["turns"][turn]["answer"], expression))
        except BROKEN as error:
            drop(dropped, sample, expression.get("text"), _reason(error))
    return found


def drop(dropped: Reasons, sample: Sample, expression: str | None, reason: str) -> None:
    """Note why an expression (None: a whole turn) of a sample was left out."""
    dropped.append({"id": str(sample["id"]), "expression": expression, "reason": reason})


def seen_coverage(mask: np.ndarray, grid: tuple[int, int], frame: Any) -> np.ndarray | None:
    """`patch_coverage`; None where the model saw nothing of the mask, or nothing else."""
    coverage = patch_coverage(mask, grid, frame).round(9)
    return coverage if coverage.any() and not (coverage == 1).all() else None


def _expression(sample: Sample, answer: str, expression: Mapping[str, Any]) -> Expression:
    text, start, end = (expression[k] for k in ("text", "char_start", "char_end"))
    if not expression["mask"]:
        raise ValueError("no mask")
    mask, size = decode(expression["mask"]), sample["image"].size
    if mask.shape != size[::-1]:
        raise ValueError(f"the mask is {mask.shape}, its image {size[::-1]} (H, W)")
    if not mask.any():
        raise ValueError("the mask is empty")
    if not 0 <= start < end or answer[start:end] != text:
        raise ValueError(f"characters {start} to {end} of the answer are not the expression")
    return Expression(text, start, end, list(expression["nouns"] or ()), mask)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
