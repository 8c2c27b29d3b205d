"""Preference training that encodes an image once: TRL's DPOTrainer, faster and not different.

What it is: `DPOTrainer` with three savings that change no number: each image of a pair is encoded
once and shared by chosen, rejected and reference; prompt and image run once for both answers
(shared_prefix.py); and the reference's log-probabilities are computed before training, which TRL
refuses for images. Losses, metrics and options are TRL's own. What it is not: a pipeline that makes
pairs.

    trainer = SharedImageDPOTrainer(
        model, args=SharedImageDPOConfig("out"), train_dataset=pairs,
        processing_class=processor, peft_config=LoraConfig(...),
    )
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference, hash_module

from firsthand.modeling.families import family_of, projector, unwrap
from firsthand.recipes.trainers.shared_prefix import additive, pack, unpack

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEXT_INPUTS = {"input_ids", "attention_mask", "completion_mask", "use_cache", "labels"}


@dataclass
class SharedImageDPOConfig(DPOConfig):
    """DPOConfig, and what is shared."""

    share_prefix: bool = field(
        default=True, metadata={"help": "run prompt and image once for both answers"}
    )
    precompute_reference: bool = field(
        default=True,
        metadata={"help": "reference log-probabilities before training, also of images"},
    )


@dataclass
class SharedImageCollator(DataCollatorForVisionPreference):
    """TRL's vision collator, with every image processed once: text has 2B rows, images B.

    Rows with `ref_chosen_logps` and `ref_rejected_logps` keep them.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [dict(example) for example in examples]
        known = REFERENCE[0] in rows[0]
        reference = {name: [row.pop(name) for row in rows] for name in REFERENCE if known}
        for row in rows:
            if "image" in row:
                row["images"] = [row.pop("image")]
        collated = _once(self, rows)
        return dict(collated) | {name: torch.tensor(v) for name, v in reference.items()}


def _once(collator: SharedImageCollator, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What TRL's collator gives, but its processor is shown the images of the first B rows only."""
    processor = collator.processor

    class Once:
        """The processor; of doubled images and prompts it processes the first half."""

        tokenizer = processor.tokenizer
        apply_chat_template = processor.apply_chat_template

        def __call__(self, images: Any = None, text: Any = None, **settings: Any) -> Any:
            if images is None:
                return processor(text=text, **settings)
            half = len(text) // 2
            found = processor(images=images[:half], text=text[:half], **settings)
            for name in ("input_ids", "attention_mask"):
                found[name] = found[name].repeat(2, 1)
            return found

    once: Any = Once()
    plain = DataCollatorForVisionPreference(
        once, collator.max_length, collator.pad_to_multiple_of, collator.return_tensors
    )
    return plain.torch_call(rows)


class SharedImages:
    """The encoded images of the batch at hand, for all models that encode them equally."""

    def __init__(self) -> None:
        self.pixels: Any = None
        self.features: Any = None

    def of(self, model: Any, images: dict[str, Any]) -> Any:
        """`mm_encoder_outputs` of the images; frozen encoders are asked once for equal pixels."""
        shared = not encoder_trains(model)
        pixels = images["pixel_values"]
        if shared and self.pixels is pixels:
            return self.features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not shared):
            found = model.get_image_features(**images, return_dict=True)
        found.hidden_states = found.attentions = None
        features = {"image": found}
        if shared:
            self.pixels, self.features = pixels, features
        return features


def encoder_trains(model: nn.Module) -> bool:
    """Whether any weight of vision encoder or projector, or an adapter in them, is trained."""
    base = unwrap(model)
    tower = base.base_model.get_submodule(family_of(base).vision_tower)
    parts = [*tower.parameters(), *projector(base).parameters()]
    return any(parameter.requires_grad for parameter in parts)


def check_shareable(model: nn.Module) -> None:
    """Raise ValueError, naming the model and the reason, where a prefix cannot be shared."""
    base = unwrap(model)
    family, text = family_of(base), base.config.get_text_config()
    kind = base.config.model_type
    reason = None
    if "mrope_section" in (text.to_dict().get("rope_parameters") or {}):
        reason = "its positions have three axes (mRoPE), which a packed row cannot carry"
    elif set(text.to_dict().get("layer_types") or ()) - {"full_attention"}:
        reason = "some of its layers see a window or a state, not all that a mask allows"
    elif "flash" in str(text._attn_implementation):
        reason = f"{text._attn_implementation} takes no mask of its own; load it with sdpa"
    elif family.grids is not None:
        reason = "its images have shapes of their own"
    if reason:
        raise ValueError(
            f"{kind!r} cannot train with shared images: {reason}. Use trl.DPOTrainer for it."
        )


