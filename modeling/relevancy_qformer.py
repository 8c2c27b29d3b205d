"""Relevancy through a Q-Former: from its queries, which the decoder reads, to the image's patches.

It is the bi-modal rule of Chefer et al. (arXiv 2103.15679, section 3.2, rules 6 to 10) on averaged
maps A_bar that the recorder kept; it is no part of models whose image tokens are patches. The rule
normalises rows, so it is not linear: matrices go from the bottom up, not one row from the top down.

    rows = query_relevancy(vision, layers)  # [Q, n]: image row of the decoder @ rows
"""

from collections.abc import Sequence

import torch


def query_relevancy(
    vision: Sequence[torch.Tensor], layers: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    """How each query of the Q-Former leans on each token of the vision encoder.

    Args:
        vision: A_bar [n, n] of each layer of the vision encoder, first to last.
        layers: of each layer of the Q-Former, first to last, A_bar of its self-attention [m, m] and
            of its cross-attention [Q, n], if it has one. The m tokens are the Q queries and, in
            InstructBLIP, the instruction's behind them.

    Returns:
        float32 [Q, n], >= 0, finite: a query without relevancy of its own counts as itself.
    """
    image = torch.zeros(len(vision[0]), len(vision[0]))
    for bar in vision:
        image = image + bar + bar @ image
    tokens = len(layers[0][0])
    own, seen, queries = torch.zeros(tokens, tokens), torch.zeros(tokens, len(image)), tokens
    for own_bar, *cross in layers:
        own, seen = own + own_bar + own_bar @ own, seen + own_bar @ seen
        for bar in cross:
            queries = len(bar)
            new = _normalised(own)[:queries].T @ (bar @ _normalised(image))
            seen = seen + new
    return seen[:queries]


def _normalised(added: torch.Tensor) -> torch.Tensor:
    """Rows of what was added to the identity scaled to sum to 1 (zero rows stay zero), plus it.

    The identity is left out until here: of 1 + 1e-7, float32 would keep a digit of what was added.
    """
    total = added.sum(1, keepdim=True)
    return added / torch.where(total > 0, total, 1) + torch.eye(len(added))
