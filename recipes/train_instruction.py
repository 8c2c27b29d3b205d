"""Fine-tune a model on instructions, true and misleading ones in a chosen ratio (LRV, 2306.14565).

What it is: instruction rows, model, weights to train and `transformers.Trainer`, put together; the
loss is on the answers' tokens alone. What it is not: a maker of instructions (`augment lrv`), or an
evaluation.

    accelerate launch -m firsthand.recipes.train_instruction \
        --config recipes/configs/instruction.yaml --model org/model --data instructions
    firsthand train merge --adapter OUT --model org/model --out merged
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, get_args

from transformers import Trainer, TrainingArguments

from firsthand.processing.collator import AnswerCollator
from firsthand.processing.generation import one_view
from firsthand.recipes.inputs import keep_skipped, load_model, load_rows, usable_rows
from firsthand.recipes.launching import checkpoint_of, launch, parse_options
from firsthand.recipes.trainers.vision_modeling import (
    Train,
    language_linear,
    make_trainable,
    set_precision,
)

COLUMNS = ("image", "question", "answer", "polarity")
POLARITIES = ("positive", "negative")
ATTENTION = ("q_proj", "v_proj")


@dataclass
class RecipeArguments:
    """What is trained on what; configs/instruction.yaml explains each."""

    config: str | None = field(default=None, metadata={"help": "YAML file of options"})
    model: str | None = field(default=None, metadata={"help": "Hub id or path; the demo model"})
    data: str | None = field(default=None, metadata={"help": "Parquet or Hub id of instructions"})
    split: str = field(default="train", metadata={"help": "split of the Hub's data set"})
    negatives: float | None = field(default=None, metadata={"help": "share of negative rows"})
    rows: int | None = field(default=None, metadata={"help": "rows that are trained on"})
    train: Train = field(default="lora", metadata={"help": "full, lora or projector"})
    lora_rank: int = field(default=8, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=32, metadata={"help": "alpha of LoRA"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of LoRA"})

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            raise ValueError(f"train is {self.train!r}; it must be one of full, lora, projector")
        if self.negatives is not None and not 0 <= self.negatives <= 1:
            raise ValueError(f"negatives is {self.negatives}; it is a share, 0 to 1")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it must be at least 1")


@dataclass
class InstructionConfig(TrainingArguments):
    """TrainingArguments, with rows handed to the collator as they are."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "rows go to the collator as they are"}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "evaluation gives the loss alone"}
    )


def parse(arguments: Sequence[str]) -> tuple[RecipeArguments, InstructionConfig]:
    """Options from the command line over those of `--config` over the defaults.

    Raises:
        ValueError: naming the keys of the file that are no options.
    """
    return parse_options([RecipeArguments, InstructionConfig], arguments)


