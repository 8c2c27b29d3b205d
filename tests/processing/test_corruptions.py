"""Corruptions: the right amount is gone, the size stays, a seed gives the same picture again."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_image, tiny_inputs, tiny_processor

from firsthand.processing.corruptions import CROP_AREA, CROP_RATIO, _crop_box, corrupt, diffuse

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from(["crop", "mask", "blank", "other", "diffusion"]), st.integers())
def test_size_stays_and_a_seed_decides(size, kind, seed):
    image = tiny_image(1).resize(size)
    one, again = (corrupt(image, kind, seed, other=tiny_image(2)) for _ in range(2))
    assert one.size == size and one.mode == "RGB" and one.tobytes() == again.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(60, 300), st.integers(60, 300)), st.integers())
def test_a_crop_keeps_a_fifth_at_most(size, seed):
    left, top, right, bottom = _crop_box(size, random.Random(seed))
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    width, height = right - left, bottom - top
    low, high = (size[0] * size[1] * bound for bound in CROP_AREA)
    slack = width + height + 1  # sides are whole pixels
    assert low - slack <= width * height <= high + slack
    if min(size) > 0.6 * max(size):  # a side of the image may cut a long crop
        assert CROP_RATIO[0] - 0.2 <= width / height <= CROP_RATIO[1] + 0.4


def test_a_crop_shows_a_part_of_the_image_only():
    halves = np.zeros((100, 100, 3), np.uint8)
    halves[:, 50:] = 255
    whole = Image.fromarray(halves)
    shown = [np.asarray(corrupt(whole, "crop", seed)).mean() for seed in range(40)]
    assert sum(value in (0, 255) for value in shown) > 15  # one half only
    assert len({corrupt(tiny_image(), "crop", seed).tobytes() for seed in range(20)}) > 10


def test_a_mask_takes_thirty_percent_of_the_patches():
    white = Image.new("RGB", (240, 480), (255, 255, 255))
    gone = (np.asarray(corrupt(white, "mask", 3, colour=(9, 8, 7))) == (9, 8, 7)).all(-1)
    patches = gone.reshape(24, 20, 24, 10)
    assert (patches.all((1, 3)) == patches.any((1, 3))).all()
    assert patches.all((1, 3)).sum() == round(0.3 * 576)
    other = (np.asarray(corrupt(white, "mask", 4, colour=(9, 8, 7))) == (9, 8, 7)).all(-1)
    assert (gone != other).any()


def test_blank_and_other_are_what_they_say():
    image, other = tiny_image(1), tiny_image(2, 33, 44)
    assert set(corrupt(image, "blank", colour=(1, 2, 3)).get_flattened_data()) == {(1, 2, 3)}
    expected = other.resize(image.size, Image.Resampling.BICUBIC)
    assert corrupt(image, "other", other=other).tobytes() == expected.tobytes()


def test_noise_is_that_of_step_500_and_of_the_tile_alone():
    tiles = torch.cat([torch.full((1, 3, 200, 200), 2.0), torch.rand(2, 3, 200, 200)])
    tiles[2] = 0  # padding
    noised = diffuse(tiles, seed=1)
    kept = math.prod(
        1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 999))) for i in range(501)
    )
    assert noised[0].mean().item() == pytest.approx(2 * math.sqrt(kept), abs=0.01)
    assert noised[0].var().item() == pytest.approx(1 - kept, rel=0.02)
    assert not noised[2].any()
    assert torch.equal(diffuse(tiles[1:2], seed=1)[0], noised[1])
    assert not torch.equal(diffuse(tiles, seed=2)[1], noised[1])
    stacked = diffuse(tiles[None], seed=1)
    assert torch.equal(stacked[0], noised)


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3", "smolvlm"])
def test_noise_does_not_depend_on_the_batch(family):
    inputs = tiny_inputs(tiny_processor(family), ["What?", "Is there a dog in the image?"])
    both = diffuse(inputs["pixel_values"], 0)
    alone = diffuse(inputs["pixel_values"][:1], 0)
    assert torch.equal(both[:1], alone) and both.shape == inputs["pixel_values"].shape


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="'swirl'.*crop, diffusion, mask, other, blank"):
        corrupt(tiny_image(), "swirl")
    with pytest.raises(ValueError, match="needs the other image"):
        corrupt(tiny_image(), "other")
