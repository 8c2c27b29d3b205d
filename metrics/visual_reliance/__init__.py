"""Visual reliance; the functions live in `scoring`."""

from .scoring import AREAS, CONDITIONS, answer_score, by_area, pair_ids, pairs, score, vqa_score

__all__ = [
    "AREAS",
    "CONDITIONS",
    "answer_score",
    "by_area",
    "pair_ids",
    "pairs",
    "score",
    "vqa_score",
]
