"""The explainability Space: upload an image, ask, click a word, see what the word leans on.

It loads the model that models.json allows and serves the page. What stands on the page is
`pages.py`, what it does `handlers.py`, what the model is asked `engine.py`.

    python app.py                                  # the demo model
    FIRSTHAND_MODEL=path/to/checkpoint python app.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from firsthand.modeling.steering import SteeringVector
from firsthand.recipes.demo_data import load_scenes, package_photos
from firsthand.spaces.explainability.engine import MAX_NEW_TOKENS, Engine
from firsthand.spaces.explainability.handlers import Page
from firsthand.spaces.explainability.images import read_image
from firsthand.spaces.explainability.pages import QUESTION, build_app, launch

MODELS = Path(__file__).with_name("models.json")
SCENES, PHOTOS = 5, 3  # pictures to pick from
DEFAULTS = {
    "title": "",
    "question": QUESTION,
    "steering": None,
    "max_new_tokens": MAX_NEW_TOKENS,
    "warn_at": 0.5,
}


def allowed_model() -> tuple[str, dict[str, Any]]:
    """The name that FIRSTHAND_MODEL gives (a name in models.json or a folder), and its settings.

    Raises:
        ValueError: when it is neither.
    """
    allowed = json.loads(MODELS.read_text())
    name = os.environ.get("FIRSTHAND_MODEL", "demo")
    if name not in allowed and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"FIRSTHAND_MODEL is {name!r}: neither a checkpoint folder nor one of "
            f"{', '.join(allowed)}. Add it to {MODELS.name} to allow it."
        )
    return name, DEFAULTS | allowed.get(name, {})


def load_engine(name: str, settings: dict[str, Any]) -> Engine:
    """The model `name`, ready to answer and explain."""
    bound, vector = settings["max_new_tokens"], steering(settings["steering"])
    if name == "demo":
        from firsthand.recipes.demo_model import load_demo_model, load_vision_model

        model, processor = load_demo_model()
        return Engine(model, processor, vector, load_vision_model()[0], bound)
    from firsthand.recipes.inputs import open_checkpoint

    device = "cuda" if "SPACES_ZERO_GPU" in os.environ else "auto"
    return Engine(*open_checkpoint(name, device_map=device), vector, None, bound)


def steering(place: str | None) -> SteeringVector | None:
    """The vector that models.json names: a folder beside it, or a repo of the Hub."""
    if place is None:
        return None
    beside = MODELS.parent / place
    return SteeringVector.from_pretrained(beside if beside.is_dir() else place)


def examples() -> list[Image.Image]:
    """Pictures to pick from: composed scenes, and photographs of installed packages."""
    scenes = [row["image"].convert("RGB") for row in load_scenes("test", SCENES)]
    return scenes + [read_image(path) for path in package_photos()[:PHOTOS]]


def main() -> None:
    """Load the allowed model and serve the page until it is stopped."""
    name, settings = allowed_model()
    page = Page(load_engine(name, settings), examples())
    about = f"Model: **{settings['title'] or Path(name).name}**"
    launch(build_app(page, settings["question"], settings["warn_at"], about))


if __name__ == "__main__":
    main()
