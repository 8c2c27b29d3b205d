"""The model behind the page: one call at a time, nothing kept of a visitor.

Every call holds one lock, because steering and attention settings belong to the model, not to a
visitor. On ZeroGPU each call borrows a GPU. It draws nothing.

    engine = Engine(model, processor, vector)
    reply = engine.reply(image, "What is this?", strength=1.0)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import nn

from firsthand.modeling.explanation import Explanation, tokens_within
from firsthand.modeling.families import decoder_layers, unwrap
from firsthand.modeling.head_attention import head_attention
from firsthand.modeling.placement import input_device
from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.processing.answered import forced
from firsthand.processing.generation import one_view, prepare_inputs
from firsthand.processing.masks import frame_of
from firsthand.processing.overlays import PALETTE
from firsthand.processing.vision_words import read_words
from firsthand.recipes.explain_logits import label_words, read_image
from firsthand.spaces.explainability.state import Reply, joined, opening

MAX_NEW_TOKENS = 64
CHUNK = 4  # answer tokens that are explained before another visitor's call may come between


def gpu_decorator() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What lets a function run on a borrowed GPU where Hugging Face's `spaces` is installed.

    Elsewhere it changes nothing. (From the repository's root, `spaces` is the folder of that name,
    which has no GPU.)
    """
    try:
        from spaces import GPU
    except ImportError:
        return lambda function: function
    return GPU


on_gpu = gpu_decorator()  # now, because `spaces` must be imported before CUDA starts


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


