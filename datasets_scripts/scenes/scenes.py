"""Composed scenes with exact ground truth: sprites of known nouns pasted on backgrounds.

What it is: a self-contained builder. From a folder of sprites (`<style>/<noun>/<k>.png`, RGBA) it
draws 224 x 224 scenes of one to five objects and writes Parquet with, per object, its mask (COCO
RLE), box, noun, colour and position, and per scene a caption and existence, attribute, position and
counting questions. What it is not: a source of sprites (`recipes/build_scenes.py` fetches those) or
of photographs.

    from firsthand.datasets_scripts.scenes import scenes
    scenes.build("scenes", sprites="sprites", sizes={"train": 4800, "test": 200})
    load_dataset("scenes", "test", split="test")

The splits share one drawing procedure and differ in two things only:

=============  =====================================  ==========================================
split          which nouns meet                       which sprites
=============  =====================================  ==========================================
train          one theme, as photographs do           the training styles, strongly augmented
validation     one theme                              the training styles
test           one theme: new scenes, known sprites   the training styles
test_prior     every noun from another theme          the training styles
test_unseen    one theme                              a style that no training scene uses
test_photo     one theme                              photo cut-outs (never shipped; local only)
=============  =====================================  ==========================================
"""

from __future__ import annotations

import colorsys
import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from pycocotools import mask as coco_mask

SIZE = 224
TRAIN_STYLES = (
    "fluent-3d",
    "fluent-emoji",
    "fluent-emoji-flat",
    "noto",
    "noto-v1",
    "emojione",
    "fxemoji",
)
UNSEEN_STYLE = "twemoji"
PHOTO_STYLE = "photo"
SPLITS = ("train", "validation", "test", "test_prior", "test_unseen", "test_photo")
POSITIONS = {
    "top left": (56, 56),
    "top right": (168, 56),
    "center": (112, 112),
    "bottom left": (56, 168),
    "bottom right": (168, 168),
}
COUNTING_QUESTION = "How many objects are there?"
CAPTION_QUESTION = "Describe the image."
NUMBERS = ("zero", "one", "two", "three", "four", "five")
OBJECTS_PER_SCENE = (1, 2, 2, 3, 3, 3, 4, 4, 5)
SAME_THEME = 0.85  # chance that an object comes from the scene's theme where the bias holds
PNG, WEBP = {"format": "PNG"}, {"format": "WEBP", "quality": 90, "method": 6}
MIN_VISIBLE = 0.6  # share of an object's pixels that later objects may not cover
JITTER = 10  # pixels around a position's centre
THEMES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "nouns.json").read_text(encoding="utf-8")
)
NOUNS: dict[str, str] = {n: t for t, theme in THEMES.items() for n in theme["nouns"]}


@dataclass(frozen=True)
class Recipe:
    """How one split is drawn (see the module's table)."""

    styles: tuple[str, ...]
    broken_prior: bool = False
    strong: bool = False


RECIPES = {
    "train": Recipe(TRAIN_STYLES, strong=True),
    "validation": Recipe(TRAIN_STYLES),
    "test": Recipe(TRAIN_STYLES),
    "test_prior": Recipe(TRAIN_STYLES, broken_prior=True),
    "test_unseen": Recipe((UNSEEN_STYLE,)),
    "test_photo": Recipe((PHOTO_STYLE,)),
}


def with_article(noun: str) -> str:
    """`dog` -> `a dog`, `apple` -> `an apple`; plural and mass nouns keep none."""
    if noun in ("grapes", "scissors", "broccoli", "corn", "bread"):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def caption(objects: list[dict[str, Any]]) -> str:
    """One clause an object in reading order: `a dog top left, a cup center.`"""
    return ", ".join(f"{with_article(o['noun'])} {o['position']}" for o in objects) + "."


