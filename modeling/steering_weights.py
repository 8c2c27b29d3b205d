"""Steering inside the weights: a vector folded into biases, or directions cut out (Nullu).

What it is: two edits in place after which stock code computes the steered model at no cost, without
hooks and without this package. What it is not: reversible; keep the model's files.

    fold_steering(model, vector, strength=2.0).save_pretrained("steered")     # a stock checkpoint
    cut_directions(model, hallucinated_directions(differences, rank=4)).save_pretrained("edited")
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import decoder_layers, steered_modules, unwrap
from .placement import offloaded
from .steering import SteeringVector, check_layers, check_strength

BIAS_FIELDS = {"llama": "mlp_bias"}  # text model type -> config field that gives its MLPs biases


@torch.no_grad()
def fold_steering(
    model: nn.Module, vector: SteeringVector, strength: float | None = None
) -> PreTrainedModel:
    """Put an additive vector into the biases of the MLPs' last linear layers, in place.

    The other linear layers of the MLPs, and those of layers that are not steered, get biases of
    zero where the config can only switch all on together. `save_pretrained` then writes a
    checkpoint of the same stock class.

    Args:
        model: an instance of a stock class of transformers, not wrapped.
        vector: additive, of the decoder, without gate.
        strength: factor on it; None takes the vector's own.

    Returns:
        The model.

    Raises:
        ValueError: with the reason, for what a bias cannot express (another mode, a gate, the
            vision side), or a model without place for one; the model is then unchanged.
    """
    _check_vector(vector)
    stock = _check_model(model)
    check_layers(stock, vector.layers, vector)
    strength = vector.strength if strength is None else strength
    check_strength(strength)
    if not _has_biases(stock):
        _add_biases(stock)
    modules = steered_modules(stock)
    for layer, direction in vector.directions.items():
        bias = _last_linear(modules[layer]).bias
        bias.add_((strength * direction).to(bias))
    return stock


def _check_vector(vector: SteeringVector) -> None:
    for wrong, reason in (
        (vector.vision, "it steers the vision encoder, whose MLPs are not folded"),
        (vector.mode != "add", f"mode {vector.mode!r} rescales each state, a bias is a constant"),
        (vector.gate is not None, "it is gated, and a bias acts at every position"),
    ):
        if wrong:
            raise ValueError(f"Cannot fold this vector: {reason}. Use attach_steering instead.")


def _check_model(model: nn.Module) -> PreTrainedModel:
    stock = unwrap(model)
    if stock is not model:
        raise ValueError(
            f"Cannot fold into {type(model).__name__}, a wrapper: merge it first (PEFT: "
            "merge_and_unload)."
        )
    if not type(stock).__module__.startswith("transformers."):
        raise ValueError(
            f"Cannot fold into {type(stock).__name__}, which is no class of transformers: load the "
            "checkpoint with AutoModelForImageTextToText, without remote code; where it has no "
            "stock class, use attach_steering."
        )
    text = stock.config.get_text_config()
    if text.model_type not in BIAS_FIELDS and not _has_biases(stock):
        raise ValueError(
            f"Cannot fold into a decoder of type {text.model_type!r}: its config has no bias for "
            f"the MLPs' output, only {', '.join(BIAS_FIELDS)} and those with biases of their own "
            "have. Use attach_steering instead."
        )
    return stock


def _last_linear(module: nn.Module) -> nn.Linear:
    """The linear layer whose output is the steered module's.

    Raises:
        ValueError: where another layer comes last.
    """
    linear = dict(module.named_modules()).get("down_proj", module)
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"Cannot edit the weights of {type(module).__name__}: its output is not that of one "
            "plain linear layer (norms and quantised layers have none). Use attach_steering."
        )
    if offloaded(linear):
        raise ValueError(
            "Cannot edit weights that are offloaded (device_map): load the model into memory, or "
            "use attach_steering."
        )
    return linear


def _has_biases(model: PreTrainedModel) -> bool:
    return all(_last_linear(module).bias is not None for module in steered_modules(model))


def _add_biases(model: PreTrainedModel) -> None:
    text = model.config.get_text_config()
    for module in steered_modules(model):
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                zeros = linear.weight.new_zeros(linear.out_features)
                linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
    setattr(text, BIAS_FIELDS[text.model_type], True)


def hallucinated_directions(
    differences: torch.Tensor, layers: list[int], rank: int = 4
) -> dict[int, torch.Tensor]:
    """Nullu's subspace a layer: the top right singular vectors of the differences, uncentred.

    Args:
        differences: [N, L, D] truthful minus hallucinated states (`contrast_differences` at site
            "layer", position "all").
        layers: L decoder layer indices.
        rank: vectors a layer, 1 to min(N, D).

    Returns:
        Layer -> [rank, D], orthonormal rows.

    Raises:
        ValueError: for a rank that the differences do not have.
    """
    most = min(len(differences), differences.shape[-1])
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}; {len(differences)} pairs allow 1 to {most}.")
    found = torch.linalg.svd(differences.transpose(0, 1), full_matrices=False).Vh[:, :rank]
    return dict(zip(layers, found, strict=True))


@torch.no_grad()
def cut_directions(model: nn.Module, basis: Mapping[int, torch.Tensor]) -> PreTrainedModel:
    """Nullu's edit (arXiv 2412.13817), in place: W <- (I - V V^T) W of the MLPs' last linears.

    Afterwards no output of these MLPs has a component along the directions (a bias neither).

    Args:
        model: a supported model, not wrapped.
        basis: layer -> [rank, D] with orthonormal rows.

    Returns:
        The model.

    Raises:
        ValueError: for a wrapped model, layers that it does not have, or another hidden size.
    """
    stock = unwrap(model)
    if stock is not model:
        raise ValueError("Cannot edit a wrapped model: merge it first (PEFT: merge_and_unload).")
    check_layers(stock, basis, SteeringVector({i: rows[0] for i, rows in basis.items()}))
    linears = {layer: _last_linear(steered_modules(stock)[layer]) for layer in basis}
    for layer, linear in linears.items():
        rows = basis[layer].to(linear.weight.device, torch.float32)
        for part in (linear.weight, linear.bias):
            if part is not None:
                part.sub_((rows.T @ (rows @ part.float())).to(part.dtype))
    return stock


def upper_half(model: nn.Module) -> list[int]:
    """The layers that Nullu edits: the upper half of the decoder (16 to 31 of 32)."""
    count = len(decoder_layers(model))
    return list(range(count // 2, count))
