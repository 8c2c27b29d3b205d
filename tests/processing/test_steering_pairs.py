"""VaLSe-style pairs: each step against what it says, and a vector from the front door."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_image, tiny_internvl, tiny_llava, tiny_processor

from firsthand.modeling.steering_fit import fit_steering
from firsthand.processing.perturb import mean_colour
from firsthand.processing.steering_pairs import ValsePairs, relevant_cells

ROWS = [{"image": tiny_image(i), "question": "What?", "answer": "a dog, a cup."} for i in range(2)]


@pytest.fixture(params=["llava", "internvl"])
def setup(request):
    build = {"llava": tiny_llava, "internvl": tiny_internvl}[request.param]
    return build(), tiny_processor(request.param)


def test_the_positive_image_keeps_what_the_answer_looks_at(setup):
    model, processor = setup
    pairs = ValsePairs(model, processor, ROWS, keep=0.25)
    pair = pairs[1]
    whole, kept = (np.array(pair[side]["image"]) for side in ("negative", "positive"))
    relevant = pairs.relevant(ROWS[1]["image"], "What?", "a dog, a cup.")
    assert relevant.mean() == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(kept[relevant], whole[relevant])
    assert (kept[~relevant] == mean_colour(processor)).all()
    assert pair["positive"]["answer"] == pair["negative"]["answer"] == "a dog, a cup."


def test_visual_tokens_are_those_above_the_threshold(setup):
    model, processor = setup
    answer, image = "a dog, a cup.", ROWS[0]["image"]
    every = ValsePairs(model, processor, ROWS, threshold=-1e9).visual_spans(image, "What?", answer)
    assert all(any(c.isalnum() for c in answer[a:b]) for a, b in every) and len(every) >= 4
    none = ValsePairs(model, processor, ROWS, threshold=1e9).visual_spans(image, "What?", answer)
    assert len(none) == 1 and none[0] in every
    again = ValsePairs(model, processor, ROWS, threshold=1e9).visual_spans(image, "What?", answer)
    assert again == none


def test_the_artefact_of_other_tokens_is_taken_off():
    maps = torch.zeros(3, 2, 2)
    maps[:, 0, 0] = 5.0  # a sink that every token looks at
    maps[1, 1, 1] = 2.0
    assert relevant_cells(maps, [1], "none", "max", 0.25)[0, 0]
    cells = relevant_cells(maps, [1], "median", "max", 0.25)
    assert cells[1, 1] and cells.sum() == 1
    assert relevant_cells(maps, [0, 1, 2], "median", "mean", 0.5).sum() == 2


def test_a_valse_vector_is_fitted_and_rows_that_cannot_be_are_counted(setup):
    model, processor = setup
    pairs = ValsePairs(model, processor, [*ROWS, {**ROWS[0], "answer": "   "}])
    vector = fit_steering(model, processor, pairs, "valse", batch_size=1, progress=False)
    assert vector.method == "valse" and vector.pairs == 2 and vector.mode == "add"
    assert pairs.left_out == {2: "the answer is empty"}


@pytest.mark.parametrize(
    "wrong", [{"keep": 1.0}, {"noise_step": 0}, {"artefact": "mean"}, {"together": "sum"}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        ValsePairs(tiny_llava(), tiny_processor(), ROWS, **wrong)
