"""The abstractor's rule on maps to follow by hand (whole models: test_relevancy_families.py)."""

import torch

from firsthand.modeling.relevancy_abstractor import abstractor_relevancy

NOTHING = torch.zeros(2, 2)


def test_two_layers_by_hand():
    """Query 0 leans on query 1 in the upper layer, which has seen token 1 in the lower one."""
    image = torch.tensor([3.0, 0.0])
    lower = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    upper = torch.tensor([[0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 7.0]])
    found = abstractor_relevancy(image, [NOTHING], [lower, upper])
    assert found.tolist() == [3.0 * 1.0, 3.0 * 2.0 * 5.0]


def test_the_encoders_layers_move_what_queries_saw():
    image, layer = torch.tensor([1.0, 1.0]), torch.tensor([[0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    vision = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert abstractor_relevancy(image, [vision], [layer]).tolist() == [1.0, 1.5]
    assert abstractor_relevancy(image, [vision, vision], [layer]).tolist() == [1.0, 2.0]


def test_it_is_the_product_of_full_matrices():
    torch.manual_seed(0)
    queries, tokens = 3, 5
    image, vision = torch.rand(queries), [torch.rand(tokens, tokens) for _ in range(2)]
    layers = [torch.rand(queries, queries + tokens) for _ in range(3)]
    total = torch.eye(queries + tokens)
    for bar in vision:
        total = total + torch.block_diag(torch.zeros(queries, queries), bar) @ total
    for bar in layers:
        total = total + torch.cat([bar, torch.zeros(tokens, queries + tokens)]) @ total
    expected = image @ total[:queries, queries:]
    torch.testing.assert_close(abstractor_relevancy(image, vision, layers), expected)
