"""Where each attention head of the decoder looks in the image, at the positions that matter.

`head_attention` runs one forward pass on an attention function of its own and keeps, in each layer,
the wanted rows and the image's columns; a full map [heads, n, n] is never made. What it is not:
relevancy (relevancy.py: no gradients here), statistics or drawing (the processing folder's).

    rows = head_attention(model, inputs, [position - 1])  # [layers, heads, 1, R, C]
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .families import decoder_layers, image_grids, image_mask, unwrap
from .relevancy_attention import REFUSED, implementations, relevancy_attention

NAME = "firsthand_heads"


class Capture:
    """Attention rows of wanted positions over the image tokens, filled layer by layer.

    Args:
        model: the model (not a wrapper), to know which layer an attention module belongs to.
        positions: the S wanted query positions.
        image: bool [n], True at the N image tokens.
    """

    def __init__(self, model: PreTrainedModel, positions: Sequence[int], image: torch.Tensor):
        layers = decoder_layers(model)
        self.layer_of = {m: i for i, layer in enumerate(layers) for m in layer.modules()}
        self.positions, self.image = torch.tensor(positions), image
        self.rows: list[torch.Tensor | None] = [None] * len(layers)

    def add(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Keep the rows of one layer: query [1, H, n, d], key [1, K, n, d], additive mask."""
        if mask is None:
            raise ValueError(f"{type(module).__name__} got no causal mask: its rows look ahead.")
        at = self.positions.to(query.device)
        heads, key_heads = query.shape[1], key.shape[1]
        wanted = query[0, :, at].float().reshape(key_heads, -1, query.shape[-1])
        scores = (wanted @ key[0].float().transpose(-1, -2) * scale).view(heads, len(at), -1)
        weights = torch.softmax(scores + mask[0, :, at, : key.shape[2]].float(), dim=-1)
        self.rows[self.layer_of[module]] = weights[..., self.image.to(weights.device)].cpu()

    def stacked(self) -> torch.Tensor:
        """[L, H, S, N], or ValueError naming the layers without attention."""
        missing = [i for i, rows in enumerate(self.rows) if rows is None]
        if missing:
            raise ValueError(f"Decoder layers {missing} made no attention; there is none to show.")
        return torch.stack([rows for rows in self.rows if rows is not None])


_ACTIVE: ContextVar[Capture | None] = ContextVar("firsthand_capture", default=None)


@contextmanager
def _capturing(model: PreTrainedModel, capture: Capture) -> Iterator[None]:
    """Run the text decoder on `capturing_attention`; everything is restored afterwards."""
    AttentionInterface.register(NAME, capturing_attention)
    AttentionMaskInterface.register(NAME, eager_mask)  # without it, attention would not be causal
    before = implementations(model.config)
    training = [module for module in model.modules() if module.training]
    token = _ACTIVE.set(capture)
    try:
        model.set_attn_implementation({"text_config": NAME})
        model.eval()
        yield
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True
        _ACTIVE.reset(token)


def capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers that shows its rows to the active `Capture`.

    The output is that of scaled dot-product attention; query [1, H, n, d], key and value
    [1, K, n, d], H % K == 0.

    Raises:
        ValueError: for attention whose rows are not a plain softmax (soft caps, sinks, position
            biases), rather than wrong ones.
    """
    given = [option for option in ("softcap", *REFUSED) if kwargs.get(option) is not None]
    if given:
        name = type(module).__name__
        raise ValueError(f"{name} uses {', '.join(given)}: its rows are no plain softmax.")
    capture = _ACTIVE.get()
    if capture is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        capture.add(module, query, key, attention_mask, scale)
    return relevancy_attention(module, query, key, value, attention_mask, scaling)


@torch.no_grad()
def head_attention(
    model: nn.Module, inputs: Mapping[str, Any], positions: Sequence[int]
) -> torch.Tensor:
    """The attention of some positions to the image tokens, in every head of the decoder.

    The model is in eval mode meanwhile; mode and attention implementation are restored, also after
    an error. Attached steering is in force. FiVL (arXiv 2412.14672) reads a word's row at the
    position *before* it, the query that produces it.

    Args:
        model: a supported vision-language model, native or grounded, wrapped (PEFT) or not.
        inputs: prepared inputs of one prompt (and answer) with one image: input_ids [1, n], ...
        positions: S query positions, 0 to n - 1.

    Returns:
        float32 [L, H, S, R, C] on the CPU: shares of each row, 0 to 1. They sum to at most 1 over
        the image; the rest of a row lies on text.

    Raises:
        ValueError: when the inputs hold more than one row or image, or a position is not in them.
    """
    base, ids = unwrap(model), inputs["input_ids"]
    grids = image_grids(base.config, inputs)
    if len(ids) != 1 or len(grids) != 1:
        raise ValueError(
            f"The inputs hold {len(ids)} rows and {len(grids)} images. Pass one row with one "
            "image, and switch image splitting off (do_image_splitting, crop_to_patches)."
        )
    if not positions or not all(0 <= p < ids.shape[1] for p in positions):
        raise ValueError(f"positions is {list(positions)}; give some of 0 to {ids.shape[1] - 1}.")
    capture = Capture(base, positions, image_mask(base, ids)[0].cpu())
    with _capturing(base, capture):
        base.base_model(**inputs, use_cache=False)
    return capture.stacked().unflatten(-1, grids[0])
