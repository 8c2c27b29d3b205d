"""lmms-eval asks, our models answer: a model class of lmms-eval over `generate_answers`.

What it is: any supported model, native or grounded, steered or not, greedy, one image a question.
What it is not: a benchmark; questions, prompts and scores are lmms-eval's. It needs lmms-eval
(docs/lmms_eval.md says how to install it) and is imported only where that is.

    from lmms_eval.evaluator import simple_evaluate
    simple_evaluate(model=FirsthandModel(model, processor), tasks=["gqa"], log_samples=True)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import nn

from firsthand.modeling.families import image_token_id, unwrap
from firsthand.processing.generation import generate_answers

MAX_NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's own models
PASSED_ON = {
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "repetition_penalty",
}
# without effect on greedy answers about one image, or read here
READ = {"do_sample", "image_aspect_ratio", "seed", "temperature", "top_k", "top_p", "until"}

Row = dict[str, Any]
Key = tuple[str, Any]


def generate_settings(wanted: Mapping[str, Any]) -> Row:
    """Arguments of `generate` for a task's generation_kwargs.

    Raises ValueError where the task wants sampling, or something that is not known here.
    """
    if unknown := sorted(set(wanted) - PASSED_ON - READ):
        raise ValueError(f"the task sets {', '.join(unknown)}, which firsthand does not know")
    if wanted.get("do_sample", True) and (wanted.get("temperature") or 0) > 0:
        raise ValueError(
            f"the task samples (temperature {wanted['temperature']}), firsthand answers greedily: "
            "add --gen-kwargs do_sample=False,temperature=0"
        )
    settings = {k: v for k, v in wanted.items() if k in PASSED_ON and v is not None}
    return {"max_new_tokens": MAX_NEW_TOKENS} | settings


def cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop, 1)[0] if stop else text
    return text.strip()


def image_key(image: Image.Image) -> str:
    """A name for the pixels of an image: equal images are encoded, and resampled, as one."""
    head = f"{image.mode} {image.size}".encode()
    return hashlib.blake2b(head + image.tobytes(), digest_size=12).hexdigest()


class FirsthandModel(lmms):
    """A model for `simple_evaluate`, which takes `model` away again when it has answered.

    Args:
        model: a supported model; attach steering to it before.
        processor: its processor, with a chat template.
        batch_size: questions in one call of `generate`.

    Attributes:
        images: (task, document) -> `image_key` of its image.
        errors: (task, document) -> why it was not asked. lmms-eval gets an empty answer for it.
    """

    is_simple = True

    def __init__(self, model: nn.Module, processor: Any, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.processor, self.batch_size = model, processor, batch_size
        token = image_token_id(unwrap(model).config)
        self.image_token: str = processor.tokenizer.convert_ids_to_tokens(token)
        self.images: dict[Key, str] = {}
        self.errors: dict[Key, str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer a request, in their order.

        Raises ValueError, before anything is asked, for settings that `generate_settings` refuses.
        """
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = generate_settings(request.args[1])
            alike.setdefault(json.dumps(settings, sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        for text, indices in alike.items():
            rows = self._rows((i, requests[i]) for i in indices)
            settings = {"batch_size": self.batch_size, **json.loads(text)}
            for row in generate_answers(self.model, self.processor, rows, **settings):
                if "error" in row:
                    self._refuse(row["key"], row["error"])
                else:
                    answers[row["id"]] = cut(row["prediction"], row["until"])
        return answers

    def _rows(self, requests: Iterable[tuple[int, Instance]]) -> Iterator[Row]:
        """The rows that can be asked; `errors` gets the others. Images are decoded one by one."""
        for index, request in requests:
            question, wanted, doc_to_visual, doc_id, task, split = request.args
            key = (task, doc_id)
            try:
                visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
                image = self._only_image(visuals, question)
                self.images[key] = image_key(image)
            except Exception as error:  # tasks and decoders raise nearly anything
                self._refuse(key, f"{type(error).__name__}: {error}")
                continue
            asked = {"id": index, "key": key, "until": wanted.get("until")}
            yield asked | {"image_id": self.images[key], "image": image, "question": question}

    def _only_image(self, visuals: list[Any], question: str) -> Image.Image:
        kinds = [type(visual).__name__ for visual in visuals]
        if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
            raise ValueError(f"one image is needed, the document has {kinds or 'none'}")
        if self.image_token in question:
            raise ValueError(f"the prompt places {self.image_token} itself")
        return visuals[0].convert("RGB")

    def _refuse(self, key: Key, reason: str) -> None:
        self.errors[key] = reason
        self.images.setdefault(key, f"no image of {key[0]} {key[1]}")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval takes the smallest number as the best choice, yet documents it as a
        log-likelihood; a figure would depend on which of the two one believes.
        """
        raise ValueError(
            "the task compares likelihoods, whose sign lmms-eval leaves open (its choice is the "
            "smallest number, its interface says log-likelihood): use a task that generates"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: the answers here are to one question about one image."""
        raise ValueError("the task talks in several rounds: use one that asks a single question")
