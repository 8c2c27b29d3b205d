"""A model that stages ask, in this process or behind an endpoint, and its memory of what it said.

What it is: questions about one image each in, a reply each out, greedy or drawn; every answer is on
disk as soon as it is given, so nothing is generated twice, also after kill -9. What it is not: a
client (`processing/endpoint.py`) or a loop over tokens (`processing/generation.py`); it chooses
between them.

    answerer = Answerer("out/state/answers", model="org/model", max_new_tokens=256)
    answerer.ask([Request(row["images"][0], row["prompt_key"], "Describe the image."), ...])
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from firsthand.processing.answer_cache import AnswerCache
from firsthand.processing.endpoint import Endpoint, Reply
from firsthand.processing.messages import message
from firsthand.processing.sampling import check_sampling
from firsthand.recipes.inputs import load_model, stored_image


@dataclass(frozen=True)
class Request:
    """A question about an image as it is stored; equal `image_key`s name equal images.

    `draw` 0 is the greedy answer, 1 and above are drawn ones.
    """

    stored: Mapping[str, Any]
    image_key: str
    text: str
    draw: int = 0


@dataclass(frozen=True)
class Answerer:
    """Whom to ask, and how.

    Attributes:
        cache: folder of the answers given.
        model: Hub id or path of a model for this process; None is the demo model.
        endpoint: base URL and the model's name there, instead; the key is read from OPENAI_API_KEY.
        max_new_tokens: bound on an answer.
        temperature, top_p: of drawn answers.
        seed: of drawn answers. An endpoint gets seed + draw, and keeps to it or not.
        batch_size: rows in one call of `generate` (`draw`s of one question share its image).

    Raises:
        ValueError: for a temperature or top_p that nothing can be drawn with, or both a model and
            an endpoint.
    """

    cache: str
    model: str | None = None
    endpoint: tuple[str, str] | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_p: float = 0.9
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens and batch_size must be at least 1")
        if self.model is not None and self.endpoint is not None:
            raise ValueError("give a model of this process or an endpoint, not both")

    @property
    def name(self) -> str:
        """Who answers, for tables."""
        return self.endpoint[1] if self.endpoint else self.model or "demo model"

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """A reply each, in order; one that could not be had carries its `error`.

        Raises:
            ValueError: where an endpoint answers nothing at all; the same call goes on later.
        """
        if self.endpoint is None:
            return self._here(requests)
        replies = self._there(requests)
        if replies and all(reply.error and not reply.text for reply in replies):
            raise ValueError(
                f"{self.endpoint[0]} answered none of {len(replies)} requests: {replies[0].error}"
            )
        return replies

    def choose(
        self, requests: Sequence[Request], start: str, options: Sequence[str]
    ) -> list[Reply]:
        """How probable each option is after `start`: replies whose `value` is their logarithms.

        Each option is a token of its own. Only for a model of this process.
        """
        from firsthand.processing.generation import next_token_log_probabilities

        cache = AnswerCache(self.cache)
        keys = [cache.key([self._identity(r), start, list(options)]) for r in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if cache.get(k) is None}
        if missing:
            found = next_token_log_probabilities(
                *opened_model(self.model),
                (self._row(key, request) | {"start": start} for key, request in missing.items()),
                options,
                self.batch_size,
                len(missing),
            )
            for (key, request), values in zip(missing.items(), found, strict=True):
                cache.put(key, json.dumps(values), question=request.text)
        texts = [cache.get(key) or "" for key in keys]
        return [Reply(text, json.loads(text)) for text in texts]

    def too_long(self, request: Request) -> str | None:
        """Why a prompt and its answer do not fit the model's context; None where they do.

        An endpoint is not asked beforehand: it refuses what is too long for it.
        """
        if self.endpoint is not None:
            return None
        model, processor = opened_model(self.model)
        from firsthand.processing.generation import build_prompt

        context = model.config.get_text_config().max_position_embeddings
        text = len(processor.tokenizer(build_prompt(processor, request.text)).input_ids)
        prompt = text + _image_tokens(self.model, stored_image(request.stored).size)
        if prompt + self.max_new_tokens <= context:
            return None
        return (
            f"{prompt} tokens of prompt and image, and {self.max_new_tokens} to write, are more "
            f"than the {context} that the model reads"
        )

    def control_token(self, text: str) -> str | None:
        """A special token of the model's that a text spells out; None where there is none."""
        if self.endpoint is not None:
            return None
        return next((token for token in _special_tokens(self.model) if token in text), None)

    def _there(self, requests: Sequence[Request]) -> list[Reply]:
        assert self.endpoint is not None
        url, name = self.endpoint
        key = os.environ.get("OPENAI_API_KEY")
        endpoint = Endpoint(url, name, api_key=key, cache_dir=self.cache)
        replies: dict[int, Reply] = {}
        for draw in sorted({request.draw for request in requests}):
            numbers = [i for i, request in enumerate(requests) if request.draw == draw]
            said = endpoint.ask_many(
                [_message(requests[i]) for i in numbers],
                max_tokens=self.max_new_tokens,
                **self._decoding(draw),
            )
            replies |= dict(zip(numbers, said, strict=True))
        return [replies[i] for i in range(len(requests))]

    def _decoding(self, draw: int) -> dict[str, Any]:
        if not draw:
            return {"temperature": 0.0}
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed + draw}

    def _here(self, requests: Sequence[Request]) -> list[Reply]:
        from firsthand.processing.generation import generate_answers

        cache = AnswerCache(self.cache)
        keys = [cache.key(self._identity(request)) for request in requests]
        replies = {key: Reply(text, text, cached=True) for key in keys if (text := cache.get(key))}
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in replies}
        if missing:
            model, processor = opened_model(self.model)
            for said in generate_answers(
                model,
                processor,
                (self._row(key, request) for key, request in missing.items()),
                total=len(missing),
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                done=lambda row, text: cache.put(row["id"], text, question=row["question"]),
                temperature=self.temperature,
                top_p=self.top_p,
            ):
                text, error = said.get("prediction", ""), said.get("error")
                replies[said["id"]] = Reply(text, text, error)
        return [replies[key] for key in keys]

    def _identity(self, request: Request) -> list[Any]:
        decoding = self._decoding(request.draw) | {"max_new_tokens": self.max_new_tokens}
        return [self.name, request.image_key, request.text, decoding]

    def _row(self, key: str, request: Request) -> dict[str, Any]:
        row: dict[str, Any] = {"id": key, "image_id": request.image_key, "question": request.text}
        row["image"] = stored_image(request.stored)
        if request.draw:
            row["seed"] = f"{self.seed}/{request.draw}/{request.image_key}/{request.text}"
        return row


def _message(request: Request) -> list[dict[str, Any]]:
    return message(request.text, stored_image(request.stored))


@lru_cache(maxsize=1)
def opened_model(name: str | None) -> tuple[Any, Any]:
    """Model and processor, loaded once a process, on its accelerator where there is one."""
    import torch

    from firsthand.processing.generation import one_view

    model, processor = load_model(name, place=False)
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        model = model.to(f"{device}:{os.environ.get('LOCAL_RANK', 0)}")
    return model, one_view(processor)


@lru_cache(maxsize=1024)
def _image_tokens(model: str | None, size: tuple[int, int]) -> int:
    from firsthand.processing.generation import image_tokens

    return image_tokens(opened_model(model)[1], size)


@lru_cache(maxsize=1)
def _special_tokens(model: str | None) -> list[str]:
    from firsthand.processing.generation import special_tokens

    return special_tokens(opened_model(model)[1])
