"""Train a model to say, at each image token, the word of what is there (FiVL, arXiv 2412.14672).

What it is: data, model, labels and `VisionModelingTrainer`, put together. What it is not: an
evaluation (measure with `firsthand measure`) or an augmenter (expressions and masks are given).

    accelerate launch -m firsthand.recipes.train_vision_modeling \
        --config recipes/configs/vision_modeling.yaml --model llava-hf/llava-1.5-7b-hf --data rows/
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from firsthand.processing.collator import Conflict, VisionLabelCollator
from firsthand.processing.overlays import Frame
from firsthand.recipes.trainers.vision_modeling import (
    Train,
    VisionModelingConfig,
    VisionModelingTrainer,
    make_trainable,
)


@dataclass
class RecipeArguments:
    """What is trained on what; configs/vision_modeling.yaml explains each."""

    config: str | None = field(default=None, metadata={"help": "YAML file of options"})
    model: str | None = field(default=None, metadata={"help": "Hub id or path; the demo model"})
    train: Train = field(default="lora", metadata={"help": "full, lora or projector"})
    lora_rank: int = field(default=16, metadata={"help": "rank of LoRA"})
    data: str | None = field(default=None, metadata={"help": "Parquet or Hub id; the scenes"})
    split: str = field(default="validation", metadata={"help": "split of the scenes or Hub data"})
    frame: Frame = field(default="resize", metadata={"help": "what of an image is shown"})
    threshold: float = field(default=0.25, metadata={"help": "least covered share of a token"})
    max_area: float = field(default=0.3, metadata={"help": "largest labelled share of an image"})
    conflict: Conflict = field(
        default="smallest", metadata={"help": "who labels a token that several cover"}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("train", Train), ("frame", Frame), ("conflict", Conflict)):
            value, known = vars(self)[name], get_args(allowed)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def parse(arguments: Sequence[str]) -> tuple[RecipeArguments, VisionModelingConfig]:
    """Options from the command line over those of `--config` over the defaults.

    Raises:
        ValueError: naming the keys of the file that are no options.
    """
    from transformers import HfArgumentParser

    parser: Any = HfArgumentParser([RecipeArguments, VisionModelingConfig])  # type: ignore[list-item]
    file = parser.parse_known_args(arguments)[0].config
    if file is not None:
        import yaml

        values = yaml.safe_load(Path(file).read_text("utf-8")) or {}
        unknown = sorted(set(values) - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"{file} holds unknown options: {', '.join(unknown)}")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(args=list(arguments), look_for_args_file=False)


def scene_to_sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A scene as a grounded sample: its caption as the answer, a mask for each noun in it."""
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
    return {"id": row["id"], "image": row["image"], "source": row["source"], "turns": turns}


def load_samples(data: str | None, split: str) -> Any:
    """Grounded samples: Parquet on disk, a data set of the Hub, or (None) the committed scenes.

    Raises:
        ValueError: when the rows have no `image` or `turns`.
    """
    if data is None:
        from firsthand.recipes.demo_data import load_scenes

        return [scene_to_sample(row) for row in load_scenes(split)]
    from datasets import Image, load_dataset

    path = Path(data)
    if path.exists():
        files = [str(p) for p in sorted(path.rglob("*.parquet"))] if path.is_dir() else [data]
        rows = load_dataset("parquet", data_files=files, split="train")
    else:
        rows = load_dataset(data, split=split)
    missing = {"id", "image", "turns"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{data} has no column {', '.join(sorted(missing))}: no grounded samples")
    return rows.cast_column("image", Image())


def run(recipe: RecipeArguments, settings: VisionModelingConfig) -> VisionModelingTrainer:
    """Train, and save the model (or adapter) and its processor into `settings.output_dir`."""
    from firsthand.recipes.inputs import load_model

    samples = load_samples(recipe.data, recipe.split)
    model, processor = load_model(recipe.model)
    collator = VisionLabelCollator(
        processor, model.config, recipe.frame, recipe.threshold, recipe.max_area, recipe.conflict
    )
    model = make_trainable(model, recipe.train, recipe.lora_rank)
    _set_precision(model, settings.bf16)
    trainer = VisionModelingTrainer(model, settings, collator, samples, processing_class=processor)
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


def _set_precision(model: Any, bf16: bool) -> None:
    """float32 throughout; with bf16 only what is trained, and the rest stays as it was stored."""
    if not bf16:
        model.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def main() -> None:
    """Entry of `accelerate launch -m firsthand.recipes.train_vision_modeling`."""
    try:
        run(*parse(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
