"""Ground truth of CHAIR: which objects an image shows.

What it is: the union of an image's instance annotations and of what its reference captions
mention, as Rohrbach et al. (2018, arXiv 1809.02156, section 3.1) make it, or a file of your own.
What it is not: a downloader; COCO's annotation files stay with the user.

    objects = objects_from_coco("instances_val2014.json.gz", "captions_val2014.json.gz")
    objects = read_objects("objects.json")          # {image_id: [name, ...]}
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

from .coco import COCO
from .lexicon import Lexicon
from .variants import choose_lexicon

__all__ = ["objects_from_coco", "read_objects"]

Path = str | PathLike[str]


def objects_from_coco(
    instances: Path | Iterable[Path],
    captions: Path | Iterable[Path] = (),
    lexicon: Lexicon = COCO,
    variant: str = "original",
) -> dict[int, list[str]]:
    """Image id -> the nodes it shows, sorted, from annotation files in COCO's format.

    The published numbers use instances and captions of train2014 and val2014 together. Without
    captions the truth is stricter than CHAIR's, and numbers do not compare. Every image that a
    file lists has an entry, if an empty one.

    Args:
        instances: an `instances_*.json` or several; gzipped ones are read as they are.
        captions: the `captions_*.json` of the same images, likewise; may be none.
        lexicon, variant: whose words are found in the captions, as in `score`.

    Raises:
        ValueError: a file is no such annotation file; the message says what it holds.
        OSError: a file cannot be read.
    """
    lexicon = choose_lexicon(lexicon, variant)
    objects: dict[int, set[str]] = {}
    for path in _paths(instances):
        content = _read_coco(path, "annotations", "categories")
        nodes = _category_nodes(path, content["categories"], lexicon)
        for image_id, category in _listed(path, content, "category_id"):
            if category not in nodes:
                raise ValueError(f"{path}: its categories do not list the category {category!r}.")
            objects.setdefault(image_id, set()).add(nodes[category])
        _add_images(objects, content)
    for path in _paths(captions):
        content = _read_coco(path, "annotations")
        for image_id, caption in _listed(path, content, "caption"):
            if not isinstance(caption, str):
                kind = type(caption).__name__
                raise ValueError(f"{path}: a caption of image {image_id!r} is a {kind}, no text.")
            nodes_here = {mention.node for mention in lexicon.mentions(caption)}
            objects.setdefault(image_id, set()).update(nodes_here)
        _add_images(objects, content)
    return {image_id: sorted(shown) for image_id, shown in objects.items()}


def read_objects(path: Path) -> dict[str, list[str]]:
    """`{image_id: [name, ...]}` from a JSON file, gzipped or not; ids are text, as in JSON.

    Raises:
        ValueError: the file holds something else; the message says what.
        OSError: the file cannot be read.
    """
    content = _read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        raise ValueError(
            f"{path} is a COCO annotation file, not {{image_id: [name, ...]}}. Make objects of it "
            "with objects_from_coco(instances, captions)."
        )
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_what(content)}, not {{image_id: [name, ...]}}.")
    for image_id, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: image {image_id!r} has {_what(names)}, no list of names.")
    return content


def _paths(given: Path | Iterable[Path]) -> list[Path]:
    return [given] if isinstance(given, (str, PathLike)) else list(given)


def _read_json(path: Path) -> Any:
    with open(path, "rb") as file:
        data = file.read()
    try:
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no JSON, or not whole: {error}") from error


def _read_coco(path: Path, *needed: str) -> dict[str, Any]:
    content = _read_json(path)
    lists = content if isinstance(content, dict) else {}
    if lacking := [key for key in needed if not isinstance(lists.get(key), list)]:
        raise ValueError(
            f"{path} holds {_what(content)}: a COCO file of this kind has lists named "
            f"{' and '.join(needed)}, and this has no {lacking[0]}. Are instances and captions "
            "swapped? Any other truth goes in as {image_id: [name, ...]}."
        )
    return lists


def _what(content: Any) -> str:
    if isinstance(content, dict):
        return f"an object with the keys {', '.join(sorted(map(str, content))[:5]) or '(none)'}"
    if isinstance(content, list):
        return f"a list of {len(content)}"
    return f"{content!r:.40}"


def _category_nodes(path: Path, categories: list[Any], lexicon: Lexicon) -> dict[Any, str]:
    try:
        return {category["id"]: lexicon.node(category["name"]) for category in categories}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its categories are not all like {{id, name}}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _listed(path: Path, content: dict[str, Any], field: str) -> Iterator[tuple[Any, Any]]:
    """(image id, field) of every annotation."""
    for number, annotation in enumerate(content["annotations"]):
        try:
            yield annotation["image_id"], annotation[field]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: annotation {number} is {_what(annotation)}; it needs image_id and "
                f"{field}. Are instances and captions swapped?"
            ) from error


def _add_images(objects: dict[int, set[str]], content: dict[str, Any]) -> None:
    """Images without an annotation show nothing; that is not the same as being unknown."""
    for image in content.get("images", []):
        objects.setdefault(image["id"], set())
