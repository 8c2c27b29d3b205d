"""Where a loaded model computes: on one device, on several, or with weights that accelerate moves.

`device_map` puts layers on several devices, or keeps their weights in memory or on disk and loads
them for each forward pass; between passes they are then on torch's "meta" device. Nothing is placed
or moved here (accelerate does that): this is what the rest of the package has to know about it.

    inputs.to(input_device(model), model.dtype); with recomputed(layers, around): model(**inputs)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel


def offloaded(module: nn.Module) -> bool:
    """Whether weights of `module` are kept elsewhere and loaded for each forward pass."""
    return any(parameter.is_meta for parameter in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first weight; the CPU where its weights are offloaded.

    What is used beside weights is kept there. Where they are offloaded, whoever uses it has to move
    it to the device of the states that it meets.
    """
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong: with its embeddings, and on the CPU where these are offloaded.

    Accelerate's hooks move them on from there; `model.device` would say "meta".
    """
    return device_of(model.get_input_embeddings())


@contextmanager
def recomputed(
    layers: Iterable[nn.Module], around: Callable[[nn.Module], AbstractContextManager]
) -> Iterator[None]:
    """Let offloaded layers keep only their inputs for backward, and run once more in each of them.

    Otherwise the graph would hold all weights that forward has loaded, the whole model at once.

    Args:
        layers: those of a model; the ones that are not offloaded stay as they are.
        around: a context for each run of a layer, also in autograd's own threads.
    """
    changed = [layer for layer in layers if offloaded(layer)]
    before = [vars(layer).get("forward") for layer in changed]  # set where accelerate has a hook
    try:
        for layer in changed:
            layer.forward = _again(layer, layer.forward, around)
        yield
    finally:
        for layer, forward in zip(changed, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _again(
    layer: nn.Module, forward: Callable, around: Callable[[nn.Module], AbstractContextManager]
) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with around(layer):
            return forward(*args, **kwargs)

    def kept(*args: Any, **kwargs: Any) -> Any:
        with set_checkpoint_early_stop(False):  # which would leave loaded weights behind
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return kept
