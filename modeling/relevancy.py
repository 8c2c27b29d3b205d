"""Why did the model say this word? Exact relevancy of answer tokens to image, question and answer.

`explain` answers with an `Explanation` for any supported native or grounded model. It is not an
approximation: each token gets its own backward pass of its own raw logit, nothing is accumulated
over tokens, and the streaming backend gives the same rows as the full-matrix rule of Chefer et al.
(arXiv 2103.15679) in memory that does not grow with heads x layers x length^2.

    explanation = explain(model, processor, image, "What is in the image?")
    explanation.word(1).patches; explanation.visual_contribution

One call at a time for one model: its attention implementation is exchanged during the call.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from transformers import (
    BatchFeature,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .explanation import Explanation, token_spans, tokens_within
from .families import (
    decoder_layers,
    family_of,
    image_mask,
    unwrap,
    vision_layers,
)
from .image_baselines import Baseline, baseline_image
from .logit_lens import layer_states, logit_lens
from .placement import input_device
from .relevancy_attention import Backend, Recorder, recording
from .relevancy_layout import Layout, layout_of
from .relevancy_vision import entering_queries, patch_relevancy, patch_spread


def explain(
    model: nn.Module,
    processor: ProcessorMixin,
    image: Any,
    question: str,
    answer: str | None = None,
    tokens: Iterable[int] | None = None,
    max_new_tokens: int = 64,
    backend: Backend = "streaming",
    layers: bool = False,
    baseline: Baseline | None = None,
) -> Explanation:
    """The relevancy of an answer's tokens to image, question and earlier answer.

    Parameters are frozen meanwhile and the model is in eval mode; `requires_grad`, training mode
    and attention implementation are restored, also after an error. Attached steering is in force.

    Args:
        model: a supported vision-language model, native or grounded, wrapped (PEFT) or not.
        processor: its processor, with a chat template.
        image: any PIL image.
        question: the question, as the user asks it.
        answer: the answer to explain; None lets the model answer (greedily).
        tokens: indices of the answer tokens to explain; None explains all. Each costs one backward
            pass; negative indices count from the end.
        max_new_tokens: bound on the answer that the model gives itself.
        backend: "streaming" (default), or "eager", which gives the same and keeps every map.
        layers: also after each decoder layer: relevancy, and the tokens that it would say.
        baseline: also compare the answer's probabilities with those given a "blank", "blur" or
            "noise" image; costs one forward pass.

    Raises:
        ValueError: for an unsupported model, an empty question or answer, tokens that the answer
            does not have, or an image that the processor does not turn into one grid of tokens.
    """
    _check_request(question, backend, baseline)
    inner, tokenizer = unwrap(model), processor.tokenizer
    decoder_layers(inner), vision_layers(inner)
    image = image.convert("RGB")
    inputs = _inputs(inner, processor, image, question)
    layout = layout_of(inner, inputs)
    with _frozen(inner):
        answer_ids = _answer_ids(inner, tokenizer, inputs, answer, max_new_tokens)
        selected = _selected(tokens, len(answer_ids))
        asked = _ask(inner, inputs, answer_ids)
        rows, patches, chances, states = _rows(inner, asked, layout, selected, backend, layers)
        more: dict[str, Any] = {"patches": patches, "probability": chances.exp()}
        if layers:
            more |= logit_lens(inner, states, tokenizer)
        if baseline is not None:
            given = _inputs(inner, processor, baseline_image(np.asarray(image), baseline), question)
            others = _log_probability(_logits(inner, _ask(inner, given, answer_ids)), answer_ids)
            more |= {"baseline": baseline, "log_likelihood_ratio": chances - others}
    return _explanation(tokenizer, asked, layout, question, selected, rows, layers, more)


def _check_request(question: str, backend: str, baseline: str | None) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; it must be one of {get_args(Backend)}.")
    if baseline is not None and baseline not in get_args(Baseline):
        raise ValueError(f"baseline is {baseline!r}; it must be one of {get_args(Baseline)}.")
    if not question.strip():
        raise ValueError("The question is empty; ask something about the image.")


@dataclass(frozen=True)
class _Asked:
    """Prompt and answer as the model reads them together.

    Attributes:
        given: the model's inputs, one row of n tokens.
        image: bool [n], True at the image tokens; on the CPU.
        positions: int64 [A], each the one before a token of the answer, which predicts it.
    """

    given: dict[str, Any]
    image: torch.Tensor
    positions: torch.Tensor


def _inputs(
    model: PreTrainedModel, processor: ProcessorMixin, image: Any, question: str
) -> BatchFeature:
    """What the model reads of the prompt, one row, where it reads it and in its dtype."""
    if processor.chat_template is None:
        raise ValueError("The processor has no chat template. Set processor.chat_template first.")
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[[image]], text=[prompt], return_tensors="pt")
    inputs.pop("labels", None)
    return inputs.to(input_device(model), model.dtype)


def _answer_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchFeature,
    answer: str | None,
    max_new_tokens: int,
) -> list[int]:
    """Token ids of the answer, given or generated, without the end token."""
    if answer is not None:
        ids = tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    else:
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        while ids and ids[-1] in tokenizer.all_special_ids:
            ids.pop()
    if not str(tokenizer.decode(ids)).strip():
        raise ValueError("There is nothing to explain: the answer is empty.")
    return ids


def _selected(tokens: Iterable[int] | None, count: int) -> list[int]:
    chosen = list(range(count) if tokens is None else tokens)
    wrong = [index for index in chosen if not -count <= index < count]
    if wrong or not chosen:
        raise ValueError(
            f"tokens names {wrong or 'no token'}; the answer has tokens 0 to {count - 1}."
        )
    return [index % count for index in chosen]


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and frozen parameters, each restored as it was; gradients are on."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _ask(model: PreTrainedModel, inputs: BatchFeature, answer_ids: list[int]) -> _Asked:
    answer = inputs["input_ids"].new_tensor([answer_ids])
    longer = {
        "input_ids": answer,
        "attention_mask": torch.ones_like(answer),
        "mm_token_type_ids": torch.zeros_like(answer),
        "token_type_ids": torch.full_like(answer, family_of(model).answer_type),
    }
    given = dict(inputs) | {
        name: torch.cat([inputs[name], more], 1) for name, more in longer.items() if name in inputs
    }
    ids = given["input_ids"]
    last = ids.shape[1] - 1
    positions = torch.arange(last - len(answer_ids), last, device=ids.device)
    return _Asked(given, image_mask(model, ids)[0].cpu(), positions)


def _logits(model: PreTrainedModel, asked: _Asked, **changed: torch.Tensor) -> torch.Tensor:
    """What the model says at the positions that predict the answer, [A, V]."""
    given = asked.given | changed
    return model(**given, use_cache=False, logits_to_keep=asked.positions).logits[0]


def _log_probability(logits: torch.Tensor, answer_ids: list[int]) -> torch.Tensor:
    """Of each token of the answer, in nats, float32 [A] on the CPU."""
    ids = torch.tensor(answer_ids, device=logits.device)
    return logits.detach().float().log_softmax(-1).gather(1, ids[:, None])[:, 0].cpu()


def _rows(
    model: PreTrainedModel,
    asked: _Asked,
    layout: Layout,
    selected: list[int],
    backend: Backend,
    layers: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, list[torch.Tensor]]:
    """Rows over the sequence [S, L or 1, n] and over the patches [S, r, c] or None; the answer's
    log-probabilities [A]; the decoder's states at the positions that predict it (if `layers`)."""
    pixels = asked.given["pixel_values"].clone().requires_grad_()
    answer_ids = asked.given["input_ids"][0, asked.positions + 1].tolist()
    spread = patch_spread(model.config, asked.image, layout)
    recorder = Recorder(model, spread, backend, per_layer=layers)
    text, vision = [], []
    watched = layer_states(model, asked.positions if layers else asked.positions[:0])
    with recording(model, recorder), entering_queries(model) as queries, watched as states:
        logits = _logits(model, asked, pixel_values=pixels)
        recorder.check()
        for index in selected:
            at = int(asked.positions[index])
            recorder.begin(at, len(asked.image))
            logit = logits[index, answer_ids[index]]
            torch.autograd.grad(logit, [pixels, *queries], retain_graph=True)
            rows = recorder.rows["text"].cpu()
            rows[:, at] -= 1
            text.append(_finite(rows, model.dtype))
            patches = patch_relevancy(model, recorder, rows[-1, asked.image], layout)
            if patches is not None:
                vision.append(patches)
    chances = _log_probability(logits, answer_ids)
    return torch.stack(text), torch.stack(vision) if vision else None, chances, states


