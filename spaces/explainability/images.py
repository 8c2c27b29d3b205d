"""The pictures that visitors give: bounded before they are decoded, never fetched from addresses.

It reads files; it knows nothing of the model or the page.

    image = bounded(gr.Image()); read_image(Path("photo.jpg"))
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES = 10_000_000
MAX_PIXELS = 16_000_000
MAX_SIDE = 1024  # pixels kept for drawing


def bounded(component: gr.Image) -> gr.Image:
    """Let an image input take uploaded files only, within bounds; addresses are not fetched.

    (Set on the instance: for a subclass, gradio would write a stub file beside this one.)
    """
    keep = component.async_move_resource_to_block_cache

    async def keep_uploads(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("Upload the image as a file; addresses are not fetched.")
        return await keep(path)

    def preprocess(payload: ImageData | None) -> Image.Image | None:
        if payload is None:
            return None
        if payload.path is None:
            raise gr.Error("Upload the image as a file.")
        return read_image(Path(payload.path))

    component.async_move_resource_to_block_cache = keep_uploads
    component.preprocess = preprocess
    return component


def read_image(path: Path) -> Image.Image:
    """The upright RGB image of a file, at most MAX_SIDE pixels a side; bounds are checked unread.

    Raises:
        gr.Error: when the file is too large, too many pixels, or no image.
    """
    if path.stat().st_size > MAX_BYTES:
        raise gr.Error(f"The file is larger than {MAX_BYTES // 1_000_000} MB.")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.width * image.height > MAX_PIXELS:
                raise gr.Error(
                    f"The image has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS // 1_000_000} million are taken."
                )
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise gr.Error("The file cannot be read as an image.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise gr.Error("The image has too many pixels.") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture
