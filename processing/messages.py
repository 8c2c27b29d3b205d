"""What a model behind an endpoint is asked, and its reply read strictly.

What it is: our prompts (files in `processing/prompts`) as chat messages with an image, and the one
JSON object that a reply must be. What it is not: a client (`endpoint.py`).

    message(render("judge_covers", phrase="the dog"), image)
    json_object('{"covers": true, "reason": "..."}', {"covers": bool, "reason": str})
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from PIL import Image

SENT_PIXELS = 768  # of the longer side of an image that is sent


def render(template: str, **fields: Any) -> str:
    """A prompt of `processing/prompts` with its fields filled in; a missing field is an error."""
    from jinja2 import Environment, StrictUndefined

    source = files("firsthand.processing.prompts").joinpath(f"{template}.jinja")
    found = Environment(undefined=StrictUndefined, autoescape=False).from_string(
        source.read_text("utf-8")
    )
    return found.render(**fields).strip()


def message(text: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
    """Chat messages for `Endpoint.ask_many`: an image (JPEG, SENT_PIXELS at most) and a text."""
    if image is None:
        return [{"role": "user", "content": text}]
    small = image.convert("RGB")
    small.thumbnail((SENT_PIXELS, SENT_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    return [{"role": "user", "content": content}]


def json_object(text: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The one JSON object of a reply; a code fence around it is allowed.

    Args:
        text: the reply.
        fields: its keys, all of them, and the type of each; `float` takes whole numbers too.

    Raises:
        ValueError: for anything else, saying what.
    """
    inner = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(inner.group(1) if inner else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the reply is not JSON: {error}") from None
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ValueError(f"the reply is not an object with the keys {', '.join(fields)}")
    for key, kind in fields.items():
        allowed = (int, float) if kind is float else (kind,)
        if type(value[key]) not in allowed:
            raise ValueError(f"{key} is {value[key]!r}, not {kind.__name__}")
    return value
