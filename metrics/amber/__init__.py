"""AMBER by exact words; the functions live in `scoring` and `truth`."""

from .scoring import (
    KINDS,
    Truth,
    make_truth,
    pair_ids,
    pairs,
    read_queries,
    read_responses,
    read_truth,
    score,
)

__all__ = [
    "KINDS",
    "Truth",
    "make_truth",
    "pair_ids",
    "pairs",
    "read_queries",
    "read_responses",
    "read_truth",
    "score",
]
