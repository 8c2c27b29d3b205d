"""What is filled is the region and nothing else; the control is equal and elsewhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_image, tiny_processor

from firsthand.processing.masks import encode
from firsthand.processing.perturb import elsewhere, mean_colour, perturb, region_of

IMAGE = tiny_image()  # 80 x 60
REGION = np.zeros((60, 80), bool)
REGION[10:30, 20:50] = True


@pytest.mark.parametrize("fill", ["mean", "black", "noise", "blur"])
def test_only_the_region_changes(fill):
    before = np.array(IMAGE)
    after = np.array(perturb(IMAGE, REGION, fill, seed=1))
    assert np.array_equal(before[~REGION], after[~REGION])
    assert not np.array_equal(before[REGION], after[REGION])
    assert np.array_equal(after, np.array(perturb(IMAGE, REGION, fill, seed=1)))


def test_fills_are_what_they_say():
    assert set(map(tuple, np.array(perturb(IMAGE, REGION, "black"))[REGION])) == {(0, 0, 0)}
    colour = mean_colour(tiny_processor("llava"))
    assert colour == (122, 116, 104)
    filled = np.array(perturb(IMAGE, REGION, "mean", colour=(1, 2, 3)))
    assert set(map(tuple, filled[REGION])) == {(1, 2, 3)}
    noise = [np.array(perturb(IMAGE, REGION, "noise", seed=s))[REGION] for s in (0, 1)]
    assert not np.array_equal(*noise) and 100 < noise[0].mean() < 155
    blurred = np.array(perturb(IMAGE, np.ones((60, 80), bool), "blur"))
    assert blurred.std() < np.array(IMAGE).std()


def test_greyscale_and_transparent_images_are_filled_too():
    for mode in ("L", "RGBA", "P"):
        assert perturb(IMAGE.convert(mode), REGION).mode == "RGB"


@given(
    st.integers(0, 79), st.integers(0, 59), st.integers(1, 80), st.integers(1, 60), st.integers()
)
def test_the_control_is_equal_and_elsewhere(x, y, width, height, seed):
    region = np.zeros((60, 80), bool)
    region[y : y + height, x : x + width] = True
    other = elsewhere(region, seed)
    right, bottom = min(x + width, 80), min(y + height, 60)
    across = x >= right - x or 80 - right >= right - x  # room to its left or its right
    room = across or y >= bottom - y or 60 - bottom >= bottom - y
    assert (other is not None) == room
    if other is not None:
        assert other.sum() == region.sum() and not (other & region).any()
        assert np.array_equal(other, elsewhere(region, seed))


def test_a_shape_keeps_its_form():
    region = np.zeros((60, 80), bool)
    region[0:5, 0:10] = region[5:10, 0:3] = True
    other = elsewhere(region, 3)
    rows, columns = np.nonzero(other)
    cut = other[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.array_equal(cut, region[:10, :10])
    assert elsewhere(np.zeros((60, 80), bool)) is None


def test_regions_are_boxes_or_masks():
    corner = np.zeros((60, 80), bool)
    corner[:4, :4] = True
    dog = {"boxes": [[20.0, 10.0, 50.0, 30.0]], "mask": encode(corner)}
    assert np.array_equal(region_of([dog], (80, 60)), REGION)
    assert np.array_equal(region_of([dog], (80, 60), "mask"), corner)
    outside = {"boxes": [[-5.0, -5.0, 4.0, 4.0], [76.5, 58.0, 200.0, 90.0]], "mask": None}
    assert region_of([outside], (80, 60)).sum() == 16 + 4 * 2
    assert not region_of([outside], (80, 60), "mask").any()


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="fill is 'white'.*mean, black, noise, blur"):
        perturb(IMAGE, REGION, "white")
    with pytest.raises(ValueError, match=r"region is \(3, 3\), the image \(60, 80\)"):
        perturb(IMAGE, np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="region is 'box'"):
        region_of([], (80, 60), "box")
    with pytest.raises(ValueError, match=r"a mask is \(3, 3\)"):
        region_of([{"boxes": [], "mask": encode(np.ones((3, 3)))}], (80, 60), "mask")
    assert perturb(Image.new("RGB", (80, 60)), REGION).size == (80, 60)
