"""What SIMA's successors add to DPO: image-side preference, anchors, image-weighted reference.

What it is: the terms, each a plain function of log-probabilities, and weights of single pairs. What
it is not: a trainer (preference.py), or TRL's own losses, which stay TRL's.

    image_preference(chosen, chosen_given_the_corrupted_image, beta)
    anchor(chosen, beta, delta=0.0)

A delta, as everywhere here, is a sum over an answer's tokens: the policy's log-probability minus
the reference's, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firsthand.recipes.trainers.shared_prefix import IGNORE

CORRUPTED = "corrupted_"  # before the names of a corrupted image's inputs
HAS_IMAGE = "has_image"
WEIGHT = "weight"
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
REFERENCE_CORRUPTED = "ref_corrupted_logps"
REFERENCE_BARE = ("ref_bare_chosen_logps", "ref_bare_rejected_logps")
OURS = (REFERENCE_CORRUPTED, *REFERENCE_BARE, WEIGHT)
COLUMNS = (*REFERENCE, *OURS)
TEXT_INPUTS = {"input_ids", "attention_mask", "completion_mask", "use_cache", "labels"}
NOT_BY_PAIR = ("aot", "aot_unpaired", "sft")  # losses that are no mean over pairs


def image_preference(chosen: Tensor, corrupted: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (d(y_w | m) - d(y_w | m'))): the answer fits this image, not that one.

    mDPO's conditional preference (arXiv 2406.11839), with any corruption m' of the image m.

    Args:
        chosen: [B], the delta of the chosen answer.
        corrupted: [B], its delta given the corrupted image.
        beta: as DPO's.

    Returns:
        [B], at least 0.
    """
    return -F.logsigmoid(beta * (chosen - corrupted))


def anchor(chosen: Tensor, beta: float, delta: float, rejected: Tensor | None = None) -> Tensor:
    """-log sigmoid(beta d(y_w) - delta): the chosen answer must not become less likely.

    mDPO's anchor (arXiv 2406.11839). With `rejected` also -log sigmoid(delta - beta d(y_l)), the
    other side, as OPA-DPO has it (arXiv 2501.09695).

    Args:
        chosen, rejected: [B], the answers' deltas.
        beta: as DPO's.
        delta: the reward that divides them; 0 is the reference's own.

    Returns:
        [B], at least 0.
    """
    loss = -F.logsigmoid(beta * chosen - delta)
    return loss if rejected is None else loss - F.logsigmoid(delta - beta * rejected)


def image_weighted(reference: Tensor, bare: Tensor, gamma: float) -> Tensor:
    """ref(y | v) - (gamma - 1) (ref(y | v) - ref(y | no image)), V-DPO's static guidance.

    V-DPO (arXiv 2411.02712) adds (gamma - 1) (log p(y | v) - log p(y | no image)) to the reward;
    with p the reference this is DPO against the reference above. Below 1, an answer that owes more
    to the image has a more likely reference: it must be learnt better to win. 1 changes nothing.

    Args:
        reference, bare: [B], log-probabilities with and without the row's images.
    """
    return reference - (gamma - 1) * (reference - bare)


def weigh(found: Any, labels: Tensor, weight: Tensor, weighted: bool) -> None:
    """Make TRL multiply the loss of every pair by its weight: sum(w l) / B.

    TRL's own weights of pairs (`use_weighting`, WPO) are exp of a mean over the tokens of log p -
    log_sum_sq_probs, chosen and rejected multiplied, and hold for every loss that is a mean over
    pairs. log_sum_sq_probs is set here so that they are `weight`, or WPO's times `weight`.

    Args:
        found: the fused head's output for 2B rows; its `log_sum_sq_probs` is replaced.
        labels: [2B, L], -100 outside of the answers.
        weight: [B], at least 0.
        weighted: whether WPO's weights are wanted too.
    """
    base = found.log_sum_sq_probs if weighted else found.log_probs.detach()
    log = torch.cat([weight.log(), torch.zeros_like(weight)])[:, None].to(base)
    found.log_sum_sq_probs = torch.where(labels[:, 1:] != IGNORE, base - log, base)


def vectors_kept() -> Any:
    """A context in which vectors that backward needs are copied, so that they may change.

    TRL multiplies weights into a loss in place; relu, alone of its losses, still needs that vector.
    """
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.clone() if saved.dim() == 1 else saved, lambda kept: kept
    )


def own(name: str) -> bool:
    """Whether an input of a batch is ours: neither TRL's nor the model's."""
    return name.startswith(CORRUPTED) or name == HAS_IMAGE or name in OURS


def corrupted_rows(inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Prompt and chosen answer of the pairs that have images, with the corrupted ones.

    Where no pair has an image the first one stands in (all processes must call the model equally
    often); it has no term.

    Returns:
        The pairs' numbers, [R], and a batch of R rows, not 2R.
    """
    rows = inputs[HAS_IMAGE].nonzero()[:, 0]
    if not len(rows):
        rows = torch.zeros_like(inputs[HAS_IMAGE][:1], dtype=torch.long)
    text = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: inputs[name][rows] for name in text}
    images = {n.removeprefix(CORRUPTED): v for n, v in inputs.items() if n.startswith(CORRUPTED)}
    return rows, batch | images
