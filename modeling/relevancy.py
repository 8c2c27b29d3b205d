"""Why did the model say this word? Exact relevancy of answer tokens to image, question and answer.

`explain` answers with an `Explanation` for any supported native or grounded model. It is not an
approximation: each token gets its own backward pass of its own raw logit, nothing is accumulated
over tokens, and the streaming backend gives the same rows as the full-matrix rule of Chefer et al.
(arXiv 2103.15679) in memory that does not grow with heads x layers x length^2.

    explanation = explain(model, processor, image, "What is in the image?")
    explanation.word(1).patches; explanation.visual_contribution

One call at a time for one model: its attention implementation is exchanged during the call.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from transformers import (
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .explanation import Explanation, token_spans, tokens_within
from .families import (
    Grid,
    family_of,
    image_grids,
    image_mask,
    patch_grid,
    patch_order,
    qformer_layers,
    unwrap,
    vision_layers,
    vision_prefix_tokens,
)
from .relevancy_attention import Backend, Recorder, recording
from .relevancy_qformer import query_relevancy


def explain(
    model: nn.Module,
    processor: ProcessorMixin,
    image: Any,
    question: str,
    answer: str | None = None,
    tokens: Iterable[int] | None = None,
    max_new_tokens: int = 64,
    backend: Backend = "streaming",
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

    Raises:
        ValueError: for an unsupported model, an empty question or answer, tokens that the answer
            does not have, or an image that the processor does not turn into one grid of tokens.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; it must be one of {get_args(Backend)}.")
    if not question.strip():
        raise ValueError("The question is empty; ask something about the image.")
    inner = unwrap(model)
    vision_layers(inner)
    inputs = _inputs(inner, processor, image, question)
    grid = _grid(inner.config, inputs)
    with _frozen(inner):
        answer_ids = _answer_ids(inner, processor.tokenizer, inputs, answer, max_new_tokens)
        selected = _selected(tokens, len(answer_ids))
        rows = _rows(inner, inputs, grid, answer_ids, selected, backend)
    return _explanation(
        inner, processor.tokenizer, inputs, grid, question, answer_ids, selected, *rows
    )


def _inputs(
    model: PreTrainedModel, processor: ProcessorMixin, image: Any, question: str
) -> BatchFeature:
    """What the model reads of the prompt, one row, on the model's device in its dtype."""
    if processor.chat_template is None:
        raise ValueError("The processor has no chat template. Set processor.chat_template first.")
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[[image.convert("RGB")]], text=[prompt], return_tensors="pt")
    inputs.pop("labels", None)
    return inputs.to(model.device, model.dtype)


def _grid(config: PreTrainedConfig, inputs: BatchFeature) -> Grid:
    """Rows and columns of the image's tokens; those of a Q-Former stand in one row."""
    if family_of(config).qformer is not None:
        return 1, config.num_query_tokens
    grids = image_grids(config, inputs)
    if len(grids) != 1:
        raise ValueError(
            f"The processor made {len(grids)} images of one. Relevancy needs the whole image as "
            "one: switch tiles off (do_image_splitting or crop_to_patches of its image_processor)."
        )
    return grids[0]


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


