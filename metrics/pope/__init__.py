"""POPE; the functions live in `scoring` and `questions`."""

from .scoring import (
    PARSER_NAMES,
    PARSERS,
    build_questions,
    existence_question,
    join,
    pair_ids,
    pairs,
    parse_strict,
    read_answer,
    read_questions,
    sample_images,
    score,
)

__all__ = [
    "PARSERS",
    "PARSER_NAMES",
    "build_questions",
    "existence_question",
    "join",
    "pair_ids",
    "pairs",
    "parse_strict",
    "read_answer",
    "read_questions",
    "sample_images",
    "score",
]
