"""The trainer for vision modeling (FiVL, arXiv 2412.14672, section 4).

`transformers.Trainer` with the loss (1 - w) * language + w * vision, both divided by the labels of
the whole accumulated batch on all devices: 1 x 8 rows and 8 x 1 rows make the same update. What it
is not: a data pipeline (`VisionLabelCollator`) or a recipe (`recipes/train_vision_modeling.py`).

    trainer = VisionModelingTrainer(model, VisionModelingConfig("out"), collator, dataset)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from firsthand.modeling.families import family_of, projector, unwrap
from firsthand.modeling.vision_modeling import IGNORE, combined_loss

Train = Literal["full", "lora", "projector"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class VisionModelingConfig(TrainingArguments):
    """TrainingArguments, and what vision modeling adds."""

    vision_weight: float = field(
        default=0.1, metadata={"help": "w in [0, 1]; 0.1 in FiVL, 0 trains language only"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "samples go to the collator as they are"}
    )
    prediction_loss_only: bool = field(
        default=True,
        metadata={"help": "evaluation gives the loss alone"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.vision_weight <= 1:
            raise ValueError(f"vision_weight is {self.vision_weight}; it must lie in [0, 1]")


class VisionModelingTrainer(Trainer):
    """Trains on batches of `VisionLabelCollator`; logs `language_loss` and `vision_loss` too.

    Args:
        model: a supported vision-language model, native or grounded, with or without PEFT.
        args: a VisionModelingConfig.
        data_collator: a VisionLabelCollator.
        train_dataset: grounded samples; other arguments are `transformers.Trainer`'s.
    """

    args: VisionModelingConfig
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that the language labels are counted
        self._vision_items: torch.Tensor | None = None
        self._parts = torch.zeros(2)
        self._updates = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of one update, with the language labels in them; counts the vision labels."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        count = sum(int((b["vision_labels"] != IGNORE).sum()) for b in batches)
        self._updates += 1
        self._vision_items = self._over_devices(torch.tensor(count)).clamp(min=1)
        return batches, items

    def _over_devices(self, count: torch.Tensor) -> torch.Tensor:
        count = count.to(self.args.device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The combined loss of a batch; without `num_items_in_batch` (evaluation) its own mean."""
        vision_items = None if num_items_in_batch is None else self._vision_items
        parts = combined_loss(
            model, inputs, self.args.vision_weight, num_items_in_batch, vision_items
        )
        loss = parts.loss
        if num_items_in_batch is not None:
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * scale
            both = torch.stack([parts.language, parts.vision]).detach().float() * scale
            self._parts = self._parts.to(both.device) + both
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer; logs of training get the means of both losses since the last ones."""
        if "loss" in logs and self._updates:
            parts = self.accelerator.reduce(self._parts, reduction="mean") / self._updates
            logs["language_loss"], logs["vision_loss"] = (round(x, 4) for x in parts.tolist())
            self._parts, self._updates = torch.zeros(2), 0
        super().log(logs, *args, **kwargs)


def language_linear(model: Any, layers: Sequence[str] = LINEAR) -> str:
    """A pattern of the names of the language model's linear layers, for `LoraConfig`.

    Of mPLUG-Owl2's pairs, one for text and one for images, both are meant.
    """
    modules = [name for name, _ in unwrap(model).named_modules()]
    paired = {name.split(".")[-3] for name in modules if name.endswith(".multiway.1")}
    names = [rf"{name}\.multiway\.\d" if name in paired else name for name in layers]
    return rf".*\b{re.escape(family_of(model).language_model)}\..*\.({'|'.join(names)})"


def make_trainable(
    model: Any, train: Train, lora_rank: int = 16, lora_projector: bool = True
) -> Any:
    """`model` with the right weights trainable and all others frozen; the vision encoder always is.

    A separate vision head is trained with each of them.

    Args:
        model: a supported vision-language model, without PEFT.
        train: "full" (language model and projector), "lora" (LoRA on the language model's linear
            layers, and the projector) or "projector".
        lora_rank: rank of LoRA; its alpha is twice the rank.
        lora_projector: whether "lora" trains the projector too; an adapter without it is small.

    Returns:
        The model, for "lora" as a PeftModel.

    Raises:
        ValueError: for another `train`.
    """
    if train not in get_args(Train):
        raise ValueError(f"train is {train!r}; it must be one of {', '.join(get_args(Train))}")
    family, base = family_of(model), unwrap(model)
    heads = [name for name, _ in base.named_children() if name == "vision_head"]
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        saved = heads + ([family.projector] if lora_projector else [])
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            target_modules=language_linear(model),
            modules_to_save=saved or None,
        )
        return get_peft_model(model, config)
    model.requires_grad_(train == "full")
    base.base_model.get_submodule(family.vision_tower).requires_grad_(False)
    for module in [projector(model)] + [base.get_submodule(name) for name in heads]:
        module.requires_grad_(True)
    return model


def set_precision(model: Any, bf16: bool) -> None:
    """float32 throughout; with bf16 only what is trained, and the rest stays as it was stored."""
    if not bf16:
        model.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
