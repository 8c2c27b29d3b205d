"""The demo's data: the committed scenes, and the photographs that installed packages ship.

rows = load_scenes("test", 40); photos = package_photos()
"""

from __future__ import annotations

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from firsthand.datasets_scripts.scenes import scenes

SCENES = Path(scenes.__file__).parent / "data"
PHOTOS = {
    "skimage": ("data/coffee.png", "data/chelsea.png", "data/rocket.jpg"),
    "gradio": ("media_assets/images/lion.jpg", "media_assets/images/cheetah.jpg"),
}


def load_scenes(
    split: str, count: int | None = None, folder: Path | None = None
) -> list[dict[str, Any]]:
    """The first `count` scenes of a split (all if None), with PIL images; committed ones by
    default.

    Read straight from Parquet: no cache folder is written and nothing is fetched.
    """
    import pyarrow.parquet as parquet

    folder = folder or SCENES
    file = folder / split / f"{split}-00000-of-00001.parquet"
    if not file.exists():
        known = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise ValueError(f"{folder} has no scenes of split {split!r}: only {', '.join(known)}")
    rows = parquet.read_table(file).slice(0, count).to_pylist()
    return [{**r, "image": Image.open(BytesIO(r["image"]["bytes"]))} for r in rows]


def load_split(split: str, count: int | None, elsewhere: Path | None) -> list[dict[str, Any]]:
    """`load_scenes` of a committed split, else of one in the folder `elsewhere`."""
    return load_scenes(split, count, SCENES if (SCENES / split).exists() else elsewhere)


def package_photos() -> list[Path]:
    """Photographs inside scikit-image and gradio, of those that are installed."""
    found = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        found += [folder / n for n in names if folder and (folder / n).exists()]
    return found
