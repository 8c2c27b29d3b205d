"""CHAIR and its lexicons; the functions live in `scoring`."""

from .scoring import (
    COCO,
    Lexicon,
    lexicon_from_nouns,
    pairs,
    position_accuracy,
    position_pairs,
    score,
)

__all__ = [
    "COCO",
    "Lexicon",
    "lexicon_from_nouns",
    "pairs",
    "position_accuracy",
    "position_pairs",
    "score",
]