def dense_captions(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A phrase and its box in pixels an object: `{"caption": "red car", "box": [...]}`."""
    return [{"caption": f"{o['color']} {o['noun']}".strip(), "box": o["box"]} for o in objects]


def existence_question(noun: str) -> str:
    """The yes/no question that POPE asks, in POPE's form."""
    return f"Is there {with_article(noun)} in the image?"


class SpriteFolder:
    """Sprites on disk, `<style>/<noun>/<k>.png`; read on demand and kept cropped to their alpha."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._cache: dict[Path, Image.Image] = {}
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"no sprite folder at {self.root}: make one with "
                "`python -m firsthand.recipes.build_scenes --sprites DIR`"
            )

    def files(self, style: str, noun: str) -> list[Path]:
        """The drawings of one noun in one style, sorted; empty where the style lacks it."""
        return sorted((self.root / style / noun.replace(" ", "_")).glob("*.png"))

    def nouns(self, styles: tuple[str, ...]) -> list[str]:
        """The nouns that at least one of the styles draws, in table order."""
        return [n for n in NOUNS if any(self.files(s, n) for s in styles)]

    def open(self, path: Path) -> Image.Image:
        """RGBA, cropped to alpha > 40."""
        if path not in self._cache:
            image = Image.open(path).convert("RGBA")
            box = image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
            self._cache[path] = image.crop(box)
        return self._cache[path]


def color_of(pixels: np.ndarray) -> tuple[str, float]:
    """Most frequent colour name of RGB pixels [N, 3] uint8, and its share 0..1."""
    p = pixels.astype(np.float32) / 255
    high, low = p.max(1), p.min(1)
    spread = high - low
    r, g, b = p.T
    safe = np.maximum(spread, 1e-6)
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, 0))
    hue = 60 * np.where((high == b) & (high != r) & (high != g), (r - g) / safe + 4, hue)
    edges = [15, 42, 68, 165, 195, 255, 290, 345]
    table = np.array(["red", "orange", "yellow", "green", "blue", "blue", "purple", "pink", "red"])
    names = table[np.searchsorted(edges, hue)]
    names = np.where((names == "orange") & (high < 0.6), "brown", names)
    names = np.where(spread < 0.15 * np.maximum(high, 0.2), "gray", names)
    names = np.where((names == "gray") & (high > 0.85), "white", names)
    names = np.where(high < 0.22, "black", names)
    found, counts = np.unique(names, return_counts=True)
    return str(found[counts.argmax()]), float(counts.max() / len(names))


def _background(rng: random.Random, theme: str, textures: list[Image.Image]) -> Image.Image:
    """Plain, gradient or photographic; its tint is mostly the theme's: part of the prior."""
    hue = THEMES[theme]["hue"] if rng.random() < 0.8 else rng.uniform(0, 360)

    def shade() -> np.ndarray:
        h = (hue + rng.uniform(-14, 14)) / 360 % 1
        return 255 * np.array(colorsys.hsv_to_rgb(h, rng.uniform(0.05, 0.6), rng.uniform(0.45, 1)))

    kind = rng.random()
    if kind < 0.35:
        canvas = np.broadcast_to(shade(), (SIZE, SIZE, 3))
    elif kind < 0.65 or not textures:
        ramp = np.linspace(0, 1, SIZE)[:, None, None]
        canvas = shade() * (1 - ramp) + shade() * ramp
        canvas = np.broadcast_to(canvas, (SIZE, SIZE, 3))
    else:
        photo = rng.choice(textures)
        side = rng.randint(min(photo.size) // 3, min(photo.size))
        x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        crop = photo.crop((x, y, x + side, y + side)).convert("L").resize((SIZE, SIZE))
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
        canvas = shade() * (0.55 + 0.45 * np.asarray(crop, np.float32)[..., None] / 255)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 6), (SIZE, SIZE, 1))
    return Image.fromarray((canvas + noise).clip(0, 255).astype(np.uint8))


def _turn_hue(image: Image.Image, shift: int) -> Image.Image:
    alpha = image.getchannel("A")
    h, s, v = image.convert("RGB").convert("HSV").split()
    turned = Image.merge("HSV", (h.point(lambda x: (x + shift) % 256), s, v)).convert("RGB")
    turned.putalpha(alpha)
    return turned


