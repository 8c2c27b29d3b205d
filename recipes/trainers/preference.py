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

import contextlib
import copy
import functools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import hash_module

from firsthand.modeling.families import family_of, projector, unwrap
from firsthand.processing.corruptions import Corruption
from firsthand.recipes.trainers import image_preference as terms
from firsthand.recipes.trainers.image_preference import HAS_IMAGE, REFERENCE, TEXT_INPUTS, WEIGHT
from firsthand.recipes.trainers.preference_collator import Images, SharedImageCollator
from firsthand.recipes.trainers.shared_prefix import IGNORE, additive, pack, unpack

BOTH_WAYS = ("gemma3", "paligemma")  # families whose mask is not causal everywhere
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass
class SharedImageDPOConfig(DPOConfig):
    """DPOConfig, what is shared, and what SIMA's successors add (all off)."""

    share_prefix: bool = field(
        default=True, metadata={"help": "run prompt and image once for both answers"}
    )
    precompute_reference: bool = field(
        default=True,
        metadata={"help": "reference log-probabilities before training, also of images"},
    )
    image_preference_weight: float = field(
        default=0.0, metadata={"help": "of mDPO's term on a corrupted image; 0 is off"}
    )
    corruption: Corruption = field(
        default="crop", metadata={"help": "crop, diffusion, mask, other or blank"}
    )
    corruption_seed: int = field(default=0, metadata={"help": "decides every corrupted image"})
    anchor_weight: float = field(
        default=0.0, metadata={"help": "of the chosen answer's anchor; 0 is off"}
    )
    anchor_delta: float = field(default=0.0, metadata={"help": "reward that anchors divide at"})
    anchor_rejected: bool = field(
        default=False, metadata={"help": "anchor the rejected answer too, on the other side"}
    )
    image_reference_weight: float = field(
        default=1.0, metadata={"help": "gamma of V-DPO's image-weighted reference; 1 is off"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corruption not in get_args(Corruption):
            names = ", ".join(get_args(Corruption))
            raise ValueError(f"corruption is {self.corruption!r}; it must be one of {names}")
        for name in ("image_preference_weight", "anchor_weight"):
            if not 0 <= (value := self.__dict__[name]) < math.inf:
                raise ValueError(f"{name} is {value}; it must be at least 0")


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
    elif family.qformer is not None:
        reason = "its image is read by a Q-Former, with inputs of its own"
    elif family.model_type in BOTH_WAYS:
        reason = "its prompt or its image tokens are read in both directions"
    if reason:
        raise ValueError(
            f"{kind!r} cannot train with shared images: {reason}. Use trl.DPOTrainer for it "
            "(the recipe's `stock`)."
        )


def share(model: Any, pad_id: int, images: SharedImages, prefix: bool) -> None:
    """Make TRL's fused forward of a model take B images for 2B rows, and pack them if wanted.

    With `pairs=False` the rows are no pairs: as many images as rows, nothing packed.
    """
    inner: Callable = model.forward

    @functools.wraps(inner)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None,
        pairs: bool = True, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head:
            return (
                inner(*args, labels=labels, **kwargs)
                if labels is not None
                else inner(*args, **kwargs)
            )
        rest = {name: kwargs.pop(name) for name in list(kwargs) if name not in TEXT_INPUTS}
        if rest.get("pixel_values") is not None:
            kwargs["mm_encoder_outputs"] = images.of(self, rest)
        if not (prefix and pairs):
            if pairs and "mm_encoder_outputs" in kwargs:
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
    too); a text-only data set is trained as TRL does. The terms of image_preference.py are added to
    the loss, and logged as `image_preference` and `anchor`. A column `weight` multiplies all that a
    pair adds: sum(w l) / B.

    Raises:
        ValueError: for a family that is not in `modeling/families.py`, or whose prefix cannot be
            shared, with the reason; rows without `prompt`, `chosen` or `rejected`; weights below 0;
            options that exclude each other, or a loss that is no mean over pairs with `weight`; a
            collator of one's own.
        TypeError: for `args` that are no SharedImageDPOConfig.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        args = args or SharedImageDPOConfig("dpo")
        if not isinstance(args, SharedImageDPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; it must be a SharedImageDPOConfig")
        dataset = kwargs.get("train_dataset")
        self.images = SharedImages()
        columns = list(getattr(dataset, "column_names", None) or ())
        vision = bool({"image", "images"} & set(columns))
        _check_options(args, columns, vision)
        if vision:
            _check_columns(columns)
            if not isinstance(model, str):
                check_shareable(model)
            if kwargs.get("data_collator") is not None:
                raise ValueError("rows with images need the trainer's own data_collator; give none")
            if kwargs.get("processing_class") is None:
                name = model if isinstance(model, str) else model.config.name_or_path
                kwargs["processing_class"] = AutoProcessor.from_pretrained(
                    name, trust_remote_code=args.trust_remote_code
                )
            kwargs["data_collator"] = _collator(args, kwargs["processing_class"], dataset)
        own_reference = self._own_reference(model, ref_model, args, kwargs.get("peft_config"))
        super().__init__(model, own_reference or ref_model, args, **kwargs)
        if not vision:
            return
        models: list[Any] = [one for one in (self.model, self.ref_model) if one is not None]
        check_shareable(models[0])
        for one in models:
            share(unwrap(one), self._tokenizer.pad_token_id, self.images, args.share_prefix)
        for one in self._datasets():
            _check_weights(one, args.loss_type)
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

    def _datasets(self) -> list[Any]:
        held = self.eval_dataset
        found = list(held.values()) if isinstance(held, dict) else [held]
        return [one for one in (self.train_dataset, *found) if one is not None]

    def _precompute(self, drop_reference: bool) -> None:
        """Add the reference's log-probabilities to the data sets; cached on disk as TRL does."""
        model: Any = self.ref_model or self.model
        self._model_hash = hash_module(model)
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
        """The data set and what the reference says: of its rows, with other images, with none."""
        args: Any = self.args
        found = [self._asked(dataset, name, "shown")]
        if args.image_preference_weight:
            more = self._asked(dataset, name, "corrupted").select_columns(REFERENCE[0])
            found.append(more.rename_column(REFERENCE[0], terms.REFERENCE_CORRUPTED))
        if args.image_reference_weight != 1:
            more = self._asked(dataset, name, "none").select_columns(list(REFERENCE))
            names = dict(zip(REFERENCE, terms.REFERENCE_BARE, strict=True))
            found.append(more.rename_columns(names))
        return concatenate_datasets(found, axis=1)

    def _asked(self, dataset: Any, name: str, images: Images) -> Any:
        """The data set with TRL's columns of the reference, of the rows with certain images."""
        args: Any = self.args
        collator: Any = self.data_collator
        shown = replace(collator, images=images)
        self._precompute_model_hash = Hasher.hash((self._model_hash, *_settings(args, shown)))
        size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        with _while(self, data_collator=shown):
            return self._precompute_ref_logps(dataset, name, size)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """As TRL's; what a batch holds for our terms alone is not shown to the model."""
        return super().compute_ref_log_probs(
            model, {name: value for name, value in inputs.items() if not terms.own(name)}
        )

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's loss, and the terms that are on."""
        args: Any = self.args
        rest = {name: value for name, value in inputs.items() if not terms.own(name)}
        weight, gamma = inputs.get(WEIGHT), args.image_reference_weight
        adds = args.image_preference_weight or args.anchor_weight
        plain = weight is None and gamma == 1 and not adds
        if REFERENCE[0] not in rest and (self.precompute_ref_logps or not plain):
            asked = self.compute_ref_log_probs(self._reference(), rest)
            rest |= dict(zip(REFERENCE, asked, strict=True))
        if plain:
            return super()._compute_loss(model, rest, return_outputs)
        reference = [rest[name] for name in REFERENCE]
        if gamma != 1:
            rest |= self._image_weighted(rest, inputs)
        answers: list[Tensor] = []

        def recorded(**settings: Any) -> Any:
            found = model(**settings)
            if not answers:
                answers.extend(found.log_probs.sum(1).chunk(2))
                if weight is not None:
                    terms.weigh(found, settings["labels"], weight, args.use_weighting)
            return found

        weighted = args.use_weighting or weight is not None
        hinge = weight is not None and "hinge" in self.loss_types
        copies = terms.vectors_kept() if hinge else contextlib.nullcontext()
        with _while(self, precompute_ref_logps=True, use_weighting=weighted), copies:
            found = super()._compute_loss(recorded, rest, return_outputs)
        if not adds:
            return found
        chosen, rejected = (a - r for a, r in zip(answers, reference, strict=True))
        more = self._terms(model, inputs, chosen, rejected)
        return (found[0] + more, found[1]) if return_outputs else found + more

    def _image_weighted(self, rest: Any, inputs: Any) -> dict[str, Tensor]:
        """V-DPO's reference, from what it says with and without images."""
        if terms.REFERENCE_BARE[0] not in inputs:
            raise ValueError(
                "these rows do not hold what the reference says without images; give them as "
                "eval_dataset when the trainer is made"
            )
        gamma = cast(SharedImageDPOConfig, self.args).image_reference_weight
        return {
            name: terms.image_weighted(rest[name], inputs[bare], gamma)
            for name, bare in zip(REFERENCE, terms.REFERENCE_BARE, strict=True)
        }

    def _terms(self, model: Any, inputs: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The weighted sum of the terms that are on, for the answers' deltas."""
        args: Any = self.args
        found = []
        if args.anchor_weight:
            other = rejected if args.anchor_rejected else None
            one = terms.anchor(chosen, self.beta, args.anchor_delta, other)
            found.append(("anchor", args.anchor_weight, one))
        if args.image_preference_weight:
            rows, corrupted = self._corrupted(model, inputs)
            one = terms.image_preference(chosen[rows], corrupted, self.beta)
            one = torch.zeros_like(chosen).index_copy(0, rows, one * inputs[HAS_IMAGE][rows])
            found.append(("image_preference", args.image_preference_weight, one))
        weight = inputs[WEIGHT] if WEIGHT in inputs else torch.ones_like(chosen)
        metrics = self._metrics["train" if model.training else "eval"]
        for name, _, one in found:
            metrics[name].append(self.accelerator.gather(one.detach()).mean().item())
        return torch.stack([scale * (weight * one).mean() for _, scale, one in found]).sum()

    def _corrupted(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Pairs with images, and their chosen answers' deltas given the corrupted ones, [R]."""
        rows, batch = terms.corrupted_rows(inputs)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
        asked = {name: value for name, value in batch.items() if name != "completion_mask"}
        found = model(**asked, labels=labels, use_cache=False, fused_lm_head=True, pairs=False)
        if terms.REFERENCE_CORRUPTED in inputs:
            reference = inputs[terms.REFERENCE_CORRUPTED][rows]
        else:
            single = functools.partial(self._reference(), pairs=False)
            reference = torch.cat(self.compute_ref_log_probs(single, batch))
        return rows, found.log_probs.sum(1) - reference

    def _reference(self) -> Any:
        """The model that the reference is, now; TRL switches its adapter."""
        if self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                "the reference was asked before training and is gone, and these rows do not hold "
                "what it says; give them as eval_dataset when the trainer is made"
            )
        return self.ref_model or self.model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(name for name in terms.COLUMNS if name not in columns)


@contextlib.contextmanager
def _while(holder: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object, set for a while."""
    before = {name: holder.__dict__[name] for name in values}
    holder.__dict__.update(values)
    try:
        yield
    finally:
        holder.__dict__.update(before)


def _collator(args: SharedImageDPOConfig, processor: Any, dataset: Any) -> SharedImageCollator:
    """The collator of a data set; that of `other` can look into all of its images."""
    pad: Any = args.pad_to_multiple_of
    collator = SharedImageCollator(processor, args.max_length, pad)
    if not args.image_preference_weight:
        return collator
    others = None
    if args.corruption == "other":
        if not isinstance(dataset, Dataset):
            raise ValueError("corruption 'other' needs rows by number; a stream of rows has none")
        others = dataset.select_columns(
            [name for name in ("image", "images") if name in dataset.column_names]
        )
    return replace(
        collator, images="both", corruption=args.corruption, seed=args.corruption_seed,
        others=others,
    )  # fmt: skip


def _settings(args: Any, collator: SharedImageCollator) -> list[Any]:
    """What else than model and rows decides the reference's log-probabilities."""
    processor: Any = collator.processor
    found = [args.max_length, args.ld_alpha, collator.images]
    found += [processor.image_processor.to_json_string(), processor.chat_template]
    if collator.images == "corrupted":
        found += [collator.corruption, collator.seed]
        found.append(collator.others._fingerprint if collator.others is not None else None)
    return found


def _check_columns(columns: list[str]) -> None:
    if missing := {"prompt", "chosen", "rejected"} - set(columns):
        raise ValueError(
            f"the data set has no column {', '.join(sorted(missing))}; preference rows with images "
            "need prompt, chosen and rejected (TRL's conversational format)"
        )


def _check_options(args: SharedImageDPOConfig, columns: list[str], vision: bool) -> None:
    """Raise ValueError for options that cannot be followed."""
    image, gamma = args.image_preference_weight, args.image_reference_weight
    on = [name for name, here in (
        ("image_preference_weight", image), ("anchor_weight", args.anchor_weight),
        ("image_reference_weight", gamma != 1), ("the column `weight`", WEIGHT in columns),
    ) if here]  # fmt: skip
    if on and not vision:
        raise ValueError(f"{on[0]} needs rows with a column image or images; the data set has none")
    if args.ld_alpha is not None and (image or args.anchor_weight):
        raise ValueError(f"{on[0]} and ld_alpha exclude each other; unset one")
    if gamma != 1 and not args.precompute_reference:
        raise ValueError(
            f"image_reference_weight {gamma} needs what the reference says without images, which "
            "is asked before training only; set precompute_reference"
        )
    if vision and args.sync_ref_model and args.precompute_reference:
        raise ValueError(
            "sync_ref_model moves the reference, so what it says cannot be asked before training; "
            "unset precompute_reference"
        )


def _check_weights(dataset: Any, losses: list[str]) -> None:
    if not isinstance(dataset, Dataset) or WEIGHT not in dataset.column_names:
        return
    for loss in terms.NOT_BY_PAIR:
        if loss in losses:
            raise ValueError(
                f"the data set has a column `weight`, but loss_type {loss!r} is no mean over "
                "pairs, so a pair cannot be weighted in it; remove the column or the loss"
            )
    weights = np.asarray(dataset[WEIGHT], dtype=float)
    if bad := np.flatnonzero(~np.isfinite(weights) | (weights < 0)).tolist():
        raise ValueError(
            f"row {bad[0]} has the weight {weights[bad[0]]}; a weight is a number of at least 0"
        )
