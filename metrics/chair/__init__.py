"""CHAIR, its variants, lexicons and ground truth; the functions live in `scoring`."""

from .scoring import (
    COCO,
    VARIANTS,
    Lexicon,
    at_length,
    at_recall,
    lexicon_for,
    lexicon_from_nouns,
    objects_from_coco,
    pairs,
    position_accuracy,
    position_pairs,
    read_objects,
    score,
)

__all__ = [
    "COCO",
    "VARIANTS",
    "Lexicon",
    "at_length",
    "at_recall",
    "lexicon_for",
    "lexicon_from_nouns",
    "objects_from_coco",
    "pairs",
    "position_accuracy",
    "position_pairs",
    "read_objects",
    "score",
]