def _augment(sprite: Image.Image, rng: random.Random, strong: bool) -> Image.Image:
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if strong:
        if rng.random() < 0.5:
            sprite = _turn_hue(sprite, rng.randint(-28, 28))
        for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            alpha = sprite.getchannel("A")
            low = 0.1 if enhance is ImageEnhance.Color else 0.6
            sprite = enhance(sprite.convert("RGB")).enhance(rng.uniform(low, 1.5)).convert("RGBA")
            sprite.putalpha(alpha)
        width, height = sprite.size
        stretch = rng.uniform(0.8, 1.25)
        sprite = sprite.resize((max(8, int(width * stretch)), height), Image.Resampling.BICUBIC)
        if rng.random() < 0.3:
            sprite = sprite.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    angle = rng.uniform(-28, 28) if strong else rng.uniform(-8, 8)
    sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())


def _choose_nouns(
    rng: random.Random, nouns: list[str], count: int, broken: bool
) -> tuple[str, list[str]]:
    """The background's theme and the nouns. With a broken prior no two themes are the same."""
    theme = rng.choice(sorted({NOUNS[n] for n in nouns}))
    chosen: list[str] = []
    while len(chosen) < count:
        if broken:
            used = {theme} | {NOUNS[c] for c in chosen}
            pool = [n for n in nouns if NOUNS[n] not in used]
        else:
            inside = rng.random() < SAME_THEME
            pool = [n for n in nouns if (NOUNS[n] == theme) == inside and n not in chosen]
        if pool:
            chosen.append(rng.choice(pool))
    return theme, chosen


def _place(
    sprite: Image.Image, position: str, crowd: int, rng: random.Random, strong: bool
) -> tuple[Image.Image, tuple[int, int]]:
    """Scale a sprite for the crowd it stands in and put it near its position, inside the canvas."""
    low, high = (44, 118) if strong else (60, 108)
    side = rng.uniform(low, high - 8 * (crowd - 1))
    ratio = side / max(sprite.size)
    size = (max(8, round(sprite.width * ratio)), max(8, round(sprite.height * ratio)))
    sprite = sprite.resize(size, Image.Resampling.LANCZOS)
    cx, cy = POSITIONS[position]
    x = cx - sprite.width // 2 + rng.randint(-JITTER, JITTER)
    y = cy - sprite.height // 2 + rng.randint(-JITTER, JITTER)
    return sprite, (min(max(x, 0), SIZE - size[0]), min(max(y, 0), SIZE - size[1]))


def _describe(noun: str, style: str, position: str, mask: np.ndarray, image: np.ndarray) -> dict:
    ys, xs = np.nonzero(mask)
    color, share = color_of(image[mask])
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "noun": noun,
        "style": style,
        "color": color if share >= 0.45 else "",
        "position": position,
        "box": [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)],
        "mask": {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")},
        "area": int(mask.sum()),
    }


def _paint(
    rng: random.Random, sprites: SpriteFolder, recipe: Recipe, textures: list[Image.Image]
) -> tuple[Image.Image, list[dict[str, Any]]] | None:
    """One attempt at a scene; None where an object ended up too hidden."""
    nouns = sprites.nouns(recipe.styles)
    theme, chosen = _choose_nouns(rng, nouns, rng.choice(OBJECTS_PER_SCENE), recipe.broken_prior)
    canvas = _background(rng, theme, textures)
    slots = rng.sample(list(POSITIONS), len(chosen))
    masks: list[np.ndarray] = []
    found: list[tuple[str, str, str, int]] = []
    for noun, position in zip(chosen, slots, strict=True):
        style = rng.choice([s for s in recipe.styles if sprites.files(s, noun)])
        sprite = sprites.open(rng.choice(sprites.files(style, noun)))
        sprite = _augment(sprite, rng, recipe.strong)
        sprite, (x, y) = _place(sprite, position, len(chosen), rng, recipe.strong)
        mask = np.zeros((SIZE, SIZE), bool)
        alpha = np.asarray(sprite.getchannel("A")) > 127
        mask[y : y + sprite.height, x : x + sprite.width] = alpha
        canvas.paste(sprite, (x, y), sprite)
        masks = [m & ~mask for m in masks] + [mask]
        found.append((noun, style, position, int(mask.sum())))
    if any(m.sum() < MIN_VISIBLE * f[3] or not m.any() for m, f in zip(masks, found, strict=True)):
        return None
    pixels = np.asarray(canvas)
    objects = [_describe(*f[:3], m, pixels) for m, f in zip(masks, found, strict=True)]
    return canvas, sorted(objects, key=lambda o: list(POSITIONS).index(o["position"]))


