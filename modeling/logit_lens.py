"""What every decoder layer would say at once: its hidden state, read by the model's own head.

The logit lens, with and without the final norm in between; the published demo of LVLM-Stethoscope
reads without. It says nothing about causes, and early layers speak another language than the head.

    with layer_states(model, positions) as states: model(**inputs)
    lens = logit_lens(model, states, tokenizer)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .families import decoder_layers, final_norm
from .placement import device_of


@contextmanager
def layer_states(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The states [A, D] at A positions of one sequence, L + 1 of them after a forward pass."""
    states: list[torch.Tensor] = []

    def entering(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        states.append(hidden[0, positions.to(hidden.device)].detach())

    def leaving(layer: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden[0, positions.to(hidden.device)].detach())

    layers = decoder_layers(model)
    handles = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leaving))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel, states: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The most probable token at each position, read from each of L + 1 states.

    Args:
        model: the model.
        states: what `layer_states` kept: state 0 enters the first decoder layer, L leaves the last.
        tokenizer: to write the tokens.

    Returns:
        `lens_raw` and `lens_normed`, [L + 1][A] texts read without and with the final norm, and
        `lens_raw_probability` and `lens_normed_probability`, float32 [L + 1, A], 0 to 1.
    """
    norm: Any = final_norm(model)
    head = model.get_output_embeddings()
    cap = model.config.text_config.to_dict().get("final_logit_softcapping")  # of Gemma 2
    texts: dict[str, list[list[str]]] = {"lens_raw": [], "lens_normed": []}
    chances: dict[str, list[torch.Tensor]] = {name: [] for name in texts}
    for state in states:
        for name in texts:
            hidden = norm(state.to(device_of(norm))) if name == "lens_normed" else state
            logits = head(hidden.to(device_of(head), state.dtype)).float()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            probability, token = logits.softmax(-1).max(-1)
            texts[name].append([str(tokenizer.decode([t])) for t in token.tolist()])
            chances[name].append(probability.cpu())
    return {**texts, **{f"{name}_probability": torch.stack(p) for name, p in chances.items()}}
