"""AMBER's own files: annotations, the relation of words, safe words, queries and responses.

What it is: readers of junyangwang0410/AMBER's `data` folder and of its response format. What it is
not: a downloader; the files stay with the user.

    truth = read_truth("AMBER/data")
    rows = read_responses("responses.json")
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Truth", "make_truth", "read_queries", "read_responses", "read_truth"]

KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""AMBER's types of yes/no questions, and what they are called in results."""


@dataclass(frozen=True)
class Truth:
    """What AMBER knows of its images.

    Attributes:
        annotations: id -> `{type, truth, hallu}`: objects shown and objects often imagined, or for
            yes/no questions `truth` "yes" or "no".
        relation: word -> words that may stand for it. The words of both are all that is ever
            counted.
        safe_words: words that are never hallucinated.
    """

    annotations: Mapping[int, Mapping[str, Any]]
    relation: Mapping[str, list[str]]
    safe_words: frozenset[str]


def make_truth(
    annotations: Iterable[Mapping[str, Any]],
    relation: Mapping[str, Iterable[str]],
    safe_words: Iterable[str] = (),
) -> Truth:
    """Ground truth of AMBER's data, checked; words become lower case.

    Raises:
        ValueError: what is no annotation of AMBER's, or names an object that `relation` lacks; a
            word that is several.
        TypeError: a relation that is no mapping to lists.
    """
    if not isinstance(relation, Mapping):
        raise TypeError(f"AMBER's relation maps words to lists, not a {type(relation).__name__}.")
    related = {str(word).lower(): _lower(words, word) for word, words in relation.items()}
    every = [*related, *(word for words in related.values() for word in words)]
    if phrases := [word for word in every if len(word.split()) != 1]:
        raise ValueError(
            f"AMBER's words are single ones, and {phrases[0]!r} would never be found. Leave it out "
            "or write it with a hyphen, as responses do."
        )
    found: dict[int, Mapping[str, Any]] = {}
    for number, entry in enumerate(annotations, 1):
        key = _id_of(entry, number)
        if key in found:
            raise ValueError(f"Annotation {number}: the id {key} occurs twice.")
        found[key] = _annotation(entry, number, related)
    return Truth(found, related, frozenset(word.lower() for word in safe_words if word.strip()))


def _id_of(entry: Any, number: int) -> int:
    if not isinstance(entry, Mapping) or not {"id", "type", "truth"} <= set(entry):
        has = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(
            f"Annotation {number} is none of AMBER's, which have id, type and truth; it has {has}."
        )
    return int(entry["id"])


def _annotation(
    entry: Mapping[str, Any], number: int, related: Mapping[str, list[str]]
) -> Mapping[str, Any]:
    if entry["type"] in KINDS:
        if entry["truth"] not in ("yes", "no"):
            raise ValueError(f"Annotation {number}: {entry['truth']!r} is no yes or no.")
        return {"type": entry["type"], "truth": entry["truth"]}
    if entry["type"] != "generative" or "hallu" not in entry:
        raise ValueError(
            f"Annotation {number} has the unknown type {entry['type']!r} or no `hallu`; AMBER's "
            f"are generative, {', '.join(KINDS)}."
        )
    lists = {part: _lower(entry[part], number) for part in ("truth", "hallu")}
    if stray := [word for part in lists.values() for word in part if word not in related]:
        raise ValueError(
            f"Annotation {number} names {', '.join(stray[:3])}, which the relation lacks. Take "
            "both files from one version of AMBER."
        )
    return {"type": "generative"} | lists


def _lower(words: Any, where: Any) -> list[str]:
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise TypeError(f"{where!r}: expected a list of words, not {words!r}.")
    return [str(word).lower() for word in words]


def read_truth(folder: str | PathLike[str]) -> Truth:
    """Ground truth from the folder that holds annotations.json, relation.json, safe_words.txt.

    Each may be gzipped (`.gz`).

    Raises:
        FileNotFoundError: one of them is missing; the message names it.
        ValueError: files that are none of AMBER's.
    """
    names = ("annotations.json", "relation.json", "safe_words.txt")
    texts = [_text(_present(Path(folder), name)) for name in names]
    annotations, relation = (
        _json(text, name) for text, name in zip(texts, names[:2], strict=False)
    )
    return make_truth(annotations, relation, texts[2].split())


def _present(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no {name}; give the folder `data` of AMBER.")


def _text(path: str | PathLike[str]) -> str:
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def _json(text: str, where: Any) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _listed(path: str | PathLike[str], fields: set[str]) -> list[dict[str, Any]]:
    """Entries of a JSON list, or of one JSON object a line."""
    text = _text(path)
    if text.lstrip().startswith("["):
        entries = _json(text, path)
    else:
        entries = [_json(line, path) for line in text.splitlines() if line.strip()]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not fields <= set(entry):
            has = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{path}, entry {number} needs {sorted(fields)} and has {has}.")
    return entries


def read_responses(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Prediction rows of a file in AMBER's format: `[{"id": 1, "response": "..."}]`.

    One object a line is read, too, and `.gz`. `image_id` is the row's own, else its id.

    Raises:
        ValueError: entries without id or response.
    """
    return [
        {"image_id": entry["id"]} | entry | {"prediction": entry["response"]}
        for entry in _listed(path, {"id", "response"})
    ]


def read_queries(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Rows `{id, image_id, image, question}` of AMBER's query_*.json, to be answered by a model.

    `image` and `image_id` are the image's file name.

    Raises:
        ValueError: entries without id, image or query.
    """
    return [
        {"id": e["id"], "image_id": e["image"], "image": e["image"], "question": e["query"]}
        for e in _listed(path, {"id", "image", "query"})
    ]
