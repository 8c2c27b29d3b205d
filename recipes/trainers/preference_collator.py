"""Batches of preference rows: every image processed once, and corrupted where a term asks for it.

What it is: TRL's vision collator, for which text has 2B rows (chosen, then rejected) and images B;
and the same rows with corrupted images, or with none. What it is not: a trainer (preference.py).

    SharedImageCollator(processor)(rows)
    SharedImageCollator(processor, images="both", corruption="crop", seed=0)(rows)
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from firsthand.processing.corruptions import Corruption, corrupt, diffuse
from firsthand.processing.perturb import mean_colour
from firsthand.recipes.trainers import image_preference as terms
from firsthand.recipes.trainers.image_preference import CORRUPTED, HAS_IMAGE, TEXT_INPUTS

Images = Literal["shown", "corrupted", "both", "none"]


@dataclass
class SharedImageCollator(DataCollatorForVisionPreference):
    """TRL's vision collator, with every image processed once: text has 2B rows, images B.

    Rows keep their columns of the reference's log-probabilities, and `weight`.

    Attributes:
        images: which images are processed: "shown", "corrupted" (in their place), "both" (then the
            corrupted ones' inputs start with `corrupted_`), or "none", and none in the prompt.
        corruption: of processing/corruptions.py; its picture depends on seed and row alone.
        seed: of the corruption.
        others: rows whose images stand in for those of "other".
    """

    images: Images = "shown"
    corruption: Corruption = "crop"
    seed: int = 0
    others: Any = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [dict(example) for example in examples]
        names = [name for name in terms.COLUMNS if name in rows[0]]
        columns = {n: torch.tensor([float(row.pop(n)) for row in rows]) for n in names}
        for row in rows:
            if "image" in row:
                row["images"] = [row.pop("image")]
        if self.images == "none":
            rows = [self._bare(row) for row in rows]
        if self.images == "both":
            columns[HAS_IMAGE] = torch.tensor([bool(row["images"]) for row in rows])
        return dict(_once(self, rows)) | columns

    def _bare(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row without its images, in the prompt too."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            processor: Any = self.processor
            return row | {"images": [], "prompt": prompt.replace(processor.image_token, "")}
        without = [
            one
            if isinstance(one["content"], str)
            else one | {"content": [p for p in one["content"] if p["type"] != "image"]}
            for one in prompt
        ]
        return row | {"images": [], "prompt": without}

    def corrupted(self, row: dict[str, Any]) -> list[Image.Image]:
        """The corrupted images of a row."""
        content = blake2b(repr((row["prompt"], row["chosen"])).encode(), digest_size=16)
        for image in row["images"]:
            content.update(image.tobytes())
        seeds = [f"{self.seed}|{content.hexdigest()}|{i}" for i in range(len(row["images"]))]
        colour = mean_colour(self.processor)
        return [
            corrupt(
                image, self.corruption, seed, colour,
                self._other(image, seed) if self.corruption == "other" else None,
            )
            for image, seed in zip(row["images"], seeds, strict=True)
        ]  # fmt: skip

    def _other(self, image: Image.Image, seed: str) -> Image.Image:
        """An image of another row, drawn by `seed`."""
        draw, count = random.Random(seed), len(self.others)
        start = draw.randrange(count)
        for number in range(start, start + count):
            row = self.others[number % count]
            for found in [row["image"]] if "image" in row else row["images"]:
                if found.size != image.size or found.tobytes() != image.tobytes():
                    return found
        raise ValueError("corruption 'other' needs rows with different images; these have one")


def _once(collator: SharedImageCollator, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What TRL's collator gives, but its processor is shown the images of the first B rows only."""
    processor = collator.processor
    show = collator.images

    class Once:
        """The processor; of doubled images and prompts it processes the first half."""

        tokenizer = processor.tokenizer
        apply_chat_template = processor.apply_chat_template

        def __call__(self, images: Any = None, text: Any = None, **settings: Any) -> Any:
            if images is None:
                return processor(text=text, **settings)
            half = text[: len(text) // 2]
            if show == "corrupted":
                found = self.corrupted(half, settings)
            else:
                found = processor(images=images[: len(half)], text=half, **settings)
            if show == "both":
                more = self.corrupted(half, settings)
                for name in set(more) - TEXT_INPUTS:
                    found[CORRUPTED + name] = more[name]
            for name in ("input_ids", "attention_mask"):
                found[name] = found[name].repeat(2, 1)
            return found

        def corrupted(self, text: list[str], settings: dict[str, Any]) -> Any:
            images = [collator.corrupted(row) for row in rows]
            found = processor(images=images, text=text, **settings)
            if collator.corruption == "diffusion":
                found["pixel_values"] = diffuse(found["pixel_values"], collator.seed)
            return found

    once: Any = Once()
    plain = DataCollatorForVisionPreference(
        once, collator.max_length, collator.pad_to_multiple_of, collator.return_tensors
    )
    return plain.torch_call([dict(row) for row in rows])
