"""Vision modeling (FiVL, arXiv 2412.14672, section 4): image positions must predict words.

The loss is the cross-entropy of the head's logits *at* each labelled image position (no shift)
against that position's vision label. Logits are computed where a label stands and nowhere else, for
both losses. Not a trainer: call `combined_loss` from `Trainer.compute_loss`. It serves native
classes too; TRL's trainers replace `model.forward`, so a loss inside `forward` would be ignored.

    loss, language, vision = combined_loss(model, batch, vision_weight=0.1)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .families import image_grids, image_mask, unwrap

IGNORE = -100


class CombinedLoss(NamedTuple):
    """Scalars: `loss` = (1 - vision_weight) * `language` + vision_weight * `vision`."""

    loss: torch.Tensor
    language: torch.Tensor
    vision: torch.Tensor


def vision_modeling_loss(
    hidden: torch.Tensor,
    vision_labels: torch.Tensor,
    head_weight: torch.Tensor | nn.Module,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy at the labelled positions, in nats: 0 (perfect) upwards.

    Args:
        hidden: [B, T, D], the backbone's last hidden state.
        vision_labels: int64 [B, T]; the token id that the position must predict, -100 for none.
        head_weight: [V, D], or the head as a module ([n, D] -> [n, V]).
        num_items: what the sum is divided by. None: the labelled positions of this batch. With
            gradient accumulation pass the labelled positions of the whole accumulated batch, so
            that the losses of its parts add up to the loss of the whole.

    Returns:
        A float32 scalar; 0 (with zero gradients) where no position is labelled.

    Raises:
        ValueError: when the labels do not lie on the positions of `hidden`.
    """
    if vision_labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"vision_labels has shape {tuple(vision_labels.shape)} but hidden has positions "
            f"{tuple(hidden.shape[:2])}. Give one label (or -100) for each input position."
        )
    return _cross_entropy(hidden, vision_labels, head_weight, num_items)


def language_modeling_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head_weight: torch.Tensor | nn.Module,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each label against the position before it: what `model(labels=...)` gives.

    Arguments as in `vision_modeling_loss`; `labels` is int64 [B, T], -100 for none.
    """
    return _cross_entropy(hidden[:, :-1], labels[:, 1:], head_weight, num_items)


def _cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: torch.Tensor | nn.Module,
    num_items: int | torch.Tensor | None,
) -> torch.Tensor:
    labels = labels.to(hidden.device)
    labelled = labels != IGNORE
    logits = _read(hidden[labelled], head)
    total = F.cross_entropy(logits.float(), labels[labelled], reduction="sum")
    return total / (max(len(logits), 1) if num_items is None else num_items)


def _read(hidden: torch.Tensor, head: torch.Tensor | nn.Module) -> torch.Tensor:
    """Logits in the head's dtype, which differs from that of `hidden` under autocast."""
    if isinstance(head, nn.Module):
        return head(hidden.to(next(head.parameters()).dtype))
    return F.linear(hidden.to(head.dtype), head)


def combined_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision_weight: float = 0.1,
    num_items: int | torch.Tensor | None = None,
    num_vision_items: int | torch.Tensor | None = None,
) -> CombinedLoss:
    """Language and vision modeling from one forward pass, mixed as (1 - w) L_LM + w L_VM.

    The model is called as it is, through PEFT or DistributedDataParallel; hooks read its backbone
    and add the vision loss inside that call, so that all gradients are synchronised. The factor
    (1 - w) stays also for batches without vision labels: no batch is scaled differently.

    Args:
        model: a supported vision-language model, native or grounded, wrapped or not.
        inputs: the batch: input_ids, labels, vision_labels (int64 [B, T]), pixel_values ...
        vision_weight: w in [0, 1]; FiVL trains with 0.1. At 0 the loss is the language loss.
        num_items: language labels of the whole accumulated batch (`num_items_in_batch`).
        num_vision_items: vision labels of the whole accumulated batch.

    Raises:
        ValueError: for a family without image positions, a batch without labels, or vision labels
            at positions that hold no image token.
    """
    _check(model, inputs, vision_weight)
    inputs = {**inputs, "use_cache": False, "logits_to_keep": 1}  # its logits are not used
    labels, vision_labels = inputs.pop("labels"), inputs.pop("vision_labels")
    base = unwrap(model)
    found: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        device = output[0].device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        found.update(hidden=output[0], device=device, autocast=autocast)

    def mix(module: nn.Module, args: Any, output: Any) -> Any:
        hidden, (enabled, dtype) = found["hidden"], found["autocast"]
        with torch.autocast(found["device"], dtype, enabled):  # as inside of forward
            language = language_modeling_loss(
                hidden, labels, base.get_output_embeddings(), num_items
            )
            vision = vision_modeling_loss(
                hidden, vision_labels, vision_head(base), num_vision_items
            )
        output["loss"] = (1 - vision_weight) * language + vision_weight * vision
        found["parts"] = language, vision
        return output

    handles = [base.base_model.register_forward_hook(keep), base.register_forward_hook(mix)]
    try:
        loss = model(**inputs).loss
    finally:
        for handle in handles:
            handle.remove()
    return CombinedLoss(loss, *found["parts"])


def _check(model: nn.Module, inputs: Mapping[str, Any], vision_weight: float) -> None:
    if not 0 <= vision_weight <= 1:
        raise ValueError(f"vision_weight is {vision_weight}; it must lie in [0, 1].")
    missing = {"input_ids", "labels", "vision_labels"} - set(inputs)
    if missing:
        raise ValueError(f"The batch lacks {sorted(missing)}. Make it with VisionLabelCollator.")
    on_image = image_mask(model, inputs["input_ids"])
    if bool(((inputs["vision_labels"] != IGNORE) & ~on_image).any()):
        raise ValueError(
            "A vision label lies at a position without image token. Labels and input_ids must be "
            "padded on the same side, and the batch must not be truncated."
        )


def vision_head(model: nn.Module) -> nn.Module:
    """The head that reads image positions: the model's own vision head, else its `lm_head`."""
    base = unwrap(model)
    return dict(base.named_children()).get("vision_head") or base.get_output_embeddings()


def vision_logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """What each image position predicts: [B, R * C, V], in the model's dtype, row by row.

    Args:
        model: a supported vision-language model; `inputs` hold exactly one image a row, and all
            images have the same grid.

    Raises:
        ValueError: when a row does not hold exactly the R * C image tokens of one image.
    """
    base = unwrap(model)
    mask, grids = image_mask(base, inputs["input_ids"]), image_grids(base.config, inputs)
    if len(set(grids)) != 1 or not bool((mask.sum(-1) == grids[0][0] * grids[0][1]).all()):
        raise ValueError(
            f"Rows hold {mask.sum(-1).tolist()} image tokens of grids {grids}. Pass one image a "
            "row, not split into tiles, and images of one grid together."
        )
    hidden = base.base_model(**inputs)[0]
    return _read(hidden[mask].view(len(mask), -1, hidden.shape[-1]), vision_head(base))