def questions(objects: list[dict[str, Any]], rng: random.Random) -> list[dict[str, str]]:
    """Balanced existence questions (as many absent nouns as present ones), then the other tasks."""
    present = [o["noun"] for o in objects]
    themes = {NOUNS[n] for n in present}
    likely = [n for n in NOUNS if n not in present and NOUNS[n] in themes]
    absent = [n for n in NOUNS if n not in present]
    asked = [(n, "Yes.") for n in present]
    negatives: list[str] = []
    while len(negatives) < len(present):
        noun = rng.choice(likely if likely and rng.random() < 0.4 else absent)
        if noun not in negatives:
            negatives.append(noun)
    asked += [(n, "No.") for n in negatives]
    rng.shuffle(asked)
    rows = [{"question": existence_question(n), "answer": a, "task": "existence"} for n, a in asked]
    for o in objects:
        where, color = f"Where is the {o['noun']}?", f"What color is the {o['noun']}?"
        rows.append({"question": where, "answer": o["position"] + ".", "task": "position"})
        if o["color"]:
            rows.append({"question": color, "answer": o["color"] + ".", "task": "attribute"})
    count = NUMBERS[len(objects)] + "."
    return rows + [{"question": COUNTING_QUESTION, "answer": count, "task": "counting"}]


def draw(
    split: str,
    index: int,
    sprites: SpriteFolder,
    textures: list[Image.Image] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scene number `index` of a split, a pure function of its arguments.

    Returns a row of the data set with `image` as a PIL image (224 x 224 RGB). Raises ValueError for
    an unknown split or where the sprite folder lacks the split's styles.
    """
    if split not in RECIPES:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[split]
    if not sprites.nouns(recipe.styles):
        raise ValueError(
            f"{sprites.root} has no sprites in the styles of {split}: {', '.join(recipe.styles)}"
        )
    rng = random.Random(f"{seed}/{split}/{index}")
    painted = None
    while painted is None:
        painted = _paint(rng, sprites, recipe, textures or [])
    image, objects = painted
    return {
        "id": f"{split}-{index:06d}",
        "image": image,
        "width": SIZE,
        "height": SIZE,
        "caption": caption(objects),
        "objects": objects,
        "questions": questions(objects, rng),
        "source": "composed:" + "+".join(sorted({o["style"] for o in objects})),
    }


def _draw_many(
    indices: range, split: str, sprites: str, textures: str | None, seed: int
) -> list[dict[str, Any]]:
    folder, photos = SpriteFolder(sprites), load_textures(textures)
    return [draw(split, i, folder, photos, seed) for i in indices]


def load_textures(folder: str | Path | None) -> list[Image.Image]:
    """A folder's photographs, for backgrounds; they must show none of the nouns."""
    return [Image.open(p).convert("RGB") for p in sorted(Path(folder).iterdir())] if folder else []


def iterate(
    split: str,
    count: int,
    sprites: str | Path,
    textures: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
) -> Iterator[dict[str, Any]]:
    """Rows 0..count-1 of a split in order, drawn by `workers` processes, with a progress bar."""
    from tqdm.auto import tqdm

    chunks = [range(i, min(i + 16, count)) for i in range(0, count, 16)]
    job = partial(
        _draw_many,
        split=split,
        sprites=str(sprites),
        textures=str(textures) if textures else None,
        seed=seed,
    )
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=count, desc=f"drawing {split}", unit="scene"))
        pool = stack.enter_context(ProcessPoolExecutor(workers)) if workers > 1 else None
        for chunk in pool.map(job, chunks) if pool else map(job, chunks):
            yield from chunk
            bar.update(len(chunk))


