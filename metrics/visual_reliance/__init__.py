"""Visual reliance; the functions live in `scoring`."""

from .scoring import CONDITIONS, answer_score, pairs, score

__all__ = ["CONDITIONS", "answer_score", "pairs", "score"]
