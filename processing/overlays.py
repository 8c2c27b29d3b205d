"""The only drawing on images: heatmaps, outlines, boxes, regions, strips, contact sheets, charts.

Pillow and numpy only; pictures come back as PIL images, charts as SVG and token strips also as HTML
(text is escaped, nothing is loaded from anywhere). It decides nothing: grids, masks and thresholds
are the caller's.

    heatmap(image, explanation.word(1).map).save("dog.png")
    bars({"recall": {"plain": (0.9, 0.86, 0.93)}}, title="New scenes")
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from firsthand.processing.masks import Frame, seen_area

# From dark to bright, each step brighter than the one before, so that it survives grey printing.
RAMP = np.array(
    [
        (13, 16, 51), (48, 24, 104), (98, 28, 124), (149, 40, 118), (197, 58, 98),
        (231, 91, 71), (248, 136, 54), (252, 189, 66), (249, 242, 164),
    ],
    dtype=np.float64,
)  # fmt: skip
PALETTE = ("#2a6f97", "#e07a3f", "#5a9367", "#8e5ea2", "#c0394b", "#6b7a8f", "#b8952f", "#3d3d3d")
INK, PAPER, FAINT, WARNING = "#1c2230", "#ffffff", "#d9dde5", "#c0392b"
Value = float | tuple[float, float, float]


def colours(values: Any) -> np.ndarray:
    """Ramp colours, uint8 [..., 3], of values in 0..1 [...] (clipped): dark = 0, bright = 1."""
    steps = np.clip(np.asarray(values, dtype=np.float64), 0, 1) * (len(RAMP) - 1)
    lower = np.minimum(steps.astype(int), len(RAMP) - 2)
    part = (steps - lower)[..., None]
    return np.round(RAMP[lower] * (1 - part) + RAMP[lower + 1] * part).astype(np.uint8)


def heatmap(
    image: Image.Image,
    grid: Any,
    smooth: bool = True,
    alpha: float = 0.55,
    frame: Frame = "resize",
    maximum: float | None = None,
) -> Image.Image:
    """`image` with a grid of values over it: bright where high, dimmed where low.

    Args:
        image: any PIL image; the result is RGB of the same size.
        grid: [R, C] finite values (array or CPU tensor); what lies below 0 counts as 0.
        smooth: bicubic interpolation between cells; False shows the cells and their borders.
        alpha: opacity at the highest value, 0 to 1.
        frame: the part of the image that the model saw: all of it ("resize", "native"), the central
            square ("center_crop"), or the square around it ("pad").
        maximum: the value of the brightest colour; None takes the grid's highest. Give one to
            compare several maps.

    Raises:
        ValueError: when the grid is not two-dimensional and finite, or alpha is not in 0..1.
    """
    values = np.asarray(grid, dtype=np.float32)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"grid must be finite values [R, C]; it has shape {values.shape}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be in 0..1.")
    top = float(values.max()) if maximum is None else maximum
    scaled = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    level = _lay(scaled, image.size, frame, smooth)
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)
    weight = (alpha * (0.45 + 0.55 * np.sqrt(level)))[..., None]
    mixed = picture * (1 - weight) + colours(level) * weight
    result = Image.fromarray(np.round(mixed).astype(np.uint8))
    if not smooth:
        _draw_cells(result, values.shape, frame)
    return result


def _lay(values: np.ndarray, size: tuple[int, int], frame: Frame, smooth: bool) -> np.ndarray:
    """`values` [R, C] over an image of `size`, float32 [H, W] in 0..1; 0 where nothing was seen."""
    left, top, right, bottom = seen_area(size, frame)
    inner = round(right - left), round(bottom - top)
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    laid = Image.fromarray(values).resize(inner, method)
    canvas = Image.new("F", size)
    canvas.paste(laid, (round(left), round(top)))
    return np.clip(np.asarray(canvas), 0, 1)


def _draw_cells(image: Image.Image, shape: tuple[int, int], frame: Frame) -> None:
    left, top, right, bottom = seen_area(image.size, frame)
    draw = ImageDraw.Draw(image, "RGBA")
    line = (255, 255, 255, 45)
    for x in np.linspace(left, right, shape[1] + 1)[1:-1]:
        draw.line((x, top, x, bottom), fill=line)
    for y in np.linspace(top, bottom, shape[0] + 1)[1:-1]:
        draw.line((left, y, right, y), fill=line)


def outline(
    image: Image.Image, mask: Any, colour: str = PALETTE[1], fill: float = 0.2
) -> Image.Image:
    """`image` (RGB) with a mask tinted and outlined.

    Args:
        mask: [H, W], true inside, of the image's size.
        colour: CSS colour.
        fill: opacity of the tint inside, 0 to 1.

    Raises:
        ValueError: when the mask has another size than the image.
    """
    inside = np.asarray(mask).astype(bool)
    if inside.shape != image.size[::-1]:
        raise ValueError(f"The mask is {inside.shape}, the image {image.size[::-1]} (H, W).")
    width = _stroke(image)
    area = Image.fromarray(inside)
    grey = area.convert("L")
    edge = np.asarray(grey) > np.asarray(grey.filter(ImageFilter.MinFilter(2 * width + 1)))
    halo = np.asarray(grey.filter(ImageFilter.MaxFilter(3))) > np.asarray(grey)
    result = image.convert("RGB")
    tint = Image.new("RGB", image.size, colour)
    result.paste(tint, mask=grey.point(lambda value: round(value * fill)))
    result.paste(tint, mask=Image.fromarray(edge))
    result.paste("white", mask=Image.fromarray(halo))
    return result


def boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """`image` (RGB) with boxes [x0, y0, x1, y1] in pixels, one colour each, and their labels.

    Raises:
        ValueError: when there are not as many labels as boxes.
    """
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(labels)} labels.")
    result = image.convert("RGB")
    draw = ImageDraw.Draw(result)
    font = _font(max(11, min(image.size) // 22))
    for index, box in enumerate(boxes):
        colour = PALETTE[index % len(PALETTE)]
        draw.rectangle(tuple(box), outline=colour, width=_stroke(image))
        if labels is not None:
            _tag(draw, box, labels[index], colour, font)
    return result


def _tag(draw: ImageDraw.ImageDraw, box: Sequence[float], text: str, colour: str, font: Any):
    width, height = draw.textlength(text, font=font) + 8, font.size + 6
    limit = draw.im.size
    x = max(0, min(box[0], limit[0] - width))
    y = box[1] - height if box[1] >= height else min(box[1], limit[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 4, y + height / 2), text, fill="white", font=font, anchor="lm")


def cell_labels(labels: Any, size: tuple[int, int], frame: Frame = "resize") -> np.ndarray:
    """The label of each pixel's image token: int64 [H, W], -1 where the model saw nothing.

    Args:
        labels: [R, C] integers, one an image token.
        size: (width, height) of the original image.
        frame: the part of the image that the model saw.
    """
    labels = np.asarray(labels)
    left, top, right, bottom = seen_area(size, frame)
    places = []
    for start, end, pixels, cells in (
        (top, bottom, size[1], labels.shape[0]),
        (left, right, size[0], labels.shape[1]),
    ):
        place = np.floor((np.arange(pixels) + 0.5 - start) / (end - start) * cells)
        places.append(np.where((place >= 0) & (place < cells), place, -1).astype(int))
    seen = (places[0] >= 0)[:, None] & (places[1] >= 0)
    return np.where(seen, labels[places[0][:, None], places[1]], -1)


def regions(
    image: Image.Image,
    labels: Any,
    names: Sequence[str],
    frame: Frame = "resize",
    alpha: float = 0.45,
) -> Image.Image:
    """`image` (RGB) with tinted, outlined and named regions over a legend of all names.

    Args:
        labels: [R, C] integers: index of the token's name, or -1 for none.
        names: at most len(PALETTE), one a colour; "car (12 %)" is written "car" on its region.
        frame: the part of the image that the model saw.
        alpha: opacity of the tint, 0 to 1.

    Raises:
        ValueError: when there are more names than colours, or a label has no name.
    """
    labels = np.asarray(labels)
    if len(names) > len(PALETTE) or labels.max(initial=-1) >= len(names):
        raise ValueError(f"{len(names)} names for labels up to {labels.max()}, at most 8 colours.")
    result = image.convert("RGB")
    at = cell_labels(labels, image.size, frame)
    width, font = _stroke(image), _font(max(11, min(image.size) // 26))
    for index in range(len(names)):
        grey = Image.fromarray(at == index).convert("L")
        edge = np.asarray(grey) > np.asarray(grey.filter(ImageFilter.MinFilter(2 * width + 1)))
        tint = Image.new("RGB", image.size, PALETTE[index])
        result.paste(tint, mask=grey.point(lambda value: round(value * alpha)))
        result.paste(tint, mask=Image.fromarray(edge))
    draw = ImageDraw.Draw(result)
    left, top, right, bottom = seen_area(image.size, frame)
    for index, name in enumerate(names):
        cells = np.argwhere(labels == index) + 0.5
        if len(cells):
            middle = cells[np.argmin(((cells - cells.mean(0)) ** 2).sum(1))] / labels.shape
            text = name.split(" (")[0]
            x = left + middle[1] * (right - left) - (draw.textlength(text, font=font) + 8) / 2
            y = top + middle[0] * (bottom - top) + (font.size + 6) / 2
            _tag(draw, (x, y), text, PALETTE[index], font)
    return _with_legend(result, names)


def _with_legend(image: Image.Image, names: Sequence[str]) -> Image.Image:
    """The image over one coloured chip a name, in lines."""
    font, x, y, places = _font(14), 8, 8, []
    for name in names:
        wide = round(font.getlength(name)) + 30
        if x > 8 and x + wide > image.width:
            x, y = 8, y + 24
        places.append((x, y, name))
        x += wide
    result = Image.new("RGB", (image.width, image.height + (y + 26 if names else 0)), PAPER)
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for index, (x, y, name) in enumerate(places):
        top = image.height + y
        draw.rectangle((x, top, x + 12, top + 12), fill=PALETTE[index])
        draw.text((x + 18, top + 6), name, fill=INK, font=font, anchor="lm")
    return result


def _stroke(image: Image.Image) -> int:
    return max(2, round(min(image.size) / 180))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def strip(
    tokens: Sequence[str],
    values: Sequence[float],
    warn_below: float | None = None,
    width: int = 640,
) -> Image.Image:
    """Tokens as coloured chips, wrapped into lines of `width` pixels; see `strip_html`."""
    _check_strip(tokens, values)
    font, gap, height = _font(16), 4, 30
    chips, x, y = [], gap, gap
    for token, value in zip(tokens, values, strict=True):
        text = token.strip() or "·"
        wide = round(font.getlength(text)) + 14
        if x > gap and x + wide > width - gap:
            x, y = gap, y + height + gap
        chips.append((x, y, wide, text, float(value)))
        x += wide + gap
    result = Image.new("RGB", (width, y + height + gap), PAPER)
    draw = ImageDraw.Draw(result)
    for x, y, wide, text, value in chips:
        back, ink = _chip(value)
        draw.rounded_rectangle((x, y, x + wide, y + height), radius=6, fill=back)
        draw.text((x + wide / 2, y + height / 2), text, fill=ink, font=font, anchor="mm")
        if warn_below is not None and value < warn_below:
            box = (x, y, x + wide, y + height)
            draw.rounded_rectangle(box, radius=6, outline=WARNING, width=2)
    return result


def strip_html(
    tokens: Sequence[str],
    values: Sequence[float],
    warn_below: float | None = None,
    clickable: bool = False,
    chosen: int | None = None,
) -> str:
    """Tokens as coloured HTML chips: the darker, the higher the value.

    Args:
        tokens: any text; it is escaped.
        values: one a token, 0 to 1 (for instance visual contributions).
        warn_below: tokens with a lower value get a red border and the class "warning".
        clickable: chips are buttons; each carries its index as `data-index`.
        chosen: index of the chip that is marked as pressed.

    Raises:
        ValueError: when there are not as many values as tokens.
    """
    _check_strip(tokens, values)
    chips = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
        back, ink = _chip(float(value))
        warned = warn_below is not None and value < warn_below
        border = WARNING if warned else "transparent"
        pressed = str(index == chosen).lower()
        button = f'button type="button" data-index="{index}" aria-pressed="{pressed}"'
        tag = button if clickable else "span"
        chips.append(
            f'<{tag} class="{"chip warning" if warned else "chip"}" title="{float(value):.2f}" '
            f'style="display:inline-block;margin:2px;padding:3px 7px;border-radius:6px;'
            f'border:2px solid {border};background:{back};color:{ink}">'
            f"{escape(token.strip())}</{tag.split()[0]}>"
        )
    return f'<div class="strip">{"".join(chips)}</div>'


def _check_strip(tokens: Sequence[str], values: Sequence[float]) -> None:
    if len(tokens) != len(values):
        raise ValueError(f"{len(tokens)} tokens but {len(values)} values.")


def _chip(value: float) -> tuple[str, str]:
    """Background and ink of a chip: from near white to deep blue."""
    part = min(max(value, 0.0), 1.0)
    light, deep = np.array([238, 242, 247]), np.array([22, 82, 120])
    back = np.round(light * (1 - part) + deep * part).astype(int)
    return "#{:02x}{:02x}{:02x}".format(*back), PAPER if part > 0.65 else INK


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    tile: int = 240,
) -> Image.Image:
    """Images side by side in squares of `tile` pixels, each over its caption, wrapped.

    Raises:
        ValueError: when there are no images, or not as many captions as images.
    """
    if not images or len(images) != len(captions):
        raise ValueError(
            f"{len(images)} images, {len(captions)} captions: give one each, at least 1."
        )
    columns = columns or min(len(images), 4)
    font, gap = _font(14), 12
    texts = [_wrap(caption, font, tile) for caption in captions]
    indices = range(len(images))
    rows = [indices[start : start + columns] for start in indices[::columns]]
    heights = [tile + gap + 18 * max(len(texts[i]) for i in row) for row in rows]
    size = (columns * (tile + gap) + gap, sum(heights) + gap * (len(rows) + 1))
    sheet, y = Image.new("RGB", size, PAPER), gap
    draw = ImageDraw.Draw(sheet)
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            x = gap + column * (tile + gap)
            small = _fit(images[index], tile)
            sheet.paste(small, (x + (tile - small.width) // 2, y + (tile - small.height) // 2))
            for line, text in enumerate(texts[index]):
                draw.text((x, y + tile + 6 + 18 * line), text, fill=INK, font=font)
        y += height + gap
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels; words that are longer are broken."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            cut = next(
                n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width
            )
            lines, word = [*lines, word[:cut]], word[cut:]
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if font.getlength(joined) <= width else [*lines, word]
    return [line for line in lines if line] or [""]


def bars(
    groups: Mapping[str, Mapping[str, Value]],
    title: str = "",
    maximum: float | None = None,
    width: int = 640,
) -> str:
    """A horizontal bar chart as a self-contained SVG.

    Args:
        groups: label -> series -> value, or (value, low, high) to draw an interval's whiskers; for
            instance metric -> arm -> (value, low, high). Values are >= 0.
        title: printed above; text is escaped.
        maximum: right end of the scale; None takes the highest value or interval end.
        width: pixels.

    Raises:
        ValueError: when there is nothing to draw, or a value is negative or not finite.
    """
    rows = [(g, s, _interval(g, s, v)) for g, series in groups.items() for s, v in series.items()]
    if not rows:
        raise ValueError("There is nothing to draw: give at least one bar.")
    top = maximum or max(max(interval) for *_, interval in rows) or 1.0
    names = list(dict.fromkeys(series for _, series, _ in rows))
    label_width = 16 + max(round(1.2 * _font(13).getlength(group)) for group in groups)
    left, right = min(label_width, width // 2), width - 60
    parts, y = [], 12
    if title:
        parts.append(_text(8, y + 8, title, size=15, weight=600))
        y += 28
    if len(names) > 1:
        parts.append(_legend(names, left, y))
        y += 26
    previous = None
    for group, series, (value, low, high) in rows:
        if group != previous:
            y += 8 if previous is not None else 0
            count = len(groups[group])
            parts.append(_text(left - 8, y + 9 * count, group, anchor="end"))
            previous = group
        scale = (right - left) / top
        ends = tuple(left + min(x, top) * scale for x in (value, low, high))
        parts.append(_bar(left, y, ends, PALETTE[names.index(series) % len(PALETTE)], low < high))
        parts.append(_text(max(ends) + 6, y + 9, f"{value:.2f}", size=12))
        y += 18
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 10}" width="{width}" '
        f'height="{y + 10}" font-family="system-ui, sans-serif" role="img" '
        f'aria-label="{escape(title or "bar chart")}">{body}</svg>'
    )


def _interval(group: str, series: str, value: Value) -> tuple[float, float, float]:
    numbers = value if isinstance(value, tuple) else (value, value, value)
    centre, low, high = (float(number) for number in numbers)
    if not np.isfinite((centre, low, high)).all() or min(centre, low, high) < 0:
        raise ValueError(f"Bar {group} / {series} is {value}; values must be finite and >= 0.")
    return centre, low, high


def _text(
    x: float, y: float, text: str, size: int = 13, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{INK}" '
        f'text-anchor="{anchor}" dominant-baseline="central">{escape(text)}</text>'
    )


def _legend(names: Sequence[str], x: float, y: float) -> str:
    parts = []
    for index, name in enumerate(names):
        colour = PALETTE[index % len(PALETTE)]
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 18, y + 6, name, size=12))
        x += 34 + _font(12).getlength(name)
    return "".join(parts)


def _bar(left: float, y: float, ends: tuple[float, ...], colour: str, whiskers: bool) -> str:
    end, low, high = ends
    width = max(end - left, 1)
    bar = (
        f'<rect x="{left:.1f}" y="{y + 2}" width="{width:.1f}" height="14" rx="2" fill="{colour}"/>'
    )
    if not whiskers:
        return bar
    path = f"M{low:.1f} {y + 5}v8M{low:.1f} {y + 9}H{high:.1f}M{high:.1f} {y + 5}v8"
    return f'{bar}<path d="{path}" stroke="{INK}" stroke-width="1.5" fill="none"/>'
