"""POPE; the functions live in `scoring`."""

from .scoring import PARSERS, build_questions, existence_question, pairs, parse_strict, score

__all__ = ["PARSERS", "build_questions", "existence_question", "pairs", "parse_strict", "score"]
