"""What the demo asks: rows for generation, made from scenes with exact ground truth.

rows = caption_rows(scenes_) + existence_rows(scenes_)
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import pope
from firsthand.processing.support import blank

Row = dict[str, Any]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def objects_of(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Ground truth for CHAIR and POPE: scene id -> nouns."""
    return {r["id"]: [o["noun"] for o in r["objects"]] for r in rows}


def caption_rows(rows: Iterable[Row]) -> list[Row]:
    """One caption a scene."""
    return [
        {
            "id": f"{r['id']}/caption",
            "image_id": r["id"],
            "image": r["image"],
            "question": scenes.CAPTION_QUESTION,
        }
        for r in rows
    ]


def existence_rows(rows: list[Row], seed: int = 0) -> list[Row]:
    """POPE's random questions, balanced yes and no, each asked first, in the scenes' words.

    Absent objects are drawn from all nouns, also those that no scene here shows, so that a scene's
    questions do not depend on which others are asked about.
    """
    images = {r["id"]: r["image"] for r in rows}
    nouns, half = list(scenes.NOUNS), len(scenes.NOUNS) // 2
    vocabulary = {"first half": nouns[:half], "second half": nouns[half:]}
    asked = pope.build_questions(
        {**objects_of(rows), **vocabulary}, seed=seed, question=scenes.existence_question
    )
    return [{**q, "image": images[q["image_id"]]} for q in asked if q["image_id"] in images]


def shuffled(rows: list[Row]) -> list[Row]:
    """The same questions with the images rotated by one among the scenes: the blind control."""
    ids = list(dict.fromkeys(r["image_id"] for r in rows))
    images = {r["image_id"]: r["image"] for r in rows}
    other = {a: images[b] for a, b in zip(ids, ids[1:] + ids[:1], strict=True)}
    return [{**r, "image": other[r["image_id"]], "condition": "shuffled"} for r in rows]


def _filled(image: Image.Image, box: Box) -> Image.Image:
    pixels = np.array(image.convert("RGB"))
    mean = pixels.reshape(-1, 3).mean(0).astype(np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = mean
    return Image.fromarray(pixels)


def swapped_caption(row: Row, rng: random.Random) -> str:
    """A scene's caption with one object replaced by an absent one, of the same theme if possible.

    The hallucination that the co-occurrence prior would make.
    """
    objects = [dict(o) for o in row["objects"]]
    present = {o["noun"] for o in objects}
    wrong = rng.choice(objects)
    theme = scenes.NOUNS[wrong["noun"]]
    likely = [n for n in scenes.NOUNS if scenes.NOUNS[n] == theme and n not in present]
    wrong["noun"] = rng.choice(likely or [n for n in scenes.NOUNS if n not in present])
    return scenes.caption(objects)


def _elsewhere(box: Box, size: tuple[int, int], rng: random.Random) -> Box:
    """A box of the same size that overlaps the given one least, of 32 random places."""
    width, height = box[2] - box[0], box[3] - box[1]

    def overlap(x: int, y: int) -> int:
        across = min(x + width, box[2]) - max(x, box[0])
        down = min(y + height, box[3]) - max(y, box[1])
        return max(across, 0) * max(down, 0)

    places = [
        (rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)) for _ in range(32)
    ]
    x, y = min(places, key=lambda p: overlap(*p))
    return x, y, x + width, y + height


def reliance_rows(rows: list[Row], seed: int = 0) -> list[Row]:
    """One existence question about a present object a scene, under four conditions.

    `plain`; `masked`: the object's box filled with the image's mean colour; `control`: a box of
    equal size elsewhere filled; `blank`: the whole image filled.
    """
    rng, out = random.Random(seed), []
    for row in rows:
        chosen = rng.choice(row["objects"])
        image = row["image"].convert("RGB")
        left, top, right, bottom = (int(v) for v in chosen["box"])
        box = (left, top, right, bottom)
        images = {
            "plain": image,
            "masked": _filled(image, box),
            "control": _filled(image, _elsewhere(box, image.size, rng)),
            "blank": blank(image),
        }
        out += [
            {
                "id": f"{row['id']}/reliance",
                "image_id": row["id"],
                "image": picture,
                "question": scenes.existence_question(chosen["noun"]),
                "answer": "yes",
                "condition": condition,
            }
            for condition, picture in images.items()
        ]
    return out
