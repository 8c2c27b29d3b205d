"""Relevancy through a visual abstractor: from its queries, which the decoder reads, to patches.

Each of its layers has one softmax over the queries and, behind them, the vision encoder's tokens.
That is self-attention over both together, in which only the queries change, so rules 5 and 6 of
Chefer et al. (arXiv 2103.15679, section 3.1) hold for it: a row moves down, nothing is normalised.
Not for a Q-Former, whose cross-attention has rules of its own (relevancy_qformer.py).

    row = abstractor_relevancy(image, vision, layers)  # [Q] -> [n]
"""

from collections.abc import Sequence

import torch


def abstractor_relevancy(
    image: torch.Tensor, vision: Sequence[torch.Tensor], layers: Sequence[torch.Tensor]
) -> torch.Tensor:
    """How a row of the decoder leans on each token of the vision encoder, through an abstractor.

    Args:
        image: its relevancy to the queries, [Q].
        vision: A_bar [n, n] of each layer of the vision encoder, first to last.
        layers: A_bar [Q, Q + n] of each layer of the abstractor, first to last.

    Returns:
        float32 [n], >= 0.
    """
    row, seen = image, torch.zeros(len(vision[0]))
    for bar in reversed(layers):
        moved = row @ bar
        row, seen = row + moved[: len(row)], seen + moved[len(row) :]
    for bar in reversed(vision):
        seen = seen + seen @ bar
    return seen
