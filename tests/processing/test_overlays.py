"""Drawing: colours stand where the numbers say, sizes are kept, text is escaped."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from firsthand.processing.overlays import (
    RAMP,
    bars,
    boxes,
    colours,
    contact_sheet,
    heatmap,
    outline,
    strip,
    strip_html,
)

GREY = Image.new("RGB", (120, 80), (128, 128, 128))


def brightness(image):
    return np.asarray(image.convert("L"), dtype=float)


def peak(grid, **settings):
    """(row, column) in pixels of the brightest place."""
    picture = brightness(heatmap(GREY, grid, **settings))
    return np.unravel_index(picture.argmax(), picture.shape)


def one_cell(row, column, shape=(4, 4)):
    grid = np.zeros(shape)
    grid[row, column] = 1
    return grid


def test_the_ramp_gets_steadily_brighter():
    luminance = colours(np.linspace(0, 1, 200)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -0.6).all() and luminance[-1] > luminance[0] + 180
    assert np.array_equal(colours([0.0, 1.0, 7.0]), RAMP[[0, -1, -1]].astype(np.uint8))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("cell", [(0, 0), (1, 2), (3, 3)])
def test_the_brightest_place_lies_in_the_cell(smooth, cell):
    y, x = peak(one_cell(*cell), smooth=smooth)
    assert (y // 20, x // 30) == cell


@pytest.mark.parametrize(
    ("size", "frame", "expected"),
    [
        ((120, 80), "center_crop", (20, 0, 40, 20)),
        ((80, 120), "center_crop", (0, 20, 20, 40)),
        ((120, 80), "pad", (0, -20, 30, 10)),
        ((120, 80), "resize", (0, 0, 30, 20)),
        ((120, 80), "native", (0, 0, 30, 20)),
    ],
)
def test_the_grid_lies_where_the_model_looked(size, frame, expected):
    image = Image.new("RGB", size, (90, 90, 90))
    level = brightness(heatmap(image, one_cell(0, 0), smooth=False, frame=frame))
    lit = np.argwhere(level > level.min() + 60)
    box = (max(expected[0], 0), max(expected[1], 0), expected[2], expected[3])
    assert (lit[:, 1].min(), lit[:, 0].min(), lit[:, 1].max() + 1, lit[:, 0].max() + 1) == box


def test_heatmap_takes_tensors_any_mode_and_keeps_the_size():
    image = Image.new("RGBA", (33, 21), (10, 200, 30, 128))
    result = heatmap(image, torch.rand(5, 7))
    assert result.size == image.size and result.mode == "RGB"


def test_a_grid_of_zeros_has_no_peak_and_alpha_zero_is_the_image():
    assert np.ptp(brightness(heatmap(GREY, np.zeros((4, 4))))) == 0
    assert ImageChops.difference(heatmap(GREY, one_cell(1, 1), alpha=0), GREY).getbbox() is None


def test_maximum_makes_maps_comparable():
    weak, strong = one_cell(1, 1) * 0.1, one_cell(1, 1)
    alone = brightness(heatmap(GREY, weak)).max()
    compared = brightness(heatmap(GREY, weak, maximum=1.0)).max()
    assert alone == brightness(heatmap(GREY, strong)).max() > compared + 20


@pytest.mark.parametrize(
    ("grid", "settings", "message"),
    [
        (np.zeros(4), {}, r"\(4,\)"),
        (np.full((2, 2), np.nan), {}, "finite"),
        (np.zeros((2, 2)), {"alpha": 2}, "alpha"),
        (np.zeros((2, 2)), {"frame": "crop"}, "center_crop"),
    ],
)
def test_heatmap_refuses(grid, settings, message):
    with pytest.raises(ValueError, match=message):
        heatmap(GREY, grid, **settings)


def test_outline_colours_the_edge_and_leaves_the_rest():
    mask = np.zeros((80, 120), bool)
    mask[20:60, 30:90] = True
    result = np.asarray(outline(GREY, mask, colour="#ff0000", fill=0.5))
    assert tuple(result[20, 50]) == (255, 0, 0)
    assert tuple(result[19, 50]) == (255, 255, 255)
    assert result[40, 60, 0] > 180 > result[40, 60, 1]
    assert tuple(result[5, 5]) == (128, 128, 128)
    with pytest.raises(ValueError, match=r"\(10, 10\)"):
        outline(GREY, np.zeros((10, 10)))


def test_boxes_and_labels_stay_inside():
    result = boxes(GREY, [[0, 0, 60, 40], [100, 70, 119, 79]], ["a dog", "a very long label"])
    assert result.size == GREY.size
    drawn = np.asarray(ImageChops.difference(result, GREY)).sum(-1) > 0
    assert drawn[0, 30] and drawn[20, 0] and drawn[70:80, 100:].any()
    assert not drawn[45:50, 10:40].any()
    with pytest.raises(ValueError, match="1 boxes but 0 labels"):
        boxes(GREY, [[0, 0, 1, 1]], [])


def test_strip_html_escapes_and_warns():
    html = strip_html(["<b>", " dog", "&"], [0.0, 0.9, 0.1], warn_below=0.05)
    assert "<b>" not in html and "&lt;b&gt;" in html and "&amp;" in html
    assert html.count('class="chip warning"') == 1 and html.count('class="chip"') == 2
    assert ElementTree.fromstring(html).tag == "div"
    assert strip_html(["a"], [0.0]).count("warning") == 0
    with pytest.raises(ValueError, match="2 tokens but 1 values"):
        strip_html(["a", "b"], [0.1])


def test_strip_wraps_and_warns_in_red():
    words = ["word"] * 40
    high, low = strip(words, [0.9] * 40, 0.2, width=300), strip(words, [0.1] * 40, 0.2, width=300)
    assert high.width == 300 and high.height > 100

    def red(picture):
        return int((np.asarray(picture).astype(int) @ [2, -1, -1] > 150).sum())

    assert red(high) == 0 and red(low) > 500


def test_contact_sheet_holds_every_picture_and_wraps_captions():
    pictures = [Image.new("RGB", (50, 100), c) for c in ("red", "lime", "blue", "yellow", "cyan")]
    captions = ["short", "a caption that needs several lines to be read", "x" * 200, "", "é"]
    sheet = contact_sheet(pictures, captions, columns=3, tile=100)
    assert sheet.width == 3 * 112 + 12 and sheet.height > 2 * 112
    colours_there = {colour for _, colour in sheet.getcolors(maxcolors=100_000)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)} <= colours_there
    with pytest.raises(ValueError, match="0 images"):
        contact_sheet([], [])


def rects(svg):
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    return root, [r for r in root.iter(f"{space}rect") if r.get("height") == "14"], space


def test_bars_are_as_long_as_their_values():
    groups = {
        "recall": {"plain": (0.8, 0.7, 0.9), "steered": (0.4, 0.3, 0.5)},
        "<chair>": {"plain": 0.2},
    }
    root, found, space = rects(bars(groups, title="a & b", maximum=1.0))
    widths = [float(rect.get("width")) for rect in found]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[0] == pytest.approx(4 * widths[2], rel=0.01)
    assert len(list(root.iter(f"{space}path"))) == 2
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"a & b", "recall", "<chair>", "plain", "steered", "0.80"} <= set(texts)


@pytest.mark.parametrize("groups", [{}, {"a": {}}, {"a": {"b": -1.0}}, {"a": {"b": float("nan")}}])
def test_bars_refuse(groups):
    with pytest.raises(ValueError):
        bars(groups)


def test_bars_of_zero():
    _, found, _ = rects(bars({"a": {"b": 0.0}}))
    assert len(found) == 1
