"""A judge out of an endpoint, or of a model of this process: chat messages in, a reply each out.

What it is: what metrics take as `judge`, since they know no server (`mmhal.rate(rows, judge)`).
What it is not: a client; `processing/endpoint.py` retries, caches and counts.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", model="org/model", cache_dir="cache")
    judge = judge_of(endpoint, mmhal.parse, **mmhal.SETTINGS)
    mmhal.score(mmhal.rate(rows, judge))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firsthand.processing.endpoint import Endpoint, Message
from firsthand.processing.local_model import LocalModel


def judge_of(
    endpoint: Endpoint | LocalModel,
    parse: Callable[[str], Any] | None = None,
    failures: list[str] | None = None,
    **settings: Any,
) -> Callable[[list[list[Message]]], list[str | None]]:
    """A function that asks all requests at once and returns the replies, in order.

    A request that fails for good is None; so is a reply that `parse` refused at every try.

    Args:
        endpoint: asked; its `report()` tells what that took.
        parse: raises ValueError on a reply that is not as asked for, which is then asked again.
        failures: the reason of each request that fails is appended.
        settings: temperature, max_tokens, response_format, ... of every request.
    """

    def judge(requests: list[list[Message]]) -> list[str | None]:
        replies = endpoint.ask_many(requests, parse, **settings)
        if failures is not None:
            failures.extend(reply.error for reply in replies if reply.error)
        return [None if reply.error else reply.text for reply in replies]

    return judge