def share(model: Any, pad_id: int, images: SharedImages, prefix: bool) -> None:
    """Make TRL's fused forward of a model take B images for 2B rows, and pack them if wanted."""
    inner: Callable = model.forward

    @functools.wraps(inner)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return (
                inner(*args, labels=labels, **kwargs)
                if labels is not None
                else inner(*args, **kwargs)
            )
        rest = {name: kwargs.pop(name) for name in list(kwargs) if name not in TEXT_INPUTS}
        if rest.get("pixel_values") is not None:
            kwargs["mm_encoder_outputs"] = images.of(self, rest)
        if not prefix:
            if "mm_encoder_outputs" in kwargs:
                kwargs["mm_encoder_outputs"] = doubled(kwargs["mm_encoder_outputs"])
            return inner(*args, fused_lm_head=True, labels=labels, **kwargs)
        ids, attended = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        packed = pack(ids, attended, labels, pad_id)
        eager = self.config.get_text_config()._attn_implementation == "eager"
        mask = additive(packed.mask, self.dtype) if eager else packed.mask
        found = inner(
            input_ids=packed.input_ids, attention_mask=mask, position_ids=packed.position_ids,
            shift_labels=packed.shift_labels, fused_lm_head=True, **kwargs,
        )  # fmt: skip
        for name in PER_TOKEN:
            if found.get(name) is not None:
                found[name] = unpack(found[name], packed, ids.shape[1])
        return found

    model.forward = types.MethodType(forward, model)


def doubled(features: dict[str, Any]) -> dict[str, Any]:
    """The features of B rows' images for 2B rows that repeat them."""
    output = copy.copy(features["image"])
    one = output["pooler_output"]
    output["pooler_output"] = torch.cat([one, one]) if torch.is_tensor(one) else [*one, *one]
    return {"image": output}


class SharedImageDPOTrainer(DPOTrainer):
    """DPOTrainer for vision-language models; arguments are TRL's.

    Loss, log-probabilities, metrics and gradients are those of TRL's trainer (dropout is off there
    too); a text-only data set is trained as TRL does.

    Raises:
        ValueError: for a family that is not in `modeling/families.py`, or whose prefix cannot be
            shared, with the reason; rows without `prompt`, `chosen` or `rejected`.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        args = args or SharedImageDPOConfig("dpo")
        dataset, processor = kwargs.get("train_dataset"), kwargs.get("processing_class")
        self.images = SharedImages()
        columns = list(getattr(dataset, "column_names", None) or ())
        vision = bool({"image", "images"} & set(columns))
        if vision:
            _check_columns(columns)
            if not isinstance(model, str):
                check_shareable(model)
            if processor is not None and kwargs.get("data_collator") is None:
                kwargs["data_collator"] = SharedImageCollator(
                    processor, args.max_length, args.pad_to_multiple_of
                )
        own_reference = self._own_reference(model, ref_model, args, kwargs.get("peft_config"))
        super().__init__(model, own_reference or ref_model, args, **kwargs)
        if not vision:
            return
        models: list[Any] = [one for one in (self.model, self.ref_model) if one is not None]
        check_shareable(models[0])
        for one in models:
            share(unwrap(one), self._tokenizer.pad_token_id, self.images, args.share_prefix)
        if args.precompute_reference:
            self._precompute(drop_reference=ref_model is None)

    def _own_reference(self, model: Any, ref_model: Any, args: Any, peft_config: Any) -> Any:
        """A view of the untrained model, as the reference that is asked before training only."""
        full = (
            peft_config is None
            and isinstance(model, nn.Module)
            and not hasattr(model, "peft_config")
        )
        if full and ref_model is None and args.precompute_reference:
            return copy.copy(model)
        return None

    def _precompute(self, drop_reference: bool) -> None:
        """Add the reference's log-probabilities to the data sets; cached on disk as TRL does."""
        model: Any = self.ref_model or self.model
        self._precompute_model_hash = hash_module(model)
        self.train_dataset = self._with_reference(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                n: self._with_reference(d, n) for n, d in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
        self.precompute_ref_logps = True
        if drop_reference:
            self.ref_model = None

    def _with_reference(self, dataset: Any, name: str) -> Any:
        args: Any = self.args
        size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        return self._precompute_ref_logps(dataset, name, size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(name for name in REFERENCE if name not in columns)


def _check_columns(columns: list[str]) -> None:
    if missing := {"prompt", "chosen", "rejected"} - set(columns):
        raise ValueError(
            f"the data set has no column {', '.join(sorted(missing))}; preference rows with images "
            "need prompt, chosen and rejected (TRL's conversational format)"
        )
