"""Fit a steering vector from contrast pairs: what the model should say or see, against what not.

Both sides of a pair are teacher-forced; the outputs of the decoder's MLPs are averaged over the
answer tokens, and the direction of a layer comes from the differences (positive - negative). The
contrast may be in the answer (VTI, arXiv 2410.15778: faithful against hallucinated captions), in
the image (VaLSe, 2505.17812: relevant region kept against the whole image) or in both. Nothing is
trained.

    vector = fit_steering(model, processor, pairs)
    vector.save_pretrained("vector")
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.logging import tqdm

from .families import decoder_layers, steered_modules, unwrap
from .steering import SteeringVector, check_layers

KEYS = ("image", "question", "answer")


def _mean(differences: torch.Tensor) -> torch.Tensor:
    return differences.mean(0)


def _svd(differences: torch.Tensor) -> torch.Tensor:
    return _leading(differences, differences.mean(0))


def _pca(differences: torch.Tensor) -> torch.Tensor:
    return _leading(differences - differences.mean(0), differences.mean(0))


def _leading(matrix: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Top right singular vector, pointing to the side of the mean and as long as the mean."""
    component = torch.linalg.svd(matrix, full_matrices=False).Vh[0]
    sign = -1.0 if component @ mean < 0 else 1.0
    return component * (sign * mean.norm())


METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": _mean,
    "svd": _svd,
    "pca": _pca,
}


@torch.no_grad()
def fit_steering(
    model: nn.Module,
    processor: ProcessorMixin,
    pairs: Iterable[Mapping[str, Mapping[str, Any]]],
    method: str = "mean",
    layers: Iterable[int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringVector:
    """One direction a layer from `pairs`, in units of the MLP outputs.

    Steering that is attached while fitting is part of what is measured: detach it first. The
    differences of all pairs are kept on the CPU (4 * L * D bytes a pair).

    Args:
        model: a supported vision-language model, native or grounded, wrapped or not.
        processor: its processor, with a chat template.
        pairs: `{"positive": row, "negative": row}`, row = `{"image": PIL image, "question": str,
            "answer": str}`.
        method: "mean" (mean difference), "svd" (top singular vector of the differences, uncentred)
            or "pca" (the same, centred; needs 2 pairs). The sign of the latter two is that of the
            mean difference, and their length too: strength 1 moves by one mean difference.
        layers: decoder layers to fit; None fits all.
        batch_size: pairs in one forward pass (two rows each).
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown method, no or malformed pairs, an empty answer, unknown layers or
            a processor without chat template.
    """
    chosen = sorted(set(range(len(decoder_layers(model))) if layers is None else layers))
    _check(model, processor, method, chosen, batch_size)
    differences = torch.cat(
        list(_differences(model, processor, pairs, chosen, batch_size, progress))
        or [torch.empty(0)]
    )
    needed = 2 if method == "pca" else 1
    if len(differences) < needed:
        raise ValueError(
            f"method {method!r} needs at least {needed} pairs, got {len(differences)}."
        )
    directions = {layer: METHODS[method](differences[:, row]) for row, layer in enumerate(chosen)}
    return SteeringVector(
        directions=directions,
        method=method,
        base_model=unwrap(model).config.name_or_path or "",
        pairs=len(differences),
    )


def _check(
    model: nn.Module, processor: ProcessorMixin, method: str, layers: list[int], batch_size: int
) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if not layers:
        raise ValueError("layers is empty; name at least one layer, or None for all.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if processor.chat_template is None:
        raise ValueError("The processor has no chat template. Set processor.chat_template first.")
    check_layers(model, layers)


def _differences(
    model: nn.Module,
    processor: ProcessorMixin,
    pairs: Iterable[Mapping[str, Mapping[str, Any]]],
    layers: list[int],
    batch_size: int,
    progress: bool,
) -> Iterator[torch.Tensor]:
    """Per batch the differences of its pairs, float32 [n, L, D] on the CPU."""
    training = model.training
    model.eval()
    total, checked = len(pairs) if isinstance(pairs, Sized) else None, _checked(pairs)
    try:
        with tqdm(total=total, desc="fit steering", unit="pair", disable=not progress) as bar:
            while batch := list(islice(checked, batch_size)):
                rows = [pair[side] for side in ("positive", "negative") for pair in batch]
                means = _answer_means(model, _encode(processor, rows), layers)
                bar.update(len(batch))
                yield means[: len(batch)] - means[len(batch) :]
    finally:
        model.train(training)


def _checked(pairs: Iterable[Mapping[str, Mapping[str, Any]]]) -> Iterator[Mapping]:
    for index, pair in enumerate(pairs):
        for side in ("positive", "negative"):
            if side not in pair or any(key not in pair[side] for key in KEYS):
                raise ValueError(
                    f"Pair {index} lacks {side!r} with {', '.join(KEYS)}; give "
                    '{"positive": {...}, "negative": {...}}.'
                )
            if not pair[side]["answer"].strip():
                raise ValueError(
                    f"Pair {index} has an empty {side} answer; nothing to average over."
                )
        yield pair


def _encode(processor: ProcessorMixin, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Prompts with their answers, right-padded; `answer` is 1 at the answer's tokens [B, T]."""
    tokenizer = processor.tokenizer
    prompts = [_prompt(processor, row) for row in rows]
    sequences = [prompt.pop("input_ids")[0] for prompt in prompts]
    answers = [
        tokenizer(row["answer"], add_special_tokens=False, return_tensors="pt").input_ids[0]
        for row in rows
    ]
    parts = list(zip(sequences, answers, strict=True))
    whole = [torch.cat(part) for part in parts]
    is_answer = [torch.cat([torch.zeros_like(p), torch.ones_like(a)]) for p, a in parts]
    pad = nn.utils.rnn.pad_sequence
    images = [key for key in prompts[0] if key != "attention_mask"]
    return {
        "input_ids": pad(whole, batch_first=True, padding_value=tokenizer.pad_token_id or 0),
        "attention_mask": pad([torch.ones_like(row) for row in whole], batch_first=True),
        "answer": pad(is_answer, batch_first=True),
        **{key: torch.cat([prompt[key] for prompt in prompts]) for key in images},
    }


def _prompt(processor: ProcessorMixin, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(processor(images=[row["image"]], text=[text], return_tensors="pt"))


def _answer_means(
    model: nn.Module, batch: dict[str, torch.Tensor], layers: list[int]
) -> torch.Tensor:
    """Mean over each row's answer tokens of the steered modules' outputs: [B, L, D] on the CPU."""
    base, modules = unwrap(model), steered_modules(model)
    is_answer = batch.pop("answer").to(base.device)
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            weights = is_answer.to(hidden.device, torch.float32)
            states = hidden.reshape(*weights.shape, -1).float()
            total = (states * weights.unsqueeze(-1)).sum(1)
            outputs[layer] = (total / weights.sum(1, keepdim=True)).cpu()

        return hook

    handles = [modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        base.base_model(**BatchFeature(batch).to(base.device, base.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([outputs[layer] for layer in layers], dim=1)
