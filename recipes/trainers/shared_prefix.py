"""Chosen and rejected answers of one prompt in one sequence: the prompt and its image run once.

What it is: TRL's preference batch ([2B, L]: chosen rows, then rejected ones) packed into [B, M]
rows of prompt, chosen answer, the prompt's last token again, rejected answer; a mask that hides
one answer from the other; positions that start again; and the way back. Exact: the second branch
reads the prompt's keys and values and nothing else, so every log-probability is that of a row of
its own. What it is not: a trainer (preference.py), or a way for models whose attention is no plain
mask.

    packed = pack(input_ids, attention_mask, labels, pad_id)
    unpack(per_token_values, packed, length)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """A packed batch of B pairs.

    Attributes:
        input_ids: [B, M].
        position_ids: [B, M], those that the rows of their own would have.
        shift_labels: [B, M], the token that each position must predict, -100 for none.
        mask: bool [B, 1, M, M], True where a position (row) sees another (column).
        lengths: for each pair the tokens of prompt, chosen and rejected answer.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    mask: Tensor
    lengths: list[tuple[int, int, int]]


def pack(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pad_id: int) -> Packed:
    """Rows of pairs, [2B, L], as [B, M].

    Args:
        input_ids, attention_mask: [2B, L], the chosen rows first; padding anywhere.
        labels: [2B, L], the answers' tokens, -100 elsewhere.
        pad_id: what fills the packed rows.

    Raises:
        ValueError: when the two rows of a pair do not start with the same prompt.
    """
    pairs = len(input_ids) // 2
    rows = [_pair(input_ids, attention_mask, labels, i, i + pairs) for i in range(pairs)]
    longest = max(len(prompt) + len(a) + 1 + len(b) for prompt, a, b in rows)
    device = input_ids.device
    ids = torch.full((pairs, longest), pad_id, device=device)
    positions = torch.zeros((pairs, longest), dtype=torch.long, device=device)
    shifted = torch.full((pairs, longest), IGNORE, device=device)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = causal.repeat(pairs, 1, 1)[:, None]
    for i, (prompt, chosen, rejected) in enumerate(rows):
        p, c, r = len(prompt), len(chosen), len(rejected)
        second, end = p + c, p + c + 1 + r  # where the rejected branch starts, and its end
        ids[i, :end] = torch.cat([prompt, chosen, prompt[-1:], rejected])
        positions[i, :second] = torch.arange(second, device=device)
        positions[i, second:end] = torch.arange(p - 1, p + r, device=device)
        shifted[i, p - 1 : second - 1] = chosen
        shifted[i, second : end - 1] = rejected
        mask[i, 0, second:, p - 1 : second] = False  # neither the chosen answer nor what starts it
        mask[i, 0, end:] = False
    mask |= torch.eye(longest, dtype=torch.bool, device=device)  # no row of padding is empty
    return Packed(ids, positions, shifted, mask, [(len(p), len(a), len(b)) for p, a, b in rows])


def _pair(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, one: int, other: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt, chosen and rejected answer of a pair, without padding."""
    first, second = (input_ids[row][attention_mask[row].bool()] for row in (one, other))
    answers = [
        (labels[row][attention_mask[row].bool()] != IGNORE).nonzero() for row in (one, other)
    ]
    starts = [int(found[0, 0]) for found in answers if len(found)]
    start = min(starts) if starts else min(len(first), len(second))
    if not start or not torch.equal(first[:start], second[:start]):
        raise ValueError(
            "the chosen and the rejected row of a pair do not start with the same prompt, so it "
            "cannot be shared; tokenize prompt and answers apart, as TRL's collator does"
        )
    return first[:start], first[start:], second[start:]


def unpack(values: Tensor, packed: Packed, length: int) -> Tensor:
    """Values of packed positions [B, M] back at the rows' own, [2B, length - 1], 0 elsewhere.

    `values[b, t]` belongs to what position t predicts, as TRL's fused head returns it.
    """
    pairs = len(packed.lengths)
    out = values.new_zeros((2 * pairs, length - 1))
    for i, (p, c, r) in enumerate(packed.lengths):
        out[i, p - 1 : p + c - 1] = values[i, p - 1 : p + c - 1]
        out[pairs + i, p - 1 : p + r - 1] = values[i, p + c : p + c + r]
    return out


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what eager attention adds to its scores: 0, or the lowest number."""
    lowest: Any = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
