"""GAVIE with prompts of our own; the functions live in `scoring`, the offline judge in `rules`."""

from . import gqa, rules
from .scoring import (
    BBOX_FORMATS,
    PROMPT_HASH,
    SETTINGS,
    build_request,
    from_records,
    pair_ids,
    pairs,
    parse,
    rate,
    rate_jointly,
    score,
)

__all__ = [
    "BBOX_FORMATS",
    "PROMPT_HASH",
    "SETTINGS",
    "build_request",
    "from_records",
    "gqa",
    "pair_ids",
    "pairs",
    "parse",
    "rate",
    "rate_jointly",
    "rules",
    "score",
]
