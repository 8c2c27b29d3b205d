"""Fit a steering vector from contrast pairs: what the model should say or see, against what not.

Both sides of a pair are teacher-forced, and the direction of a layer comes from the differences of
its states (positive - negative). The contrast may be in the answer (VTI, arXiv 2410.15778: faithful
against hallucinated captions; CAS, 2605.27993: what is seen against what is expected or claimed),
in the image (VaLSe, 2505.17812: the relevant region against the whole image) or in both; VISTA's
(2502.03628) is one prompt with its image against the same without. Nothing is trained. Not here:
the making of pairs (`processing/steering_pairs.py`) and the vision side (`steering_vision.py`).

    vector = fit_steering(model, processor, pairs, method="svd")
    vector.save_pretrained("vector")
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.logging import tqdm

from .families import decoder_layers, family_of, steered_modules, unwrap
from .placement import input_device
from .steering import SteeringVector, check_layers

KEYS = ("image", "question", "answer")
VTI_ANGLE = 0.1  # radians, about, that VTI turns at its alpha of 1
Site = Literal["mlp", "layer"]
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
Position = Literal["answer", "last", "all"]
Pair = Mapping[str, Mapping[str, Any]]


def _mean(differences: torch.Tensor) -> torch.Tensor:
    return differences.mean(0)


def _svd(differences: torch.Tensor) -> torch.Tensor:
    mean = differences.mean(0)
    return torch.stack([_leading(differences[:, i], mean[i]) for i in range(len(mean))])


def _pca(differences: torch.Tensor) -> torch.Tensor:
    mean = differences.mean(0)
    return torch.stack([_leading(differences[:, i] - mean[i], mean[i]) for i in range(len(mean))])


def _leading(matrix: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Top right singular vector, pointing to the side of the mean and as long as the mean."""
    return _component(matrix, mean) * mean.norm()


