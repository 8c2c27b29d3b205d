"""A language model of this process in the place of an endpoint: asked, cached and counted alike.

What it is: what judges take where no server runs: chat messages in, a `Reply` each out, every reply
on disk as soon as it is given. What it is not: fast (one request after the other), patient (a reply
that `parse` refuses is kept as a failure: the model would say it again), or able to see images.

    judge = LocalModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", cache_dir="cache")
    replies = judge.ask_many([[{"role": "user", "content": "Hello"}]], max_tokens=20)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from firsthand.processing.answer_cache import AnswerCache
from firsthand.processing.endpoint import Message, Reply


class LocalModel:
    """A causal language model with a chat template, loaded when a request is not in the cache.

    Args:
        model: Hub id or path.
        cache_dir: replies given, one JSON file each; None keeps nothing.
    """

    def __init__(self, model: str, cache_dir: str | Path | None = None) -> None:
        self.model = self.base_url = model
        self.cache = AnswerCache(cache_dir)
        self.counts: Counter[str] = Counter()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer. Raises ValueError for what is neither, or has no chat template."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
            model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto").eval()
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[:1]
            raise ValueError(f"cannot load the language model {self.model!r}: {first}") from None
        if not tokenizer.chat_template:
            raise ValueError(f"{self.model!r} has no chat template: choose a model that chats")
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        return model, tokenizer

    def ask_many(
        self,
        requests: Iterable[list[Message]],
        parse: Callable[[str], Any] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Reply]:
        """A reply for each request, in order; one that `parse` refuses carries its `error`.

        Args:
            requests: lists of chat messages. Equal ones are asked once.
            parse: text -> value; raises ValueError on an answer that is not as asked for.
            progress: show a progress bar.
            settings: as an endpoint takes them: temperature (0 is greedy), max_tokens and seed are
                heeded, all are part of the cache's key.

        Raises:
            ValueError: where the model cannot be loaded.
        """
        payloads = [{"model": self.model, "messages": m, **settings} for m in requests]
        keys = [self.cache.key(payload) for payload in payloads]
        done: dict[str, Reply] = {}
        distinct = dict(zip(keys, payloads, strict=True))
        for key, payload in tqdm(
            distinct.items(), desc="asking", unit="request", disable=not progress
        ):
            done[key] = self._reply(key, payload, parse)
        return [done[key] for key in keys]

    def report(self) -> dict[str, Any]:
        """Counts of outcomes and tokens so far; nothing is paid for."""
        return {**dict(self.counts), "dollars": 0.0}

    def _reply(
        self, key: str, payload: dict[str, Any], parse: Callable[[str], Any] | None
    ) -> Reply:
        text = self.cache.get(key)
        cached = text is not None
        if text is None:
            text = self._say(payload)
            self.cache.put(key, text, payload=payload)
        try:
            value = parse(text) if parse else text
        except ValueError as error:
            self.counts["failed"] += 1
            return Reply(error=f"not as asked for: {error}"[:500])
        self.counts["cached" if cached else "answered"] += 1
        return Reply(text=text, value=value, cached=cached)

    def _say(self, payload: dict[str, Any]) -> str:
        import torch

        model, tokenizer = self._loaded
        inputs = tokenizer.apply_chat_template(
            payload["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        heat = payload.get("temperature", 1.0)
        drawn = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
        with torch.random.fork_rng():
            torch.manual_seed(payload.get("seed", 0))
            found = model.generate(
                **inputs, max_new_tokens=payload.get("max_tokens", 512), **drawn,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )  # fmt: skip
        said = found[0, inputs["input_ids"].shape[1] :]
        self.counts["prompt_tokens"] += inputs["input_ids"].shape[1]
        self.counts["completion_tokens"] += len(said)
        return str(tokenizer.decode(said, skip_special_tokens=True)).strip()
