"""Train a model to say, at each image token, the word of what is there (FiVL, arXiv 2412.14672).

What it is: data, model, labels and `VisionModelingTrainer`, put together. What it is not: an
evaluation (measure with `firsthand measure`) or an augmenter (expressions and masks are given).

    accelerate launch -m firsthand.recipes.train_vision_modeling \
        --config recipes/configs/vision_modeling.yaml --model llava-hf/llava-1.5-7b-hf --data rows/
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from firsthand.processing.collator import Conflict, Noun, VisionLabelCollator
from firsthand.processing.generation import one_view
from firsthand.processing.masks import Frame
from firsthand.recipes.inputs import keep_skipped, load_model, load_rows, usable_rows
from firsthand.recipes.launching import checkpoint_of, launch, parse_options
from firsthand.recipes.trainers.vision_modeling import (
    Train,
    VisionModelingConfig,
    VisionModelingTrainer,
    make_trainable,
    set_precision,
)

Head = Literal["shared", "separate"]


@dataclass
class RecipeArguments:
    """What is trained on what; configs/vision_modeling.yaml explains each."""

    config: str | None = field(default=None, metadata={"help": "YAML file of options"})
    model: str | None = field(default=None, metadata={"help": "Hub id or path; the demo model"})
    train: Train = field(default="lora", metadata={"help": "full, lora or projector"})
    lora_rank: int = field(default=16, metadata={"help": "rank of LoRA"})
    lora_projector: bool = field(default=True, metadata={"help": "lora trains the projector too"})
    vision_head: Head = field(default="shared", metadata={"help": "shared or separate"})
    data: str | None = field(default=None, metadata={"help": "Parquet or Hub id; the scenes"})
    split: str = field(default="validation", metadata={"help": "split of the scenes or Hub data"})
    asked: int = field(default=0, metadata={"help": "questions beside each scene's caption"})
    frame: str | None = field(default=None, metadata={"help": "what of an image is shown"})
    threshold: float = field(default=0.0, metadata={"help": "least covered share of a token"})
    max_area: float = field(default=0.3, metadata={"help": "largest labelled share of an image"})
    conflict: Conflict = field(default="first", metadata={"help": "who labels a shared token"})
    noun: Noun = field(default="random", metadata={"help": "which noun of an expression"})

    def __post_init__(self) -> None:
        kinds = {"train": Train, "conflict": Conflict, "noun": Noun, "vision_head": Head}
        kinds |= {"frame": Frame} if self.frame is not None else {}
        for name, kind in kinds.items():
            value, known = vars(self)[name], get_args(kind)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def parse(arguments: Sequence[str]) -> tuple[RecipeArguments, VisionModelingConfig]:
    """Options from the command line over those of `--config` over the defaults.

    Raises:
        ValueError: naming the keys of the file that are no options.
    """
    return parse_options([RecipeArguments, VisionModelingConfig], arguments)


def scene_to_sample(row: Mapping[str, Any], asked: int = 0) -> dict[str, Any]:
    """A scene as a grounded sample: its caption as the answer, a mask for each noun in it.

    `asked` of the scene's questions, drawn by its id, join the caption in one conversation, in an
    order that is drawn too.
    """
    from firsthand.datasets_scripts.scenes import scenes

    expressions, end = [], 0
    for thing in row["objects"]:
        start = row["caption"].index(thing["noun"], end)
        end = start + len(thing["noun"])
        expressions.append(
            {
                "text": thing["noun"],
                "char_start": start,
                "char_end": end,
                "nouns": [thing["noun"]],
                "boxes": [thing["box"]],
                "score": 1.0,
                "mask": thing["mask"],
            }
        )
    turn = {"question": scenes.CAPTION_QUESTION, "answer": row["caption"]}
    turns = [{**turn, "expressions": expressions}]
    draw = random.Random(row["id"])
    questions = draw.sample(row["questions"], min(asked, len(row["questions"])))
    turns += [
        {"question": q["question"], "answer": q["answer"], "expressions": []} for q in questions
    ]
    draw.shuffle(turns)
    return {"id": row["id"], "image": row["image"], "source": row["source"], "turns": turns}


def load_samples(data: str | None, split: str, asked: int = 0) -> Any:
    """Grounded samples: Parquet on disk, a data set of the Hub, or (None) the committed scenes.

    A folder that `build_scenes` wrote is read as scenes, with `asked` questions beside captions.

    Raises:
        ValueError: when the rows have no `image` or `turns`.
    """
    from firsthand.recipes.demo_data import SCENES, load_scenes

    path = Path(data or SCENES)
    if _holds_scenes(path, split):
        return [scene_to_sample(row, asked) for row in load_scenes(split, folder=path)]
    from datasets import Image

    rows = load_rows(str(path), split)
    missing = {"id", "image", "turns"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: no grounded samples")
    return rows.cast_column("image", Image())


def _holds_scenes(path: Path, split: str) -> bool:
    import pyarrow.parquet as parquet

    file = path / split / f"{split}-00000-of-00001.parquet"
    return file.exists() and "caption" in parquet.read_schema(file).names


def problem(sample: Mapping[str, Any]) -> str | None:
    """Why a sample cannot be trained on; None where it can. Its image is decoded."""
    if not sample["turns"]:
        return "it has no turns"
    if any(not turn["answer"] for turn in sample["turns"]):
        return "an answer is empty"
    if sample["image"] is None:
        return None
    sample["image"].load()
    size = list(sample["image"].size[::-1])
    for expression in (e for turn in sample["turns"] for e in turn["expressions"] or ()):
        if expression["mask"] and list(expression["mask"]["size"]) != size:
            found = list(expression["mask"]["size"])
            return f"the mask of {expression['text']!r} is {found}, its image {size} (H, W)"
    return None


def with_head(model: Any, vision_head: str) -> Any:
    """The model, or for a separate vision head the grounded model around its weights."""
    if vision_head == "shared":
        return model
    from firsthand import modeling

    classes = {
        "llava": modeling.GroundedLlavaForConditionalGeneration,
        "internvl": modeling.GroundedInternVLForConditionalGeneration,
    }
    if model.config.model_type not in classes:
        raise ValueError(
            f"vision_head: separate needs a grounded class, and {model.config.model_type!r} has "
            f"none (there are {', '.join(classes)}); use vision_head: shared"
        )
    return classes[model.config.model_type].from_stock(model, vision_head=vision_head)


def run(recipe: RecipeArguments, settings: VisionModelingConfig) -> VisionModelingTrainer:
    """Train, and save the model (or adapter) and its processor into `settings.output_dir`.

    Rows that cannot be trained on are left out and listed in `skipped.jsonl` there.
    """
    from torch.utils.data import Subset

    samples = load_samples(recipe.data, recipe.split, recipe.asked)
    kept, skipped = usable_rows(samples, problem)
    if settings.should_save:
        keep_skipped(str(settings.output_dir), skipped, len(samples))
    model, processor = load_model(recipe.model, place=False)
    model = with_head(model, recipe.vision_head)
    collator = VisionLabelCollator(
        one_view(processor), model.config, recipe.frame, recipe.threshold, recipe.max_area,  # type: ignore[arg-type]
        recipe.conflict, recipe.noun, settings.seed,
    )  # fmt: skip
    model = make_trainable(model, recipe.train, recipe.lora_rank, recipe.lora_projector)
    set_precision(model, settings.bf16)
    trainer = VisionModelingTrainer(
        model, settings, collator, Subset(samples, kept), processing_class=processor
    )
    trainer.train(resume_from_checkpoint=checkpoint_of(settings))
    trainer.save_model()
    return trainer


def main() -> None:
    """Entry of `accelerate launch -m firsthand.recipes.train_vision_modeling`."""
    launch(run, parse)


if __name__ == "__main__":
    main()