def _component(matrix: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    component = torch.linalg.svd(matrix, full_matrices=False).Vh[0]
    return -component if component @ mean < 0 else component


def _vti(differences: torch.Tensor) -> torch.Tensor:
    """Mean and first component over all layers together, then one angle for every layer."""
    flat = differences.flatten(1)
    mean = flat.mean(0)
    direction = (mean + _component(flat - mean, mean)).view(differences.shape[1:])
    return VTI_ANGLE * F.normalize(direction, dim=-1)


@dataclass(frozen=True)
class Method:
    """How differences [N, L, D] become directions [L, D], and which states they are taken from.

    Attributes:
        estimate: the directions.
        site: "mlp" (outputs of the steered modules) or "layer" (outputs of the decoder layers).
        position: mean over the "answer" tokens, its "last" one, or mean over "all" positions.
        mode: of the vector, see `steering.steer`.
        pairs: the fewest that it needs.
        layers: the share of the decoder's depth that is fitted unless layers are named.
    """

    estimate: Callable[[torch.Tensor], torch.Tensor]
    site: Site = "mlp"
    position: Position = "answer"
    mode: str = "add"
    pairs: int = 1
    layers: tuple[float, float] = (0.0, 1.0)


METHODS: dict[str, Method] = {
    "mean": Method(_mean),
    "svd": Method(_svd),
    "pca": Method(_pca, pairs=2),
    "valse": Method(_svd, position="last"),
    "vti": Method(_vti, site="layer", position="last", mode="turn", pairs=2),
    "cas": Method(_mean, layers=(0.25, 0.5)),
}


def fit_steering(
    model: nn.Module,
    processor: ProcessorMixin,
    pairs: Iterable[Pair | None],
    method: str = "mean",
    layers: Iterable[int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    folder: str | Path | None = None,
    seed: int = 0,
) -> SteeringVector:
    """One direction a layer from `pairs`, in units of the MLP outputs ("vti": as an angle).

    Steering that is attached while fitting is part of what is measured: detach it first. The
    differences of all pairs are kept on the CPU (4 * L * D bytes a pair).

    Args:
        model: a supported vision-language model, native or grounded, wrapped or not.
        processor: its processor, with a chat template.
        pairs: `{"positive": row, "negative": row}`, row = `{"image": PIL image, "question": str,
            "answer": str}`. Of a sequence, items are read when they are needed; None is left out.
        method: "mean" (mean difference), "svd" (top singular vector of the differences, uncentred)
            or "pca" (the same, centred; needs 2 pairs). The sign of the latter two is that of the
            mean difference, and their length too: strength 1 moves by one mean difference. "valse"
            is svd at the last token of the answer, "vti" VTI's text side, "cas" the mean at early
            middle layers; what makes them these methods as well is the pairs that they are given.
        layers: decoder layers to fit; None fits those of the method (all but for "cas").
        batch_size: pairs in one forward pass (two rows each).
        progress: show a progress bar.
        folder: where differences of finished batches are kept; the same call goes on from there.
        seed: noted in the vector; whoever draws the pairs has used it.

    Raises:
        ValueError: for an unknown method, too few or malformed pairs, an empty answer, unknown
            layers, a processor without chat template, or a folder of another fit.
    """
    chosen = _chosen(model, method, layers)
    how = METHODS[method]
    differences = contrast_differences(
        model, processor, pairs, chosen, how.site, how.position, batch_size, progress, folder
    )
    if len(differences) < how.pairs:
        raise ValueError(
            f"method {method!r} needs at least {how.pairs} pairs, got {len(differences)}."
        )
    return SteeringVector(
        directions=dict(zip(chosen, how.estimate(differences), strict=True)),
        method=method,
        base_model=unwrap(model).config.name_or_path or "",
        mode=how.mode,
        pairs=len(differences),
        seed=seed,
    )


def _chosen(model: nn.Module, method: str, layers: Iterable[int] | None) -> list[int]:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if layers is not None:
        return sorted(set(layers))
    count = len(decoder_layers(model))
    first, last = (round(count * share) for share in METHODS[method].layers)
    return list(range(first, max(last, first + 1)))


@torch.no_grad()
def contrast_differences(
    model: nn.Module,
    processor: ProcessorMixin,
    pairs: Iterable[Pair | None],
    layers: Sequence[int],
    site: Site = "mlp",
    position: Position = "answer",
    batch_size: int = 8,
    progress: bool = True,
    folder: str | Path | None = None,
) -> torch.Tensor:
    """States of the positive sides minus those of the negative ones: float32 [N, L, D] on the CPU.

    Arguments and errors are those of `fit_steering`, and of `Method`.
    """
    _check(model, processor, list(layers), batch_size)
    kept = _Kept(folder, about=[unwrap(model).config.name_or_path, list(layers), site, position])
    total = len(pairs) if isinstance(pairs, Sequence) else None
    found = [torch.empty(0)]
    bar = tqdm(total=total, desc="fit steering", unit="pair", disable=not progress)
    with bar, evaluating(model):
        for number, (size, batch) in enumerate(_batches(pairs, batch_size)):
            difference = kept.read(number, batch_size)
            if difference is None:
                difference = _difference(model, processor, batch(), layers, site, position)
                kept.write(number, batch_size, difference)
            found.append(difference)
            bar.update(size)
    return torch.cat([one for one in found if one.ndim == 3] or found)


def _check(model: nn.Module, processor: ProcessorMixin, layers: list[int], batch_size: int) -> None:
    if not layers:
        raise ValueError("layers is empty; name at least one layer, or None for all.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if processor.chat_template is None:
        raise ValueError("The processor has no chat template. Set processor.chat_template first.")
    check_layers(model, layers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Kept:
    """Differences of finished batches in a folder (None keeps nothing)."""

    def __init__(self, folder: str | Path | None, about: list[Any]):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        settings, file = json.dumps(about), self.folder / "fit.json"
        if file.exists() and file.read_text() != settings:
            raise ValueError(
                f"{folder} holds the differences of another fit ({file.read_text()}, not "
                f"{settings}). Use another folder, or delete it."
            )
        if not file.exists():
            aside = file.with_suffix(".aside")
            aside.write_text(settings)
            os.replace(aside, file)

    def _file(self, number: int, size: int) -> Path:
        assert self.folder is not None
        return self.folder / f"differences-{size}-{number:05d}.safetensors"

    def read(self, number: int, size: int) -> torch.Tensor | None:
        if self.folder is None or not self._file(number, size).exists():
            return None
        return load_file(self._file(number, size))["differences"]

    def write(self, number: int, size: int, differences: torch.Tensor) -> None:
        if self.folder is not None:
            aside = self._file(number, size).with_suffix(".aside")
            save_file({"differences": differences.contiguous()}, aside)
            os.replace(aside, self._file(number, size))


def _batches(
    pairs: Iterable[Pair | None], size: int
) -> Iterator[tuple[int, Callable[[], list[Pair]]]]:
    """The length of each batch, and what reads it: items of a sequence only when asked for."""
    if isinstance(pairs, Sequence):
        for start in range(0, len(pairs), size):
            places = range(start, min(start + size, len(pairs)))
            yield len(places), partial(_read, pairs, places)
        return
    source, start = iter(pairs), 0
    while batch := list(islice(source, size)):
        yield len(batch), partial(_checked, batch, start)
        start += len(batch)


def _read(pairs: Sequence[Pair | None], places: range) -> list[Pair]:
    return _checked([pairs[place] for place in places], places.start)


def _checked(batch: list[Pair | None], start: int) -> list[Pair]:
    """The pairs of a batch that are not None, which must be whole."""
    found = []
    for index, pair in enumerate(batch, start):
        if pair is None:
            continue
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
        found.append(pair)
    return found


def _difference(
    model: nn.Module,
    processor: ProcessorMixin,
    batch: list[Pair],
    layers: Sequence[int],
    site: Site,
    position: Position,
) -> torch.Tensor:
    """The differences of one batch of pairs, float32 [n, L, D]; [0] where it is empty."""
    if not batch:
        return torch.empty(0)
    rows = [pair[side] for side in ("positive", "negative") for pair in batch]
    inputs = _encode(processor, rows, position, family_of(model).answer_type)
    states = mean_states(model, inputs, inputs.pop("counted"), layers, site)
    return states[: len(batch)] - states[len(batch) :]


def _encode(
    processor: ProcessorMixin, rows: list[Mapping[str, Any]], position: Position, answer_type: int
) -> dict[str, torch.Tensor]:
    """Prompts with their answers, right-padded; `counted` is 1 where states count [B, T]."""
    tokenizer = processor.tokenizer
    prompts = [prompt_inputs(processor, row["image"], row["question"]) for row in rows]
    sequences = [prompt.pop("input_ids")[0] for prompt in prompts]
    answers = [
        tokenizer(row["answer"], add_special_tokens=False, return_tensors="pt").input_ids[0]
        for row in rows
    ]
    whole = [torch.cat(part) for part in zip(sequences, answers, strict=True)]
    counted = []
    for sequence, answer in zip(sequences, answers, strict=True):
        inside = torch.zeros(len(sequence) + len(answer), dtype=torch.long)
        inside[{"answer": len(sequence), "last": -1, "all": 0}[position] :] = 1
        counted.append(inside)
    pad = nn.utils.rnn.pad_sequence
    asides = [key for key in prompts[0] if key.startswith("qformer_")]  # a question of its own
    images = [
        key for key in prompts[0] if key not in ("attention_mask", "labels", *TOKEN_TYPES, *asides)
    ]
    return {
        "input_ids": pad(whole, batch_first=True, padding_value=tokenizer.pad_token_id or 0),
        "attention_mask": pad([torch.ones_like(row) for row in whole], batch_first=True),
        "counted": pad(counted, batch_first=True),
        **_token_types(prompts, whole, answer_type),
        **{key: pad([prompt[key][0] for prompt in prompts], batch_first=True) for key in asides},
        **{key: torch.cat([prompt[key] for prompt in prompts]) for key in images},
    }


def _token_types(
    prompts: list[dict], whole: list[torch.Tensor], answer_type: int
) -> dict[str, torch.Tensor]:
    """Marks of each token's kind, where the processor gives them; `answer_type` at the answers.

    Qwen's `mm_token_type_ids` are 0 there for every family.
    """
    found = {}
    for key in TOKEN_TYPES:
        if key in prompts[0]:
            types = [
                torch.full_like(row, answer_type if key == "token_type_ids" else 0) for row in whole
            ]
            for row, prompt in zip(types, prompts, strict=True):
                row[: prompt[key].shape[1]] = prompt[key][0]
            found[key] = nn.utils.rnn.pad_sequence(types, batch_first=True)
    return found


def prompt_inputs(
    processor: ProcessorMixin, image: Any | None, question: str
) -> dict[str, torch.Tensor]:
    """Inputs of one prompt up to where the answer starts, with an image or (None) without."""
    content = [{"type": "text", "text": question}]
    if image is not None:
        content = [{"type": "image"}, *content]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = {} if image is None else {"images": [[image]]}
    return dict(processor(text=[text], return_tensors="pt", **images))


def mean_states(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    counted: torch.Tensor,
    layers: Sequence[int],
    site: Site,
) -> torch.Tensor:
    """Mean over each row's counted positions of a site's outputs: float32 [B, L, D] on the CPU.

    Args:
        model: a supported model.
        inputs: what its forward takes, without answers' marks.
        counted: [B, T] 1 at the positions to average over.
        layers: decoder layers.
        site: see `Method`.
    """
    base: Any = unwrap(model)
    modules = steered_modules(model) if site == "mlp" else list(decoder_layers(model))
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            weights = counted.to(hidden.device, torch.float32)
            states = hidden.reshape(*weights.shape, -1).float()
            total = (states * weights.unsqueeze(-1)).sum(1)
            outputs[layer] = (total / weights.sum(1, keepdim=True)).cpu()

        return hook

    handles = [modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        given = BatchFeature(inputs).to(input_device(base), base.dtype)
        base.base_model(**given, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([outputs[layer] for layer in layers], dim=1)


@torch.no_grad()
def fit_vista(
    model: nn.Module,
    processor: ProcessorMixin,
    image: Any,
    question: str,
    layers: Iterable[int] | None = None,
) -> SteeringVector:
    """VISTA's direction for one prompt: its last token's states with the image minus without it.

    Two prefills, no answer. The vector turns by its strength (VISTA's lambda; its own values are
    0.01 to 0.17), more where a state points away from the image.

    Args:
        model, processor: as in `fit_steering`.
        image: any PIL image.
        question: the prompt's text.
        layers: decoder layers; None fits all.

    Raises:
        ValueError: for unknown layers, or a processor without chat template.
    """
    chosen = sorted(set(range(len(decoder_layers(model))) if layers is None else layers))
    _check(model, processor, chosen, batch_size=1)
    states = []
    with evaluating(model):
        for shown in (image, None):
            inputs = prompt_inputs(processor, shown, question)
            last = torch.zeros_like(inputs["input_ids"])
            last[:, -1] = 1
            states.append(mean_states(model, inputs, last, chosen, "layer")[0])
    directions = F.normalize(states[0] - states[1], dim=-1)
    return SteeringVector(
        directions=dict(zip(chosen, directions, strict=True)),
        method="vista",
        base_model=unwrap(model).config.name_or_path or "",
        strength=0.1,
        mode="vista",
        pairs=1,
    )
