"""Grids of numbers as pictures: a cell for each layer and head, with its colour scale.

Pillow and numpy only. What it is not: drawing on images (overlays.py), or statistics: values, marks
and chance levels are the caller's.

    grids({"AUROC": means}, marked={"AUROC": [(14, 11)]}, chance={"AUROC": 0.5}).save("heads.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from firsthand.processing.overlays import FAINT, INK, PAPER, colours

MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 52, 40, 84, 46
WIDEST = 1800  # pixels of a figure, before panels go to the next line
RING = "#2fd3ff"  # far from every colour of the ramp


def grids(
    panels: Mapping[str, Any],
    title: str = "",
    marked: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    chance: Mapping[str, float] | None = None,
) -> Image.Image:
    """One heatmap a panel, layers downwards and heads across, each with its own colour bar.

    Args:
        panels: name -> values [layers, heads]; NaN cells are grey and crossed out.
        title: printed above.
        marked: name -> (layer, head) of cells to ring, best first.
        chance: name -> the value of no guide, ticked on the colour bar where it lies on it.

    Raises:
        ValueError: when there is no panel, or one is not two-dimensional.
    """
    drawn = []
    for name, values in panels.items():
        cells = np.asarray(values, dtype=np.float64)
        if cells.ndim != 2 or not cells.size:
            raise ValueError(f"panel {name!r} must be [layers, heads]; it is {cells.shape}")
        drawn.append(_panel(name, cells, (marked or {}).get(name, ()), (chance or {}).get(name)))
    if not drawn:
        raise ValueError("there is nothing to draw: give at least one panel")
    width, height = drawn[0].size
    columns = max(1, min(len(drawn), WIDEST // width))
    lines = -(-len(drawn) // columns)
    top = 34 if title else 0
    figure = Image.new("RGB", (columns * width, lines * height + top), PAPER)
    if title:
        draw = ImageDraw.Draw(figure)
        draw.text((16, 20), title, fill=INK, font=ImageFont.load_default(17), anchor="lm")
    for index, panel in enumerate(drawn):
        figure.paste(panel, (index % columns * width, top + index // columns * height))
    return figure


def _panel(
    name: str, values: np.ndarray, marked: Sequence[tuple[int, int]], chance: float | None
) -> Image.Image:
    layers, heads = values.shape
    side = int(np.clip(520 // max(layers, heads), 9, 24))
    left, top = MARGIN_LEFT, MARGIN_TOP
    wide, high = heads * side, layers * side
    needed = max(wide, round(ImageFont.load_default(15).getlength(name)))
    panel = Image.new("RGB", (left + needed + MARGIN_RIGHT, top + high + MARGIN_BOTTOM), PAPER)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    low, up = _limits(values)
    level = np.nan_to_num((values - low) / (up - low))
    for layer, head in np.ndindex(layers, heads):
        x, y = left + head * side, top + layer * side
        box = (x, y, x + side - 1, y + side - 1)
        if np.isnan(values[layer, head]):
            draw.rectangle(box, fill=FAINT)
            draw.line((x, y, x + side - 1, y + side - 1), fill=INK)
        else:
            draw.rectangle(box, fill=tuple(colours(level[layer, head]).tolist()))
    for layer, head in marked:
        x, y = left + head * side, top + layer * side
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=RING, width=2)
    draw.text((left, 22), name, fill=INK, font=ImageFont.load_default(15), anchor="lm")
    _axes(draw, (left, top), (layers, heads), side, font)
    _colour_bar(panel, (left + wide + 14, top, high), (low, up), chance, font)
    return panel


def _limits(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, up = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return low, up if up > low else low + 1


def _axes(
    draw: ImageDraw.ImageDraw, origin: tuple[int, int], shape: tuple[int, int], side: int, font: Any
) -> None:
    left, top = origin
    layers, heads = shape
    bottom = top + layers * side
    for layer in range(0, layers, _step(layers, side)):
        y = top + (layer + 0.5) * side
        draw.text((left - 6, y), str(layer), fill=INK, font=font, anchor="rm")
    for head in range(0, heads, _step(heads, side)):
        draw.text(
            (left + (head + 0.5) * side, bottom + 10), str(head), fill=INK, font=font, anchor="mm"
        )
    draw.text((left + heads * side / 2, bottom + 28), "head", fill=INK, font=font, anchor="mm")
    draw.text((8, top - 12), "layer", fill=INK, font=font, anchor="lm")


def _step(count: int, side: int) -> int:
    """Every how many-th cell is numbered, so that numbers do not touch."""
    return next(step for step in (1, 2, 5, 10, 20, 50, count) if step * side >= 20 or step >= count)


def _colour_bar(
    panel: Image.Image,
    place: tuple[int, int, int],
    limits: tuple[float, float],
    chance: float | None,
    font: Any,
) -> None:
    x, top, high = place
    low, up = limits
    ramp = np.repeat(colours(np.linspace(1, 0, high))[:, None], 12, axis=1)
    panel.paste(Image.fromarray(ramp), (x, top))
    draw = ImageDraw.Draw(panel)
    draw.text((x + 16, top + 6), f"{up:.2f}", fill=INK, font=font, anchor="lm")
    draw.text((x + 16, top + high - 6), f"{low:.2f}", fill=INK, font=font, anchor="lm")
    if chance is not None and low < chance < up:
        y = top + (up - chance) / (up - low) * high
        draw.line((x - 2, y, x + 14, y), fill=INK, width=2)
        if 18 < y - top < high - 18:
            draw.text((x + 16, y), "chance", fill=INK, font=font, anchor="lm")