def _finite(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"Gradients overflow in {dtype}. Load the model in bfloat16 or float32.")
    return rows


def _explanation(
    tokenizer: PreTrainedTokenizerBase,
    asked: _Asked,
    layout: Layout,
    question: str,
    selected: list[int],
    rows: torch.Tensor,
    layers: bool,
    more: dict[str, Any],
) -> Explanation:
    """Name the parts of the rows [S, L or 1, n], and the texts."""
    ids, first = asked.given["input_ids"][0].cpu(), int(asked.positions[0]) + 1
    answer_ids = ids[first:].tolist()
    answer, spans = token_spans(tokenizer, answer_ids)
    positions, pieces = _question(tokenizer, ids[:first], asked.image[:first], question)
    if layers:
        more |= _parts(rows, asked, positions, layout, "image_layers question_layers answer_layers")
    return Explanation(
        question=question,
        answer=answer,
        tokens=[answer[start:end] for start, end in spans],
        token_ids=answer_ids,
        spans=spans,
        selected=selected,
        question_tokens=pieces,
        **_parts(
            rows[:, -1], asked, positions, layout, "image question_relevancy answer_relevancy"
        ),
        **more,
    )


def _parts(
    rows: torch.Tensor, asked: _Asked, question: list[int], layout: Layout, names: str
) -> dict[str, Any]:
    """Rows [..., n] as relevancy to image [..., R, C], question [..., Q] and answer [..., A]."""
    parts = (
        layout.over_image(rows[..., asked.image]),
        rows[..., question],
        rows[..., asked.positions.cpu() + 1],
    )
    return dict(zip(names.split(), parts, strict=True))


def _question(
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    image: torch.Tensor,
    question: str,
) -> tuple[list[int], list[str]]:
    """Positions of the question in the prompt, and the text of each.

    It is all ordinary text of the prompt if the chat template or tokenizer rewrote the question.
    """
    positions = (~image).nonzero()[:, 0].tolist()
    ids = prompt[positions].tolist()
    text, spans = token_spans(tokenizer, ids)
    start = text.rfind(question.strip())
    special = set(tokenizer.all_special_ids)
    inside = (
        tokens_within(spans, start, start + len(question.strip()))
        if start >= 0
        else [index for index, token in enumerate(ids) if token not in special]
    )
    return [positions[i] for i in inside], [text[slice(*spans[i])] for i in inside]
