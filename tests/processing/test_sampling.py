"""Drawn tokens: transformers' own nucleus and frequencies, whatever else is in the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_image, tiny_internvl, tiny_processor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from firsthand.processing.generation import generate_answers
from firsthand.processing.sampling import RowDraws

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 1.9, -3.0]])


def warped(temperature: float, top_p: float) -> torch.Tensor:
    """The oracle: the distribution that transformers samples from, [V]."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, LOGITS)
    return TopPLogitsWarper(top_p)(ids, scores).softmax(-1)[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.8, 0.9), (1.0, 1.0), (0.5, 0.3), (2.0, 0.7)])
def test_frequencies_are_those_that_transformers_samples_with(temperature, top_p):
    n = 4000
    draws = RowDraws([f"row {i}" for i in range(n)], temperature, top_p)
    left = draws(torch.zeros(n, 1), LOGITS.repeat(n, 1))
    assert (left.isfinite().sum(-1) == 1).all()
    found = torch.bincount(left.argmax(-1), minlength=LOGITS.shape[1]) / n
    expected = warped(temperature, top_p)
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * (0.25 / n) ** 0.5


@given(
    seeds=st.lists(st.none() | st.text(max_size=3), min_size=1, max_size=6),
    position=st.integers(0, 5),
)
def test_a_row_draws_the_same_in_any_batch(seeds, position):
    seeds[position % len(seeds)] = "the row"
    scores = torch.randn(len(seeds), 50, generator=torch.Generator().manual_seed(1))
    scores[position % len(seeds)] = torch.arange(50) / 25
    draws = RowDraws(seeds, 1.0, 1.0)
    together = [draws(torch.zeros(1), scores)[position % len(seeds)].argmax() for _ in range(3)]
    alone = RowDraws(["the row"], 1.0, 1.0)
    row = torch.arange(50)[None] / 25
    assert together == [alone(torch.zeros(1), row)[0].argmax() for _ in range(3)]


def test_rows_without_a_seed_are_untouched():
    scores = torch.randn(3, 20)
    out = RowDraws([None, "a", None])(torch.zeros(3, 1), scores)
    assert torch.equal(out[[0, 2]], scores[[0, 2]]) and out[1].isfinite().sum() == 1
    assert RowDraws([None])(torch.zeros(1, 1), scores) is scores


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 0.9), (-1, 0.9), (0.8, 0), (0.8, 1.1)])
def test_what_cannot_be_drawn_with_is_refused(temperature, top_p):
    with pytest.raises(ValueError, match="temperature is|top_p is"):
        RowDraws(["a"], temperature, top_p)


def test_answers_drawn_in_batches_are_those_drawn_alone():
    pair = tiny_internvl(), tiny_processor("internvl")
    rows = [
        {"id": f"{i}/{seed}", "image_id": i, "image": tiny_image(i), "question": q, "seed": seed}
        for i, q in enumerate(["What is it?", "a"])
        for seed in (None, "one", "two")
    ]
    settings = {"max_new_tokens": 8, "progress": False, "temperature": 0.8, "top_p": 0.9}
    told = []
    together = list(
        generate_answers(*pair, rows, done=lambda row, text: told.append(row["id"]), **settings)
    )
    alone = [next(generate_answers(*pair, [row], **settings)) for row in rows]
    assert [a["prediction"] for a in together] == [a["prediction"] for a in alone]
    assert len({a["prediction"] for a in together[:3]}) == 3
    assert sorted(told) == sorted(row["id"] for row in rows)
