"""An image without its content: of the same size, and without the content."""

import numpy as np
import pytest

from firsthand.modeling.image_baselines import baseline_image

RAMP = np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
CHECKS = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)


@pytest.mark.parametrize("baseline", ["blank", "blur", "noise"])
def test_size_stays_and_the_same_again(baseline):
    found = baseline_image(CHECKS, baseline)
    assert found.shape == CHECKS.shape and found.dtype == np.uint8
    assert np.array_equal(found, baseline_image(CHECKS, baseline))
    assert not np.array_equal(found, CHECKS)
    assert baseline_image(CHECKS[:3, :2], baseline).shape == (3, 2, 3)


def test_blank_is_the_mean_colour():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = (100, 200, 40)
    assert np.array_equal(
        np.unique(baseline_image(image, "blank").reshape(-1, 3), axis=0), [[50, 100, 20]]
    )


def test_blur_keeps_what_is_coarse_and_loses_what_is_fine():
    coarse, fine = baseline_image(RAMP, "blur"), baseline_image(CHECKS, "blur")
    assert np.corrcoef(coarse.ravel(), RAMP.ravel())[0, 1] > 0.98
    assert fine.std() < 5 and CHECKS.std() > 120


def test_noise_drowns_the_image_as_diffusion_does():
    """At step 500 of 1000 the image keeps sqrt of the product of 1 - beta; the rest is noise."""
    betas = [1 / (1 + np.exp(-x)) * (0.005 - 1e-5) + 1e-5 for x in np.linspace(-6, 6, 1000)]
    kept = np.prod([1 - beta for beta in betas[:501]])
    grey = np.full((200, 200, 3), 102, np.uint8)  # -0.2 of -1 to 1
    found = baseline_image(grey, "noise") / 127.5 - 1
    assert np.median(found) == pytest.approx(-0.2 * kept**0.5, abs=0.02)
    inside = np.mean(np.abs(found + 0.2 * kept**0.5) < (1 - kept) ** 0.5)
    assert inside == pytest.approx(0.683, abs=0.01)
    assert not np.array_equal(baseline_image(grey, "noise", seed=1), baseline_image(grey, "noise"))
