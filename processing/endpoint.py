"""The only client of OpenAI-compatible servers: concurrent, patient, and never paying twice.

What it is: requests with retries and a disk cache keyed by the whole payload, for judges, critics
and annotators (vLLM, SGLang, `transformers serve`, a hosted API). What it is not: a parser of
answers; pass one as `parse`, and an answer that it refuses is asked for again, then kept as a
failure with its reason.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", model="org/model", cache_dir="cache")
    replies = endpoint.ask_many([[{"role": "user", "content": "Hello"}]])
    print(replies[0].text, endpoint.report())

Needs the extra `scale` (openai).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from firsthand.processing.answer_cache import AnswerCache

Message = dict[str, Any]
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_WAIT = 60.0  # seconds


@dataclass(frozen=True)
class Reply:
    """One request's outcome; `error` is None where it succeeded.

    `text` is the server's answer, `value` what `parse` made of it (the text without one), `cached`
    whether it was answered from disk.
    """

    text: str = ""
    value: Any = None
    error: str | None = None
    cached: bool = False


class Endpoint:
    """A model behind an OpenAI-compatible server.

    Args:
        base_url: with its version, as in `http://127.0.0.1:8000/v1`.
        model: the name that the server knows it by.
        api_key: sent and never kept: not in the cache, a log, an error or `repr`.
        cache_dir: answered requests, one JSON file each; None keeps nothing. A rerun asks only what
            was not answered, also after kill -9.
        concurrency: requests under way at once.
        max_retries: tries after the first, on busy, broken or silent servers and on answers that
            `parse` refuses.
        timeout: seconds for one try.
        backoff: seconds before the first retry, doubled each time; a Retry-After header wins.
        price: US dollars per million (prompt, completion) tokens.

    Raises ImportError, naming the extra, where openai is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        cache_dir: str | Path | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
        timeout: float = 60.0,
        backoff: float = 0.5,
        price: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ImportError("Endpoint needs openai: pip install 'firsthand[scale]'") from None
        self.base_url, self.model = base_url.rstrip("/"), model
        self.cache = AnswerCache(cache_dir)
        self.concurrency, self.max_retries = concurrency, max_retries
        self.timeout, self.backoff, self.price = timeout, backoff, price
        self.counts: Counter[str] = Counter()
        self._openai, self._key = openai, api_key or "none"

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, model={self.model!r})"

    def ask(
        self, messages: list[Message], parse: Callable[[str], Any] | None = None, **settings: Any
    ) -> Reply:
        """One request; see `ask_many`."""
        return self.ask_many([messages], parse, progress=False, **settings)[0]

    def ask_many(
        self,
        requests: Iterable[list[Message]],
        parse: Callable[[str], Any] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Reply]:
        """A reply for each request, in order; failures are replies with `error`, never exceptions.

        Args:
            requests: lists of chat messages. Equal ones are asked once. For n samples of the same
                request give each another `seed` in its own call.
            parse: text -> value; raises ValueError on an answer that is not as asked for.
            progress: show a progress bar.
            settings: temperature, max_tokens, seed, response_format, ...; part of the cache's key.
        """
        payloads = [{"model": self.model, "messages": m, **settings} for m in requests]
        return asyncio.run(self._all(payloads, parse, progress))

    def report(self) -> dict[str, Any]:
        """Counts of outcomes and tokens since the endpoint was made, and their price in dollars."""
        tokens = self.counts["prompt_tokens"], self.counts["completion_tokens"]
        dollars = sum(n * p / 1e6 for n, p in zip(tokens, self.price, strict=True))
        return {**dict(self.counts), "dollars": round(dollars, 6)}

    async def _all(
        self, payloads: list[dict], parse: Callable[[str], Any] | None, progress: bool
    ) -> list[Reply]:
        gate = asyncio.Semaphore(self.concurrency)
        keys = [self._key_of(p) for p in payloads]
        distinct = dict(zip(keys, payloads, strict=True))
        bar = tqdm(total=len(distinct), desc="asking", unit="request", disable=not progress)
        client = self._openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key, max_retries=0, timeout=self.timeout
        )

        async def one(key: str, payload: dict) -> tuple[str, Reply]:
            async with gate:
                reply = self._cached(key, parse) or await self._try(client, key, payload, parse)
            self.counts["failed" if reply.error else "cached" if reply.cached else "answered"] += 1
            bar.update()
            return key, reply

        async with client:
            done = dict(await asyncio.gather(*(one(k, p) for k, p in distinct.items())))
        bar.close()
        return [done[key] for key in keys]

    async def _try(
        self, client: Any, key: str, payload: dict, parse: Callable[[str], Any] | None
    ) -> Reply:
        """Ask until answered, refused for good, or out of tries."""
        wait, reason = self.backoff, ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                self.counts["retried"] += 1
                await asyncio.sleep(wait * random.uniform(0.8, 1.2))
                wait = min(2 * wait, LONGEST_WAIT)
            try:
                answer = await client.chat.completions.create(**payload)
                self._count(answer.usage)
                text = answer.choices[0].message.content or ""
                value = parse(text) if parse else text
            except self._openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}"
                if error.status_code not in RETRIED:
                    self.counts[f"fault: {reason}"] += 1
                    return Reply(error=self._clean(f"{reason}: {error.message}"))
                wait = _retry_after(error.response.headers, wait)
            except (self._openai.APIConnectionError, OSError) as error:
                reason = type(error).__name__
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                reason = f"not as asked for: {error}"
            else:
                self.cache.put(key, text, payload=payload)
                return Reply(text=text, value=value)
            self.counts[f"fault: {reason.split(':')[0]}"] += 1
        return Reply(error=self._clean(f"gave up after {self.max_retries + 1} tries: {reason}"))

    def _count(self, usage: Any) -> None:
        """Tokens of any answer that came, also of one that `parse` refuses: both are paid for."""
        try:
            tokens = int(usage.prompt_tokens), int(usage.completion_tokens)
        except (AttributeError, TypeError, ValueError):
            return  # the server does not say
        self.counts["prompt_tokens"] += tokens[0]
        self.counts["completion_tokens"] += tokens[1]

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***")[:500] if len(self._key) > 4 else text[:500]

    def _key_of(self, payload: dict) -> str:
        return self.cache.key([self.base_url, payload])

    def _cached(self, key: str, parse: Callable[[str], Any] | None) -> Reply | None:
        text = self.cache.get(key)
        if text is None:
            return None
        try:
            return Reply(text=text, value=parse(text) if parse else text, cached=True)
        except ValueError:
            return None  # parsed otherwise when it was kept: ask again


def _retry_after(headers: Any, otherwise: float) -> float:
    """Seconds that the server asks to wait; `otherwise` where it says nothing readable."""
    try:
        return min(float(headers.get("retry-after", "")), LONGEST_WAIT)
    except ValueError:
        return otherwise