def features() -> Any:
    """The data set's `datasets.Features`."""
    from datasets import Features, Image, List, Value

    mask = {"size": List(Value("int32")), "counts": Value("string")}
    text = {k: Value("string") for k in ("noun", "style", "color", "position")}
    objects = {**text, "box": List(Value("float32")), "mask": mask, "area": Value("int32")}
    asked = {k: Value("string") for k in ("question", "answer", "task")}
    return Features(
        {
            "id": Value("string"),
            "image": Image(),
            "width": Value("int32"),
            "height": Value("int32"),
            "caption": Value("string"),
            "objects": List(objects),
            "questions": List(asked),
            "source": Value("string"),
        }
    )


def write_split(rows: Iterator[dict[str, Any]], folder: Path, split: str, lossy: bool) -> Any:
    """One Parquet file `<split>/<split>-00000-of-00001.parquet`, written aside and renamed."""
    import io

    from datasets import Dataset

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        buffer = io.BytesIO()
        row["image"].save(buffer, **(WEBP if lossy else PNG))
        return {**row, "image": {"bytes": buffer.getvalue(), "path": None}}

    data = Dataset.from_list([encoded(r) for r in rows], features=features())
    target = folder / split / f"{split}-00000-of-00001.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".aside")
    data.to_parquet(aside)
    aside.rename(target)
    return data


def build(
    out: str | Path,
    sprites: str | Path,
    sizes: dict[str, int],
    textures: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
    lossy: bool = False,
) -> Path:
    """Write `sizes[split]` scenes of each split as Parquet with a card; returns the folder.

    Args:
        out: the folder to write; each split becomes a config of the same name.
        sprites: `<style>/<noun>/<k>.png`.
        sizes: scenes per split.
        textures: photographs for backgrounds; none means plain and gradient ones only.
        seed: the same seed, sprites and textures give the same bytes.
        workers: processes that draw.
        lossy: WebP (quality 90) instead of PNG, five times smaller.

    Raises:
        ValueError: an unknown split, or styles that the sprite folder lacks, before any drawing.
    """
    folder = SpriteFolder(sprites)
    for split in sizes:
        draw(split, 0, folder, load_textures(textures), seed)
    for split, count in sizes.items():
        rows = iterate(split, count, sprites, textures, seed, workers)
        write_split(rows, Path(out), split, lossy)
    write_card(Path(out), sizes, sorted({s for k in sizes for s in RECIPES[k].styles}))
    return Path(out)


def write_card(folder: Path, sizes: dict[str, int], styles: list[str]) -> None:
    """README.md with `configs` and `dataset_info`, so that `load_dataset` needs no script."""
    import yaml

    schema = features()._to_yaml_list()
    head = {
        "license": "other",
        "license_name": "notices-in-card",
        "task_categories": ["image-text-to-text"],
        "tags": ["firsthand", "hallucination", "synthetic"],
        "configs": [
            {"config_name": s, "data_files": [{"split": s, "path": f"{s}/*.parquet"}]}
            for s in sizes
        ],
        "dataset_info": [
            {
                "config_name": s,
                "features": schema,
                "splits": [{"name": s, "num_examples": n}],
            }
            for s, n in sizes.items()
        ],
    }
    body = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    counts = "\n".join(f"| {s} | {n} |" for s, n in sizes.items())
    body = body.replace("{counts}", counts).replace("{styles}", ", ".join(styles))
    text = "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + body
    (folder / "README.md").write_text(text, encoding="utf-8")
