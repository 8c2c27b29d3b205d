"""The Q-Former's rule on maps small enough to follow by hand (whole models: the families' test)."""

import pytest
import torch

from firsthand.modeling.relevancy_qformer import query_relevancy

VISION = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
OWN = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
CROSS = torch.tensor([[0.0, 1.0, 0.0], [5.0, 0.0, 0.0]])


def test_one_layer_by_hand():
    """Query 0 leans on query 1; token 1 of the encoder is a quarter itself, the rest token 2."""
    found = query_relevancy([VISION], [[OWN, CROSS]])
    own = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.25, 0.75], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(found, own.T @ CROSS @ image)


def test_relevancies_count_by_their_shares_however_small_they_are():
    """Real gradients are far below what float32 can add to 1."""
    small = query_relevancy([VISION * 1e-10, VISION / 4e10], [[OWN * 1e-10, CROSS]])
    torch.testing.assert_close(small, query_relevancy([VISION * 1.25], [[OWN, CROSS]]))


def test_rows_without_relevancy_stay_finite():
    zeros = query_relevancy([torch.zeros(3, 3)], [[torch.zeros(2, 2), CROSS]])
    torch.testing.assert_close(zeros, CROSS)
    nothing = query_relevancy([VISION], [[OWN, torch.zeros(2, 3)], [OWN]])
    assert torch.equal(nothing, torch.zeros(2, 3))


def test_a_later_layer_moves_what_queries_have_seen():
    found = query_relevancy([torch.zeros(3, 3)], [[torch.zeros(2, 2), CROSS], [OWN]])
    torch.testing.assert_close(found, CROSS + OWN @ CROSS)


@pytest.mark.parametrize("text", [0, 3])
def test_an_instruction_passes_on_but_does_not_look(text):
    """Tokens behind the queries have no row in the cross-attention, and none in the result."""
    torch.manual_seed(0)
    own, cross = torch.rand(2 + text, 2 + text), torch.rand(2, 3)
    found = query_relevancy([VISION], [[own, cross], [own, cross]])
    assert found.shape == (2, 3) and bool(torch.isfinite(found).all())
    apart = torch.block_diag(own[:2, :2], torch.zeros(text, text))
    assert text == 0 or not torch.allclose(found, query_relevancy([VISION], [[apart, cross]] * 2))