def _rows(
    model: PreTrainedModel,
    inputs: BatchFeature,
    grid: Grid,
    answer_ids: list[int],
    selected: list[int],
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows over the sequence [S, n] and over the patches [S, m] or None; probabilities [A]."""
    given = _with_answer(inputs, answer_ids, family_of(model).answer_type)
    given["pixel_values"] = pixels = given["pixel_values"].clone().requires_grad_()
    ids, count = given["input_ids"], len(answer_ids)
    positions = torch.arange(ids.shape[1] - 1 - count, ids.shape[1] - 1, device=ids.device)
    answer = ids[0, -count:, None]
    image = image_mask(model, ids)[0].cpu()
    recorder = Recorder(model, _spread(model.config, image, grid), backend)
    text, vision = [], []
    with recording(model, recorder), _queries(model) as queries:
        logits = model(**given, use_cache=False, logits_to_keep=positions).logits[0]
        emitted = logits.gather(1, answer)[:, 0]
        for index in selected:
            at = int(positions[index])
            recorder.begin(at, ids.shape[1])
            torch.autograd.grad(emitted[index], [pixels, *queries], retain_graph=True)
            row = recorder.rows["text"].cpu()
            row[at] -= 1
            text.append(_finite(row, model.dtype))
            patches = _patches(model, recorder, row[image], grid)
            if patches is not None:
                vision.append(patches)
    probability = logits.detach().float().softmax(-1).gather(1, answer)[:, 0].cpu()
    return torch.stack(text), torch.stack(vision) if vision else None, probability


@contextmanager
def _queries(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What enters a Q-Former, as a tensor that needs gradients: the image decides nothing of it."""
    entered: list[torch.Tensor] = []

    def enter(layer: nn.Module, args: tuple) -> tuple:
        entered.append(args[0].detach().requires_grad_())
        return entered[0], *args[1:]

    handles = [layer.register_forward_pre_hook(enter) for layer in qformer_layers(model)[:1]]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _with_answer(inputs: BatchFeature, answer_ids: list[int], answer_type: int) -> dict[str, Any]:
    """The prepared inputs, as long as prompt and answer together."""
    answer = inputs["input_ids"].new_tensor([answer_ids])
    longer = {
        "input_ids": answer,
        "attention_mask": torch.ones_like(answer),
        "mm_token_type_ids": torch.zeros_like(answer),
        "token_type_ids": torch.full_like(answer, answer_type),
    }
    return dict(inputs) | {
        name: torch.cat([inputs[name], more], 1) for name, more in longer.items() if name in inputs
    }


def _patches(
    model: PreTrainedModel, recorder: Recorder, image: torch.Tensor, grid: Grid
) -> torch.Tensor | None:
    """The finished relevancy of the patches [r, c], from that of the image tokens, [R * C]."""
    config = model.config
    shape, order = _patch_grid(config, grid)
    if recorder.keeps:
        (vision, layers) = (recorder.kept(f(model)) for f in (vision_layers, qformer_layers))
        row = image @ query_relevancy([bar for (bar,) in vision], layers)
    elif recorder.spread is not None:
        row = recorder.rows["vision"].cpu()
    else:
        return None
    row = row[vision_prefix_tokens(config) :]
    return torch.empty_like(row).index_copy_(0, order, row).view(shape)


def _patch_grid(config: PreTrainedConfig, grid: Grid) -> tuple[Grid, torch.Tensor]:
    """The grid of the patches behind a grid of image tokens, and their order in the encoder."""
    family = family_of(config)
    if family.qformer is not None:
        grid = patch_grid(config)
    merge = family.merge(config)
    return (grid[0] * merge, grid[1] * merge), patch_order(config, grid)


def _finite(row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not bool(torch.isfinite(row).all()):
        raise ValueError(f"Gradients overflow in {dtype}. Load the model in bfloat16 or float32.")
    return row


def _spread(
    config: PreTrainedConfig, image: torch.Tensor, grid: Grid
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """From a row over the sequence to one over the vision encoder's tokens (None: cannot be split).

    A merger shares a token's relevancy equally among the patches that it merges.
    """
    family = family_of(config)
    if family.qformer is not None or family.mixes(config):
        return None
    return partial(
        spread_over_patches,
        image=image,
        grid=grid,
        merge=family.merge(config),
        prefix=vision_prefix_tokens(config),
        order=patch_order(config, grid),
    )


def spread_over_patches(
    row: torch.Tensor,
    image: torch.Tensor,
    grid: Grid,
    merge: int,
    prefix: int,
    order: torch.Tensor,
) -> torch.Tensor:
    """Each image token's relevancy in equal shares on its patches, zeros on the CLS token.

    Args:
        row: [n] over the sequence.
        image: bool [n], True at the R * C image tokens.
        grid: (R, C).
        merge: patches on each side of the square that one token stands for.
        prefix: tokens of the vision encoder before its patches.
        order: as `families.patch_order` gives it.

    Returns:
        [prefix + R * C * merge^2].
    """
    tokens = row[image.to(row.device)].view(grid) / merge**2
    patches = tokens.repeat_interleave(merge, 0).repeat_interleave(merge, 1)
    return torch.cat([row.new_zeros(prefix), patches.flatten()[order.to(row.device)]])


def _explanation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchFeature,
    grid: Grid,
    question: str,
    answer_ids: list[int],
    selected: list[int],
    text: torch.Tensor,
    vision: torch.Tensor | None,
    probability: torch.Tensor,
) -> Explanation:
    prompt = inputs["input_ids"][0].cpu()
    answer, spans = token_spans(tokenizer, answer_ids)
    asked, pieces = _question(tokenizer, prompt, image_mask(model, prompt), question)
    image = text[:, : len(prompt)][:, image_mask(model, prompt)]
    return Explanation(
        question=question,
        answer=answer,
        tokens=[answer[start:end] for start, end in spans],
        token_ids=answer_ids,
        spans=spans,
        selected=selected,
        question_tokens=pieces,
        image=image.view(-1, *grid),
        patches=vision,
        question_relevancy=text[:, asked],
        answer_relevancy=text[:, len(prompt) :],
        probability=probability,
    )


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
