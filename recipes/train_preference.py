"""Train a model on preferred and rejected answers about images (SIMA, arXiv 2405.15973).

What it is: preference rows, model, LoRA and `SharedImageDPOTrainer`, put together; all options of
TRL's DPOConfig hold. What it is not: a maker of preferences, or an evaluation.

    accelerate launch -m firsthand.recipes.train_preference \
        --config recipes/configs/preference.yaml --model llava-hf/llava-1.5-7b-hf --data pairs/
    firsthand train merge --adapter OUT --model llava-hf/llava-1.5-7b-hf --out merged
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from firsthand.recipes.inputs import keep_skipped, load_model, load_rows, usable_rows
from firsthand.recipes.trainers.preference import SharedImageDPOConfig, SharedImageDPOTrainer
from firsthand.recipes.trainers.vision_modeling import (
    language_linear,
    make_trainable,
    set_precision,
)

Train = Literal["lora", "full"]
COLUMNS = ("images", "prompt", "chosen", "rejected")


@dataclass
class RecipeArguments:
    """What is trained on what; configs/preference.yaml explains each."""

    config: str | None = field(default=None, metadata={"help": "YAML file of options"})
    model: str | None = field(default=None, metadata={"help": "Hub id or path; the demo model"})
    data: str | None = field(default=None, metadata={"help": "Parquet or Hub id of pairs"})
    split: str = field(default="train", metadata={"help": "split of the Hub's data set"})
    train: Train = field(default="lora", metadata={"help": "lora or full"})
    lora_rank: int = field(default=128, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=256, metadata={"help": "alpha of LoRA"})

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            raise ValueError(f"train is {self.train!r}; it must be one of lora, full")


def parse(arguments: Sequence[str]) -> tuple[RecipeArguments, SharedImageDPOConfig]:
    """Options from the command line over those of `--config` over the defaults.

    Raises:
        ValueError: naming the keys of the file that are no options.
    """
    from firsthand.recipes.train_vision_modeling import parse_options

    return parse_options([RecipeArguments, SharedImageDPOConfig], arguments)


def problem(row: Mapping[str, Any]) -> str | None:
    """Why a pair cannot be trained on; None where it can. Its images are decoded."""
    chosen, rejected = (text_of(row[name]) for name in ("chosen", "rejected"))
    if not row["prompt"]:
        return "the prompt is empty"
    if not chosen.strip() or not rejected.strip():
        return "an answer is empty"
    if chosen.strip() == rejected.strip():
        return "both answers are the same"
    for image in row["images"]:
        image.load()
    return None


def text_of(answer: Any) -> str:
    """The text of an answer, plain or as messages."""
    if isinstance(answer, str):
        return answer
    parts = [message["content"] for message in answer]
    return " ".join(p if isinstance(p, str) else " ".join(c["text"] for c in p) for p in parts)


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


def run(recipe: RecipeArguments, settings: SharedImageDPOConfig) -> SharedImageDPOTrainer:
    """Train, and save the adapter (or model) and its processor into `settings.output_dir`.

    Pairs that cannot be trained on are left out and listed in `skipped.jsonl` there.
    """
    from peft import LoraConfig

    rows = load_pairs(recipe.data, recipe.split)
    kept, skipped = usable_rows(rows, problem)
    if settings.should_save:
        keep_skipped(str(settings.output_dir), skipped, len(rows))
    model, processor = load_model(recipe.model)
    lora = None
    if recipe.train == "lora":
        lora = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=language_linear(model)
        )
    else:
        model = make_trainable(model, "full")
    set_precision(model, bool(settings.bf16))
    trainer = SharedImageDPOTrainer(
        model,
        args=settings,
        train_dataset=rows.select(kept),
        processing_class=processor,
        peft_config=lora,
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


def main() -> None:
    """Entry of `accelerate launch -m firsthand.recipes.train_preference`."""
    try:
        run(*parse(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
