"""Mementos; the functions live in `scoring`."""

from .scoring import (
    FIGURES,
    PARTS,
    find_keywords,
    keywords_hash,
    pair_ids,
    pairs,
    score,
)

__all__ = [
    "FIGURES",
    "PARTS",
    "find_keywords",
    "keywords_hash",
    "pair_ids",
    "pairs",
    "score",
]
