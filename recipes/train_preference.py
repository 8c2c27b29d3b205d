"""Train a model on preferred and rejected answers about images (SIMA, arXiv 2405.15973).

What it is: preference rows, model, LoRA and `SharedImageDPOTrainer`, put together; all options of
TRL's DPOConfig hold. What it is not: a maker of preferences, or an evaluation.

    accelerate launch -m firsthand.recipes.train_preference \
        --config recipes/configs/preference.yaml --model llava-hf/llava-1.5-7b-hf --data pairs/
    firsthand train merge --adapter OUT --model llava-hf/llava-1.5-7b-hf --out merged

Rounds: `--start OUT` merges the adapter of the round before, which is the reference then, and
trains a new one on pairs of that model's answers. After a stop: `--resume_from_checkpoint true`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl import DPOTrainer
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from firsthand.processing.generation import image_tokens, special_tokens
from firsthand.recipes.inputs import keep_skipped, load_model, load_rows, usable_rows
from firsthand.recipes.launching import checkpoint_of, launch, parse_options
from firsthand.recipes.train_merge import check_adapters, merge
from firsthand.recipes.trainers.preference import SharedImageDPOConfig, SharedImageDPOTrainer
from firsthand.recipes.trainers.vision_modeling import (
    language_linear,
    make_trainable,
    set_precision,
)

Train = Literal["lora", "full"]
TURNS = ("prompt", "chosen", "rejected")
COLUMNS = ("images", *TURNS)


@dataclass
class RecipeArguments:
    """What is trained on what; configs/preference.yaml explains each."""

    config: str | None = field(default=None, metadata={"help": "YAML file of options"})
    model: str | None = field(default=None, metadata={"help": "Hub id or path; the demo model"})
    data: str | None = field(default=None, metadata={"help": "Parquet or Hub id of pairs"})
    split: str = field(default="train", metadata={"help": "split of the Hub's data set"})
    start: list[str] | None = field(
        default=None, metadata={"help": "adapters of earlier rounds, merged in order first"}
    )
    train: Train = field(default="lora", metadata={"help": "lora or full"})
    lora_rank: int = field(default=128, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=256, metadata={"help": "alpha of LoRA"})
    stock: bool = field(default=False, metadata={"help": "train with TRL's own DPOTrainer"})

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            raise ValueError(f"train is {self.train!r}; it must be one of lora, full")


def parse(arguments: Sequence[str]) -> tuple[RecipeArguments, SharedImageDPOConfig]:
    """Options from the command line over those of `--config` over the defaults.

    Raises:
        ValueError: naming the keys of the file that are no options.
    """
    return parse_options([RecipeArguments, SharedImageDPOConfig], arguments)


def problems(processor: Any, limit: int) -> Callable[[Mapping[str, Any]], str | None]:
    """A function: why a pair cannot be trained on; None where it can. Its images are decoded.

    Args:
        processor: whose special tokens must not stand in messages, and who gives image tokens.
        limit: most tokens of prompt, image tokens and the longer answer.
    """
    special = special_tokens(processor)
    sizes: dict[tuple[int, int], int] = {}

    def problem(row: Mapping[str, Any]) -> str | None:
        reason = _said(row, special) or _weight(row)
        if reason:
            return reason
        for image in row["images"]:
            image.load()
        count = tokens(row, processor, sizes)
        if count > limit:
            return (
                f"{count} tokens with its image tokens, over the {limit} of max_length or context"
            )
        return None

    return problem


def _said(row: Mapping[str, Any], special: Sequence[str]) -> str | None:
    """What is wrong with the words of a pair."""
    chosen, rejected = (text_of(row[name]) for name in ("chosen", "rejected"))
    if not row["prompt"]:
        return "the prompt is empty"
    if not chosen.strip() or not rejected.strip():
        return "an answer is empty"
    if chosen.strip() == rejected.strip():
        return "both answers are the same"
    for name in TURNS:
        if isinstance(row[name], str):
            continue  # the user's own template, which needs such tokens
        words = text_of(row[name])
        if found := next((token for token in special if token in words), None):
            return f"{name} holds the special token {found} as text"
    return None


def _weight(row: Mapping[str, Any]) -> str | None:
    weight = row.get("weight", 1.0)
    if weight is None or not 0 <= weight < math.inf:
        return f"the weight is {weight}; it must be a number of at least 0"
    return None


def tokens(row: Mapping[str, Any], processor: Any, sizes: dict[tuple[int, int], int]) -> int:
    """Tokens of prompt, images and the longer answer, as the trainer's collator makes them.

    Args:
        row: with decoded images.
        processor: asked once for each size of an image.
        sizes: tokens that an image of a size adds to its placeholder; filled here.
    """
    example = dict(row)
    if is_conversational(example):
        for name in TURNS:
            images = row["images"] if name == "prompt" else None
            example[name] = prepare_multimodal_messages(row[name], images)
        example = apply_chat_template(example, processor)
    for image in row["images"]:
        if image.size not in sizes:
            sizes[image.size] = image_tokens(processor, image.size)
    count = {name: _text_tokens(example[name], processor) for name in TURNS}
    shown = sum(sizes[image.size] for image in row["images"])
    return count["prompt"] + shown + max(count["chosen"], count["rejected"])


def _text_tokens(text: str, processor: Any) -> int:
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def text_of(turns: Any) -> str:
    """The text of a prompt or answer, plain or as messages."""
    if isinstance(turns, str):
        return turns
    parts = [message["content"] for message in turns]
    return " ".join(
        p if isinstance(p, str) else " ".join(c.get("text") or "" for c in p) for p in parts
    )


def load_pairs(data: str | None, split: str) -> Any:
    """Preference rows: Parquet on disk (a file or folder), or a data set of the Hub.

    Raises:
        ValueError: when no data is named, or a column is missing.
    """
    if data is None:
        raise ValueError("give --data: a Parquet file or folder, or a Hub id, of preference rows")
    rows = load_rows(data, split)
    missing = set(COLUMNS) - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{data} has no column {', '.join(sorted(missing))}: preference rows have "
            f"{', '.join(COLUMNS)} (TRL's conversational format)"
        )
    return rows


def check_stock(settings: SharedImageDPOConfig, rows: Any) -> None:
    """Raises ValueError where something is asked for that TRL's own trainer does not have."""
    asked = {
        "image_preference_weight": settings.image_preference_weight != 0,
        "anchor_weight": settings.anchor_weight != 0,
        "image_reference_weight": settings.image_reference_weight != 1,
        "the column weight": "weight" in rows.column_names,
    }
    if found := [name for name, on in asked.items() if on]:
        raise ValueError(f"TRL's own trainer knows no {', '.join(found)}: leave out stock or these")