class InstructionCollator(AnswerCollator):
    """Instruction rows (`image`, `question`, `answer`) -> a batch of `AnswerCollator`."""

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some rows; see `AnswerCollator`."""
        return super().__call__(
            [
                {
                    "id": row.get("image_id"),
                    "image": row["image"],
                    "turns": [{"question": row["question"], "answer": row["answer"]}],
                }
                for row in samples
            ]
        )


def problem(row: Mapping[str, Any]) -> str | None:
    """Why an instruction cannot be trained on; None where it can. Its image is decoded."""
    for name in ("question", "answer"):
        if not str(row[name] or "").strip():
            return f"the {name} is empty"
    if row["polarity"] not in (*POLARITIES, ""):
        return f"polarity is {row['polarity']!r}; it must be one of {', '.join(POLARITIES)}, or ''"
    if row["image"] is None:
        return "it has no image"
    row["image"].load()
    return None


def load_instructions(data: str | None, split: str) -> Any:
    """Instruction rows: Parquet on disk (a file or folder), or a data set of the Hub.

    Raises:
        ValueError: when no data is named, or a column is missing.
    """
    from datasets import Image

    if data is None:
        raise ValueError("give --data: a Parquet file or folder, or a Hub id, of instruction rows")
    rows = load_rows(data, split)
    if missing := set(COLUMNS) - set(rows.column_names):
        raise ValueError(
            f"{data} has no column {', '.join(sorted(missing))}: instruction rows have "
            f"image_id, {', '.join(COLUMNS)} and task, as `firsthand augment lrv` writes them"
        )
    return rows.cast_column("image", Image())


def chosen(
    polarities: Sequence[str], negatives: float | None, count: int | None, seed: int
) -> list[int]:
    """Numbers of the rows to train on, in order: exactly the share of negatives that is wanted.

    Of `count` rows round(negatives * count) are negative. The rows are drawn by `seed`, and a
    smaller number of one polarity is a part of every larger one, so that ratios compare.

    Args:
        polarities: of all rows; "" is not known (LRV's charts), and such a row in no share.
        negatives: share, 0 to 1; None takes rows as they come.
        count: how many rows; None takes as many as the share allows.
        seed: of the draw.

    Raises:
        ValueError: where there are too few rows, saying how many there are.
    """
    by = {p: [i for i, one in enumerate(polarities) if one == p] for p in POLARITIES}
    draw = random.Random(seed)
    for numbers in by.values():
        draw.shuffle(numbers)
    if negatives is None:
        wanted = len(polarities) if count is None else count
        _require(wanted, {"instructions": len(polarities)}, {"instructions": wanted})
        return sorted(draw.sample(range(len(polarities)), wanted))
    share = Fraction(str(negatives))
    have = {name: len(numbers) for name, numbers in by.items()}
    if count is None:
        count = next((n for n in range(len(polarities), 0, -1) if _fits(_split(n, share), have)), 0)
    need = _split(count, share)
    _require(count, have, need)
    return sorted(i for name, numbers in by.items() for i in numbers[: need[name]])


def _split(count: int, share: Fraction) -> dict[str, int]:
    """How many of `count` rows are of each polarity; halves are rounded up."""
    negative = int(share * count + Fraction(1, 2))
    return {"positive": count - negative, "negative": negative}


def _fits(need: Mapping[str, int], have: Mapping[str, int]) -> bool:
    return all(need[name] <= have[name] for name in need)


def _require(count: int, have: Mapping[str, int], need: Mapping[str, int]) -> None:
    if not count or not _fits(need, have):
        wanted, there = (
            ", ".join(f"{n} {name}" for name, n in counts.items()) for counts in (need, have)
        )
        raise ValueError(
            f"{count} rows need {wanted}, and of usable rows there are {there}: choose another "
            "share of negatives or fewer rows"
        )


def trainable(model: Any, recipe: RecipeArguments) -> Any:
    """The model with the recipe's weights trainable and all others frozen.

    LoRA is on queries and values of the language model (LRV V2), the projector on its own is LRV
    V1; `full` is the language model and the projector. The vision encoder is frozen in each.
    """
    if recipe.train != "lora":
        return make_trainable(model, recipe.train)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=language_linear(model, ATTENTION),
    )
    return get_peft_model(model, config)


def run(recipe: RecipeArguments, settings: InstructionConfig) -> Trainer:
    """Train, and save the model (or adapter) and its processor into `settings.output_dir`.

    Rows that cannot be trained on are left out and listed in `skipped.jsonl` there.
    """
    from torch.utils.data import Subset

    rows = load_instructions(recipe.data, recipe.split)
    kept, skipped = usable_rows(rows, problem)
    listed = list(rows["polarity"])
    polarities = [listed[number] for number in kept]
    numbers = chosen(polarities, recipe.negatives, recipe.rows, settings.seed)
    used = [kept[number] for number in numbers]
    if settings.should_save:
        keep_skipped(str(settings.output_dir), skipped, len(rows))
        negative = sum(polarities[number] == "negative" for number in numbers)
        print(f"training on {len(used)} rows, {negative} of them negative")
    model, processor = load_model(recipe.model, place=False)
    model = trainable(model, recipe)
    set_precision(model, settings.bf16)
    trainer = Trainer(
        model,
        settings,
        InstructionCollator(one_view(processor)),
        Subset(rows, used),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint_of(settings))
    trainer.save_model()
    return trainer


def main() -> None:
    """Entry of `accelerate launch -m firsthand.recipes.train_instruction`."""
    launch(run, parse)


if __name__ == "__main__":
    main()
