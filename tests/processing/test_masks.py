"""Masks: what goes in comes out, and coverage is exact (against pixels counted one by one)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from firsthand.processing.masks import (
    boxes_of,
    decode,
    encode,
    from_frame,
    patch_coverage,
    seen_area,
    to_frame,
)

FRAMES = ["resize", "native", "center_crop", "pad"]
sides = st.integers(1, 24)
masks = st.tuples(sides, sides).flatmap(lambda shape: arrays(bool, shape))
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
brief = settings(max_examples=60, deadline=None)


def counted(mask, grid) -> np.ndarray:
    """Coverage by splitting every pixel into R x C equal parts and counting those in each cell."""
    rows, columns = grid
    height, width = mask.shape
    fine = np.kron(mask, np.ones(grid))
    return fine.reshape(rows, height, columns, width).mean(axis=(1, 3))


@brief
@given(masks)
def test_encoding_is_lossless_and_coco(mask):
    rle = encode(mask)
    assert isinstance(rle["counts"], str) and rle["size"] == list(mask.shape)
    assert np.array_equal(decode(rle), mask)
    assert coco_mask.area({**rle, "counts": rle["counts"].encode()}) == mask.sum()


@brief
@given(masks, grids)
def test_coverage_equals_counting(mask, grid):
    expected = counted(mask, grid)
    assert np.allclose(patch_coverage(mask, grid, "resize"), expected, atol=1e-12)
    assert np.allclose(patch_coverage(mask, grid, "native"), expected, atol=1e-12)


@brief
@given(masks, grids)
def test_center_crop_and_pad_equal_cutting_and_padding_by_hand(mask, grid):
    mask = np.kron(mask, np.ones((2, 2)))  # even sides, so that both halves are whole pixels
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = mask[top : top + side, left : left + side]
    assert np.allclose(patch_coverage(mask, grid, "center_crop"), counted(cut, grid), atol=1e-12)
    side = max(height, width)
    high, wide = (side - height) // 2, (side - width) // 2
    padded = np.pad(mask, ((high, high), (wide, wide)))
    assert np.allclose(patch_coverage(mask, grid, "pad"), counted(padded, grid), atol=1e-12)


@brief
@given(masks, grids, st.sampled_from(["resize", "pad"]))
def test_no_area_is_lost(mask, grid, frame):
    left, top, right, bottom = seen_area(mask.shape[::-1], frame)
    cell = (right - left) * (bottom - top) / (grid[0] * grid[1])
    coverage = patch_coverage(mask, grid, frame)
    assert coverage.sum() * cell == pytest.approx(mask.sum())
    assert coverage.min() >= 0 and coverage.max() <= 1


@brief
@given(st.lists(st.floats(-50, 50), min_size=8, max_size=8), sides, sides)
def test_boxes_go_to_the_frame_and_back(numbers, width, height):
    boxes = np.reshape(numbers, (2, 4))
    for frame in FRAMES:
        there = to_frame(boxes, (width, height), frame)
        assert np.allclose(from_frame(there, (width, height), frame), boxes)
        assert np.allclose(to_frame([seen_area((width, height), frame)], (width, height), frame),
                           [[0, 0, 1, 1]])  # fmt: skip


def test_frames_of_a_wide_image():
    assert seen_area((80, 40), "center_crop") == (20, 0, 60, 40)
    assert seen_area((80, 40), "pad") == (0, -20, 80, 60)
    assert to_frame([[20, 0, 40, 40]], (80, 40), "center_crop").tolist() == [[0, 0, 0.5, 1]]
    assert to_frame([[0, 0, 80, 40]], (80, 40), "pad").tolist() == [[0, 0.25, 1, 0.75]]


@brief
@given(st.tuples(sides, sides).flatmap(lambda shape: arrays(bool, (3, *shape))))
def test_boxes_are_tight(stack):
    for mask, (x0, y0, x1, y1) in zip(stack, boxes_of(stack), strict=True):
        inner = mask[y0:y1, x0:x1]
        assert inner.sum() == mask.sum()
        if mask.any():
            assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()
        else:
            assert (x0, y0, x1, y1) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: encode(np.zeros((2, 2, 3))), "H, W"),
        (lambda: decode({"size": [2, 2]}), "counts"),
        (lambda: decode({"size": [2, 2], "counts": [4]}), "counts"),
        (lambda: patch_coverage(np.zeros(4), (2, 2)), "H, W"),
        (lambda: patch_coverage(np.zeros((4, 4)), (0, 2)), "at least one row"),
        (lambda: patch_coverage(np.zeros((4, 4)), (2, 2), "crop"), "frame is 'crop'"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
