"""MMHal with a prompt of our own; the functions live in `scoring`."""

from .scoring import (
    PROMPT_HASH,
    SETTINGS,
    build_requests,
    from_records,
    pair_ids,
    pairs,
    parse,
    rate,
    score,
)

__all__ = [
    "PROMPT_HASH",
    "SETTINGS",
    "build_requests",
    "from_records",
    "pair_ids",
    "pairs",
    "parse",
    "rate",
    "score",
]
