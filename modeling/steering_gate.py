"""Which tokens have little visual support, so that steering can leave the others alone.

What it is: the similarity of a token's hidden state to those of the image positions at the same
layer (the grounding consistency of arXiv 2604.04863), compared with a threshold at every step of a
forward pass; no attention map is needed. What it is not: a warning for people (that is calibrated).

    with attach_steering(model, replace(vector, gate=0.4)) as steering:
        model(**inputs); steering.gate.supports[12]      # [B, T], -1 to 1, of the last pass
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .families import decoder_layers, image_mask, unwrap

MOST_SIMILAR = 5  # image positions whose mean similarity is a token's support


class SupportGate:
    """Opens at positions whose support lies below `threshold`; hooks the model until `remove()`.

    Image positions are remembered from the pass that holds them (the prefill), for the passes with
    a cache that follow. Rows without an image have support -1.

    Args:
        model: the model, wrapped or not.
        layers: decoder layers to measure at, at their inputs.
        threshold: mean cosine, -1 (never open) to above 1 (always open).
    """

    def __init__(self, model: nn.Module, layers: list[int], threshold: float):
        self.model, self.threshold = model, threshold
        self.supports: dict[int, torch.Tensor] = {}
        self._images: dict[int, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None
        self._fresh = False  # whether the pass under way holds image tokens
        blocks = decoder_layers(model)
        base = unwrap(model).base_model
        self._handles = [base.register_forward_pre_hook(self._look, with_kwargs=True)]
        for layer in layers:
            hook = _Before(self, layer)
            self._handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def open(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """1 where `hidden` [..., D] of a layer is to be steered, else 0: float, [..., 1]."""
        opened = self.supports[layer] < self.threshold
        return opened.reshape(*hidden.shape[:-1], 1).to(hidden.device, torch.float32)

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "Gated steering finds the image by input_ids, and the model was called without. "
                "Pass input_ids, or a vector with gate=None."
            )
        mask = image_mask(self.model, ids)
        self._fresh = bool(mask.any())
        cache = kwargs.get("past_key_values")
        if self._fresh or cache is None or not int(cache.get_seq_length()):
            self._mask, self._images = mask, {}

    def _measure(self, layer: int, states: torch.Tensor) -> None:
        """Support of `states` [B, T, D], the inputs of a layer."""
        if self._mask is None:
            raise ValueError(
                f"Gated steering finds the image by input_ids, which {type(self.model).__name__} "
                "does not pass on in generate(). Use a vector with gate=None."
            )
        states = F.normalize(states.detach().float(), dim=-1)
        mask = self._mask.to(states.device)
        if self._fresh:
            self._images[layer] = _gathered(states, mask)
        counts = mask.sum(1)
        if layer not in self._images:
            self.supports[layer] = states.new_full(states.shape[:2], -1.0)
            return
        images = self._images[layer]
        similar = states @ images.transpose(1, 2)
        absent = torch.arange(images.shape[1], device=states.device) >= counts[:, None]
        similar = similar.masked_fill(absent[:, None], -1.0)
        k = min(MOST_SIMILAR, int(counts[counts > 0].min()))
        self.supports[layer] = similar.topk(k, dim=-1).values.mean(-1)


def _gathered(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states at a row's image positions first, zeros after them: [B, most of a row, D]."""
    rows = [row[inside] for row, inside in zip(states, mask, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class _Before:
    """The pre-hook of one decoder layer."""

    def __init__(self, gate: SupportGate, layer: int):
        self.gate, self.layer = gate, layer

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.gate._measure(self.layer, args[0] if args else kwargs["hidden_states"])
