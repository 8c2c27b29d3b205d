"""Fetch the sprites and build the scenes data set: the sources behind `datasets_scripts/scenes`.

What it is: the step from npm's emoji packages (drawings of the same nouns in several styles, each
under a licence that allows adaptation) to a folder of PNG sprites, and from there to Parquet. What
it
is not: needed by the demo or the tests, which use the committed Parquet.

    python -m firsthand.recipes.build_scenes --sprites sprites --out scenes --split train=4800
    python -m firsthand.recipes.build_scenes --sprites sprites --photos /usr/share/tuxpaint/stamps \
        --out scenes --split test_photo=200      # photo cut-outs, GPL-2: for local evaluation only

Needs npm and the extra `scenes` (resvg-py, scikit-image).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from firsthand.datasets_scripts.scenes import scenes

SPRITE_SIDE = 160  # pixels; no scene draws an object larger
ICONIFY = ("fluent-emoji", "fluent-emoji-flat", "noto", "noto-v1", "emojione", "fxemoji", "twemoji")
FLUENT_3D = "@lobehub/fluent-emoji-3d"
PACKAGES = (*(f"@iconify-json/{name}" for name in ICONIFY), FLUENT_3D)
TEXTURES = ("brick", "grass", "gravel")  # CC0 photographs that scikit-image carries
PHOTO_STAMPS = {  # Debian's tuxpaint-stamps-default, paths below its stamps folder
    "dog": ("animals/mammals/dogs/dog",),
    "lion": ("animals/mammals/cats/lion", "animals/mammals/cats/lion-2"),
    "horse": ("animals/mammals/equines/horse",),
    "zebra": ("animals/mammals/equines/zebra",),
    "cow": ("animals/mammals/bovines/cow", "animals/mammals/bovines/cow_white"),
    "sheep": ("animals/mammals/bovines/sheep", "animals/mammals/bovines/sheep_lamb"),
    "elephant": ("animals/mammals/elephant",),
    "giraffe": ("animals/mammals/giraffe",),
    "pig": ("animals/mammals/pig", "animals/mammals/pig_golden"),
    "rabbit": ("animals/mammals/rodents/rabbit", "animals/mammals/rodents/rabbit-2"),
    "monkey": ("animals/mammals/apes/gorilla",),
    "whale": ("animals/mammals/aquatic/whale",),
    "bee": ("animals/insects/bee",),
    "chicken": ("animals/birds/chicken_profile", "animals/birds/hen"),
    "penguin": ("animals/birds/penguin", "animals/birds/magellanic_penguin"),
    "bird": ("animals/birds/rainbow-lorikeet", "animals/birds/adelaide-rosella"),
    "fish": ("animals/fish/clownfish", "animals/fish/butterflyfish"),
    "pizza": ("food/pizza",),
    "apple": ("food/fruit/apple_red", "food/fruit/apple_green", "food/fruit/apple_fuji"),
    "banana": ("food/fruit/banana",),
    "orange": ("food/fruit/orange",),
    "pineapple": ("food/fruit/pineapple",),
    "strawberry": ("food/fruit/strawberry", "food/fruit/Strawberry2"),
    "grapes": ("food/fruit/grapes",),
    "broccoli": ("food/vegetables/broccoli",),
    "carrot": ("food/vegetables/carrot",),
    "tomato": ("food/vegetables/tomato",),
    "mushroom": ("food/vegetables/mushroom",),
    "corn": ("food/vegetables/corn",),
    "scissors": ("household/arttools/scissors_small_open",),
    "camera": ("hobbies/camera_35mm",),
    "guitar": ("hobbies/music/string/guitar_classical", "hobbies/music/string/guitar_electric"),
    "violin": ("hobbies/music/string/violin",),
    "trumpet": ("hobbies/music/brass/trumpet",),
    "basketball": ("sports/basketball",),
    "bus": ("vehicles/masstransit/green_korean_bus",),
    "car": ("vehicles/auto/sedan", "vehicles/auto/beetle"),
    "truck": ("vehicles/auto/truck",),
    "airplane": ("vehicles/flight/planes/747",),
    "balloon": ("vehicles/flight/balloon360",),
    "rose": ("plants/flowers/rose",),
}


def install_packages(folder: Path) -> Path:
    """`npm install` the sprite packages into a folder; returns its node_modules."""
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not on PATH: install Node.js, or use the committed scenes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}')
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "node_modules"


def _icon(icons: dict, name: str) -> dict | None:
    alias = icons.get("aliases", {}).get(name)
    if alias:
        return _icon(icons, alias["parent"])
    return icons["icons"].get(name)


def _render(icons: dict, icon: dict) -> Image.Image:
    import resvg_py

    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIDE, skip_system_fonts=True)
    return Image.open(BytesIO(bytes(png))).convert("RGBA")


def iconify_sprites(modules: Path, style: str) -> Iterator[tuple[str, Image.Image]]:
    """(noun, sprite) of one SVG package; a drawing listed under two names comes once."""
    icons = json.loads((modules / "@iconify-json" / style / "icons.json").read_text())
    for theme in scenes.THEMES.values():
        for noun, names in theme["nouns"].items():
            found = [icon for name in names if (icon := _icon(icons, name))]
            unique = {icon["body"]: icon for icon in found}.values()
            yield from ((noun, _render(icons, icon)) for icon in unique)


def fluent_3d_sprites(modules: Path) -> Iterator[tuple[str, Image.Image]]:
    """(noun, sprite) of the rendered style, whose files are named by code point."""
    folder = modules / FLUENT_3D / "assets"
    chars = json.loads((modules / "@iconify-json" / "fluent-emoji-flat" / "chars.json").read_text())
    points = {name: code for code, name in chars.items()}
    for theme in scenes.THEMES.values():
        for noun, names in theme["nouns"].items():
            for name in names:
                file = folder / f"{points.get(name, '')}.webp"
                if file.exists():
                    yield noun, Image.open(file).convert("RGBA").resize((SPRITE_SIDE,) * 2)


def photo_sprites(stamps: Path) -> Iterator[tuple[str, Image.Image]]:
    """(noun, cut-out) of the photographs among Tux Paint's stamps (GPL-2: never redistribute)."""
    for noun, paths in PHOTO_STAMPS.items():
        for path in paths:
            image = Image.open(stamps / f"{path}.png").convert("RGBA")
            image.thumbnail((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)
            yield noun, image


def write_style(folder: Path, style: str, sprites: Iterator[tuple[str, Image.Image]]) -> int:
    """`<folder>/<style>/<noun>/<k>.png`; returns how many sprites were written."""
    numbers: dict[str, int] = {}
    for noun, image in tqdm(sprites, desc=f"sprites {style}", unit="sprite"):
        k = numbers[noun] = numbers.get(noun, -1) + 1
        target = folder / style / noun.replace(" ", "_") / f"{k}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    return sum(numbers.values()) + len(numbers)


def write_textures(folder: Path) -> Path:
    """The background photographs, read out of the installed scikit-image."""
    import skimage

    folder.mkdir(parents=True, exist_ok=True)
    source = Path(skimage.__file__).parent / "data"
    for name in TEXTURES:
        Image.open(source / f"{name}.png").convert("RGB").save(folder / f"{name}.png")
    return folder


def fetch_sprites(folder: Path, photos: Path | None = None) -> Path:
    """Fill a sprite folder: every style, the textures beside them. Finished folders are kept."""
    if not (folder / "complete").exists():
        with tempfile.TemporaryDirectory() as scratch:
            modules = install_packages(Path(scratch))
            write_style(folder, "fluent-3d", fluent_3d_sprites(modules))
            for style in ICONIFY:
                write_style(folder, style, iconify_sprites(modules, style))
        write_textures(folder / "textures")
        (folder / "complete").touch()
    if photos and not (folder / scenes.PHOTO_STYLE).exists():
        write_style(folder, scenes.PHOTO_STYLE, photo_sprites(photos))
    return folder


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Build the scenes data set.")
    parser.add_argument("--sprites", type=Path, required=True, help="sprite folder, made if absent")
    parser.add_argument("--out", type=Path, required=True, help="folder for Parquet and card")
    parser.add_argument("--split", action="append", required=True, metavar="NAME=COUNT")
    parser.add_argument("--photos", type=Path, help="Tux Paint's stamps folder, for test_photo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lossy", action="store_true", help="WebP at quality 90 instead of PNG")
    args = parser.parse_args(argv)
    sizes = {name: int(count) for name, count in (s.split("=") for s in args.split)}
    folder = fetch_sprites(args.sprites, args.photos)
    textures = folder / "textures"
    scenes.build(args.out, folder, sizes, textures, args.seed, args.workers, args.lossy)


if __name__ == "__main__":
    main()