class Engine:
    """A loaded model and what the page asks of it.

    Args:
        model: a supported vision-language model in eval mode.
        processor: its processor.
        vector: steering directions, or None.
        reader: a model whose image tokens say words; None takes the model itself.
        max_new_tokens: bound on an answer.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        vector: SteeringVector | None = None,
        reader: nn.Module | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.model, self.processor, self.vector = model, one_view(processor), vector
        self.reader = model if reader is None else reader
        self.max_new_tokens = max_new_tokens
        self.layers = len(decoder_layers(unwrap(model)))
        self.frame = frame_of(processor)
        self._lock = Lock()
        self._run = on_gpu(self._call)

    def _call(self, name: str, *args: Any) -> Any:
        return {
            "reply": self._reply,
            "rows": self._rows,
            "head": self._head,
            "regions": self._regions,
        }[name](*args)

    def _locked(self, name: str, *args: Any) -> Any:
        """One call, alone; what the model refuses is told in one line.

        The lock is taken here and not where the model runs: on ZeroGPU that is another process.
        """
        with self._lock:
            try:
                return self._run(name, *args)
            except ValueError as error:
                raise gr.Error(str(error)) from error
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise gr.Error("This needs more memory than there is. Ask for less.") from error

    def reply(
        self,
        image: Image.Image,
        question: str,
        strength: float = 0.0,
        temperature: float = 0.0,
        beams: int = 1,
    ) -> Reply:
        """Let the model answer, and explain its first word that names something.

        Args:
            image: RGB.
            question: as the visitor asks it.
            strength: of steering, signed; 0 is none.
            temperature: 0 takes the likeliest tokens, above it they are drawn.
            beams: of beam search; 1 is none.

        Raises:
            gr.Error: when the model refuses, or says nothing.
        """
        return self._locked("reply", image, question, strength, temperature, beams)

    def explain_tokens(self, image: Image.Image, reply: Reply, tokens: Sequence[int]) -> None:
        """Add the rows of answer tokens to a reply; those that it has cost nothing."""
        for start in range(0, len(tokens), CHUNK):
            wanted = sorted(set(tokens[start : start + CHUNK]) - set(reply.explanation.selected))
            if wanted:
                more = self._locked("rows", image, reply.explanation, reply.strength, wanted)
                reply.explanation = joined(reply.explanation, more)

    def head_map(self, image: Image.Image, reply: Reply, word: int, layer: int, head: int) -> Any:
        """One head's attention from a word to the image tokens, [R, C], 0 to 1."""
        answer, tokens = reply.explanation, reply.tokens(word)
        return self._locked("head", image, answer, reply.strength, tokens, layer, head)

    def regions(self, image: Image.Image, words: Sequence[str]) -> tuple[Image.Image, list[str]]:
        """The image with the regions whose tokens say a word, and all words that are said.

        `words` are drawn first where a token says them; at most 8 fit.
        """
        return self._locked("regions", image, list(words))

    def _steered(self, strength: float) -> AbstractContextManager:
        if self.vector is None or not strength:
            return nullcontext()
        return attach_steering(self.model, self.vector, strength)

    def _reply(
        self, image: Image.Image, question: str, strength: float, temperature: float, beams: int
    ) -> Reply:
        with self._steered(strength):
            answer, notice = self._say(image, question, temperature, beams)
            explanation, notice = self._first_explained(image, question, answer, notice)
            return Reply(explanation, strength, notice, self._head_shares(image, explanation))

    def _say(
        self, image: Image.Image, question: str, temperature: float, beams: int
    ) -> tuple[str, str]:
        """The answer, and a notice where it was cut."""
        inner: Any = unwrap(self.model)
        inputs = prepare_inputs(self.processor, [{"image": image, "question": question}])
        drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        settings = {"do_sample": False, "num_beams": beams} | drawn
        with torch.no_grad():
            said = self.model.generate(
                **inputs.to(input_device(inner), inner.dtype),
                max_new_tokens=self.max_new_tokens,
                **settings,
            )
        ids = said[0, inputs["input_ids"].shape[1] :].tolist()
        special = set(self.processor.tokenizer.all_special_ids)
        cut = len(ids) >= self.max_new_tokens and ids[-1] not in special
        while ids and ids[-1] in special:
            ids.pop()
        text = str(self.processor.tokenizer.decode(ids)).strip()
        return text, f"Cut after {len(ids)} tokens." if cut else ""

    def _first_explained(
        self, image: Image.Image, question: str, answer: str, notice: str
    ) -> tuple[Explanation, str]:
        """One word explained; an answer too long for the memory is halved until it fits."""
        tokenizer = self.processor.tokenizer
        while True:
            pieces = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
            tokens = tokens_within(pieces["offset_mapping"], *opening(answer)) or None
            try:
                found = explain(
                    self.model, self.processor, image, question, answer, tokens,
                    layers=True, baseline="blank",
                )  # fmt: skip
                return found, notice
            except RuntimeError as error:
                ids = pieces["input_ids"]
                if not out_of_memory(error) or len(ids) < 2:
                    raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            ids = ids[: len(ids) // 2]
            answer = str(tokenizer.decode(ids)).strip()
            notice = f"Cut after {len(ids)} tokens: there is no memory to explain more."

    def _explain(
        self, image: Image.Image, known: Explanation, tokens: Sequence[int]
    ) -> Explanation:
        return explain(
            self.model, self.processor, image, known.question, known.answer, tokens, layers=True
        )

    def _rows(
        self, image: Image.Image, known: Explanation, strength: float, tokens: Sequence[int]
    ) -> Explanation:
        with self._steered(strength):
            return self._explain(image, known, tokens)

    def _head_shares(self, image: Image.Image, known: Explanation) -> torch.Tensor | None:
        """[L, H, A], or None for families whose image tokens have no places in the prompt."""
        try:
            return self._attention(image, known, range(len(known.tokens))).sum((-2, -1))
        except ValueError:
            return None

    def _attention(
        self, image: Image.Image, known: Explanation, tokens: Sequence[int]
    ) -> torch.Tensor:
        asked = forced(self.model, self.processor, image, known.question, known.answer)
        return head_attention(self.model, asked.inputs, asked.producers(tokens))

    def _head(
        self,
        image: Image.Image,
        known: Explanation,
        strength: float,
        tokens: Sequence[int],
        layer: int,
        head: int,
    ) -> np.ndarray:
        with self._steered(strength):
            return self._attention(image, known, tokens)[layer, head].mean(0).numpy()

    def _regions(self, image: Image.Image, words: list[str]) -> tuple[Image.Image, list[str]]:
        logits, grid = read_image(self.reader, self.processor, image)
        reading = read_words(self.processor.tokenizer, logits, grid, words)
        said = list(dict.fromkeys([w for w in words if w in reading.words] + reading.words))
        return label_words(image, reading, said[: len(PALETTE)], self.frame), said
