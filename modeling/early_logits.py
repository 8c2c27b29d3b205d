"""VISTA's second half: the logits of early layers mixed into the last one's, at no extra pass.

What it is: next-token logits (1 - s) head(h_L) + s mean_l head(h_l) over the layers at 25/32 to
30/32 of the decoder's depth, read without the final norm (arXiv 2502.03628, self-logits
augmentation). The head is linear, so the states are mixed before it and it runs once. What it is
not: steering (`steering.py`), which it may accompany, or the logit lens, which only shows.

    with attach_steering(model, vector), early_logits(model, 0.3):
        model.generate(**inputs)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .families import decoder_layers, unwrap

DEPTHS = (25 / 32, 30 / 32)  # of the first and last early layer's output


@contextmanager
def early_logits(model: nn.Module, share: float = 0.3) -> Iterator[None]:
    """Mix early layers' logits into those of every forward pass, while the context lasts.

    For `generate` and whole passes: a pass whose `logits_to_keep` names positions one by one would
    be given the states of others.

    Args:
        model: a supported model, wrapped or not.
        share: s, 0 (bit-identical to none) to 1; VISTA takes 0.3.

    Raises:
        ValueError: for another share.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie in 0 (plain logits) to 1.")
    if share == 0:
        yield
        return
    base: Any = unwrap(model)
    layers = decoder_layers(model)
    first, last = (max(1, round(len(layers) * depth)) for depth in DEPTHS)
    states: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return hook

    def mix(module: nn.Module, args: Any) -> Any:
        final = args[0]
        kept = [state[:, -final.shape[1] :].to(final) for state in states.values()]
        return (torch.lerp(final, torch.stack(kept).mean(0), share), *args[1:])

    handles = [layers[i - 1].register_forward_hook(keep(i)) for i in range(first, last + 1)]
    handles.append(base.get_output_embeddings().register_forward_pre_hook(mix))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
