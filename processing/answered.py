"""A question with its answer as model inputs, and where each token of the answer lies in them.

What it is: teacher forcing on a given answer, or the model's own answer, in one form for whoever
needs an answer's tokens by their characters. What it is not: generation in batches (generation.py).

    asked = forced(model, processor, image, "What is this?", "a dog")
    asked.producers(asked.tokens(2, 5))  # the positions that predict "dog"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firsthand.modeling.explanation import token_spans, tokens_within
from firsthand.modeling.families import check_causal, unwrap
from firsthand.modeling.placement import input_device
from firsthand.processing.generation import build_prompt, prepare_inputs


@dataclass(frozen=True)
class Answered:
    """One prompt and its answer.

    Attributes:
        inputs: what the processor gave, batch of one, the answer included: input_ids [1, T], ...
        answer: the answer's text.
        spans: (start, end) characters in `answer` of each of its A tokens.
        first: position of its first token in input_ids.
    """

    inputs: Any
    answer: str
    spans: list[tuple[int, int]]
    first: int

    def tokens(self, start: int, end: int) -> list[int]:
        """Indices (0 to A - 1) of the answer's tokens that share a character with start to end."""
        return tokens_within(self.spans, start, end)

    def producers(self, tokens: Sequence[int]) -> list[int]:
        """The position in input_ids whose output predicts each token: the one before it."""
        return [self.first + token - 1 for token in tokens]


def forced(model: nn.Module, processor: Any, image: Any, question: str, answer: str) -> Answered:
    """A given answer in the chat template's own form, tokenised together with its prompt.

    Args:
        model: whose device and dtype the inputs get.
        processor: the model's own, with a chat template and a fast tokenizer.
        image: any PIL image.
        question, answer: the texts; spaces around the answer may be dropped by the template.

    Raises:
        ValueError: for an empty answer, a model that reads its prompt in both directions, or where
            the template or tokenizer does not keep the answer.
    """
    check_causal(model, "reading an answer behind its prompt")
    if not answer.strip():
        raise ValueError("the answer is empty")
    before, text = build_prompt(processor, question), _conversation(processor, question, answer)
    start = text.find(answer.strip(), len(before)) if text.startswith(before) else -1
    if start < 0:
        raise ValueError("the chat template does not keep the answer behind its prompt")
    start -= len(answer) - len(answer.lstrip())
    inputs = processor(images=[[image.convert("RGB")]], text=[text], return_tensors="pt")
    plain = processor.tokenizer(text, return_offsets_mapping=True)
    spans = [(a - start, b - start) for a, b in plain["offset_mapping"]]
    inside = tokens_within(spans, 0, len(answer))
    moved = inputs["input_ids"].shape[1] - len(spans)  # by the image's tokens, all before
    tail = plain["input_ids"][inside[0] :]
    if inputs["input_ids"][0, inside[0] + moved :].tolist() != tail:
        raise ValueError("the processor and its tokenizer do not agree on the answer's tokens")
    limit, inner = len(answer), unwrap(model)
    kept = [(max(spans[i][0], 0), min(spans[i][1], limit)) for i in inside]
    return Answered(inputs.to(input_device(inner), inner.dtype), answer, kept, inside[0] + moved)


def _conversation(processor: Any, question: str, answer: str) -> str:
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return processor.apply_chat_template(messages)


@torch.no_grad()
def generated(
    model: nn.Module, processor: Any, image: Any, question: str, max_new_tokens: int = 64
) -> Answered:
    """The model's own (greedy) answer, as inputs that a forward pass can read again.

    Raises:
        ValueError: when the answer is empty.
    """
    check_causal(model, "reading an answer behind its prompt")
    inner: Any = unwrap(model)
    inputs = prepare_inputs(processor, [{"image": image, "question": question}])
    inputs = inputs.to(input_device(inner), inner.dtype)
    said = inner.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    first = inputs["input_ids"].shape[1]
    ids = said[0, first:].tolist()
    while ids and ids[-1] in processor.tokenizer.all_special_ids:
        ids.pop()
    answer, spans = token_spans(processor.tokenizer, ids)
    if not answer:
        raise ValueError("the model's answer is empty")
    return Answered(_extended(inputs, ids), answer, spans, first)


def _extended(inputs: Any, ids: list[int]) -> Any:
    """The inputs with further tokens; other rows of the same shape (token types) get zeros."""
    more = torch.tensor([ids], device=inputs["input_ids"].device)
    added = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    shape = inputs["input_ids"].shape
    for name, value in list(inputs.items()):
        if value.shape == shape:
            new = added.get(name, torch.zeros_like(more)).to(value.dtype)
            inputs[name] = torch.cat([value, new], 1)
    return inputs
