"""Drawing tokens row by row: what a row draws depends on its own seed, not on its batch.

What it is: temperature and nucleus sampling as a logits processor for greedy `generate`. A row
consumes one random number a token from a generator of its own, so batches, shards and reruns give
the same text (up to what batching does to the logits), and greedy rows may stand beside drawn ones.
What it is not: a search.

    draws = RowDraws(["seed 0, prompt a, candidate 1", None], temperature=0.8, top_p=0.9)
    model.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([draws]))
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class RowDraws(LogitsProcessor):
    """Leaves each drawn row one token, taken from its nucleus at random; other rows are untouched.

    Args:
        seeds: a text for each row of the batch, whose hash seeds it; None for greedy rows.
        temperature: above 0; logits are divided by it.
        top_p: in (0, 1]: the fewest tokens whose probability reaches it are drawn from.

    Raises:
        ValueError: for a temperature or top_p outside of these.
    """

    def __init__(
        self, seeds: Sequence[str | None], temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        check_sampling(temperature, top_p)
        self.temperature, self.top_p = temperature, top_p
        self.rows = [row for row, seed in enumerate(seeds) if seed is not None]
        self.generators = [_generator(seed) for seed in seeds if seed is not None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] -> the same, with -inf beside the drawn token of drawn rows."""
        if not self.rows:
            return scores
        chances = (scores[self.rows].float() / self.temperature).softmax(-1)
        chances, order = chances.sort(dim=-1, descending=True, stable=True)
        reached = chances.cumsum(-1)
        nucleus = reached - chances < self.top_p
        inside = (chances * nucleus).sum(-1, keepdim=True)
        drawn = torch.cat([torch.rand(1, 1, generator=g) for g in self.generators])
        place = (reached < drawn.to(inside) * inside).sum(-1, keepdim=True)
        place = place.minimum(nucleus.sum(-1, keepdim=True) - 1)
        out = scores.clone()
        nothing = torch.full_like(scores[self.rows], -torch.inf)
        out[self.rows] = nothing.scatter(-1, order.gather(-1, place), 0.0)
        return out


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ValueError for a temperature or a nucleus that nothing can be drawn with."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")


def _generator(seed: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)