def run(recipe: RecipeArguments, settings: SharedImageDPOConfig) -> DPOTrainer:
    """Train, and save the adapter (or model) and its processor into `settings.output_dir`.

    Pairs that cannot be trained on are left out and listed in `skipped.jsonl` there.

    Raises:
        ValueError: for options that exclude each other, or rows that cannot be trained on.
    """
    from peft import LoraConfig

    rows = load_pairs(recipe.data, recipe.split)
    if recipe.stock:
        check_stock(settings, rows)
    check_adapters(recipe.start or [])
    model, processor = load_model(recipe.model, place=False)
    context = model.config.get_text_config().max_position_embeddings
    limit = min(settings.max_length or context, context)
    kept, skipped = usable_rows(rows, problems(processor, limit))
    if settings.should_save:
        keep_skipped(str(settings.output_dir), skipped, len(rows))
    model = merge(model, recipe.start or [])
    lora = None
    if recipe.train == "lora":
        lora = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=language_linear(model)
        )
    else:
        model = make_trainable(model, "full")
    set_precision(model, bool(settings.bf16))
    trainer = (DPOTrainer if recipe.stock else SharedImageDPOTrainer)(
        model,
        args=settings,
        train_dataset=rows.select(kept),
        processing_class=processor,
        peft_config=lora,
    )
    trainer.train(resume_from_checkpoint=checkpoint_of(settings))
    trainer.save_model()
    return trainer


def main() -> None:
    """Entry of `accelerate launch -m firsthand.recipes.train_preference`."""
    launch(run, parse)


if __name__ == "__main__":
    main()
