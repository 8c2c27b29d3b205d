"""Images with dense captions, and charts with tables, read into one source of records.

What it is: Visual Genome's region_descriptions.json, LRV's vg_annotation.json, COCO's instances
with its captions, composed scenes, JSONL of one's own, and folders of chart tables, each as records
of one form. What it is not: a check of records; `read` judges one, so that a bad one is a row like
any other.

    source = write_source("region_descriptions.json", "out/source")

A record is `{image_id, image (file name), regions: [{caption, bbox: [x, y, width, height]}],
captions: [of the whole image]}`, or `{image_id, image, title, table: [{column: value}]}`. Boxes are
in pixels. A region may say more of its object, which is then known exactly: `noun`, `color`,
`position`, `kind`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from firsthand.recipes import conversations
from firsthand.recipes.inputs import SUFFIXES

Record = dict[str, Any]
FOLDERS = ("", "VG_100K", "VG_100K_2")  # where Visual Genome's images lie
TABLES = (".csv", ".json")
MORE = ("noun", "color", "position", "kind")


def write_source(
    data: str, out: str | Path, captions: str | None = None, split: str = "train"
) -> Path:
    """The records of `data` as Parquet, as `conversations.write_source` does.

    Args:
        data: a file or folder as the module says, or a Hub id; `scenes` are the demo's.
        out: the folder; kept where it is there.
        captions: COCO's captions_*.json, for an instances_*.json.
        split: of the scenes or the Hub's data set.

    Raises:
        ValueError: where there are no records, or a JSON file has none of the layouts.
    """
    if Path(out).exists():
        return Path(out)
    return conversations.write_records(_rows(data, captions, split), data, out)


def fingerprint(data: str, split: str) -> dict[str, Any]:
    """What tells one input from another; as `conversations.fingerprint`, and for charts' tables.

    Raises:
        FileNotFoundError: for what looks like a file and is none.
    """
    if data == "scenes":
        return {"name": data, "split": split}
    if tables := _tables(Path(data)):
        content = hashlib.sha256()
        for file in tables:
            content.update(file.name.encode() + file.read_bytes())
        return {"folder": Path(data).name, "sha256": content.hexdigest()}
    return conversations.fingerprint(data, split)


def _rows(data: str, captions: str | None, split: str) -> Iterator[Record]:
    from firsthand.recipes.demo_data import SCENES

    path = SCENES if data == "scenes" else Path(data)
    scenes = path / split / f"{split}-00000-of-00001.parquet"
    if ".jsonl" in path.name:
        return _lines(path)
    if data.endswith(conversations.JSON_FILES):
        return _numbered(_layout(_json(path), data, captions))
    if scenes.exists():
        return conversations.dataset_rows(str(scenes), split)
    if tables := _tables(path):
        return _numbered(map(_chart, tables))
    return conversations.dataset_rows(data, split)


def _json(path: Path | str) -> Any:
    opener: Any = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None


def _lines(path: Path) -> Iterator[Record]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield {"place": f"line {number}", "record": line.strip(), "image": None}


def _numbered(records: Iterator[Record]) -> Iterator[Record]:
    for number, record in enumerate(records, 1):
        yield {"place": f"record {number}", "record": json.dumps(record), "image": None}


def _layout(content: Any, data: str, captions: str | None) -> Iterator[Record]:
    """Records of a JSON file. Raises ValueError for a layout that is not known."""
    if isinstance(content, list):
        return iter(content)
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content):
        return _coco(content, captions)
    if isinstance(content, dict) and all(isinstance(v, list) for v in content.values()):
        return ({"image_id": key, "regions": regions} for key, regions in content.items())
    raise ValueError(
        f"{data} has none of the layouts that are read: a list of records with `regions` (Visual "
        "Genome), {image_id: [{caption, bbox}]}, or COCO's instances"
    )


def _coco(content: Mapping[str, Any], captions: str | None) -> Iterator[Record]:
    """A record an image: its instances as regions, and what the captions file says of it."""
    kinds = {category["id"]: category for category in content["categories"]}
    regions: dict[Any, list[Record]] = {}
    for one in content["annotations"]:
        category = kinds[one["category_id"]]
        region = {"caption": category["name"], "noun": category["name"], "bbox": one["bbox"]}
        region |= {"kind": category["supercategory"]} if "supercategory" in category else {}
        if not one.get("iscrowd"):
            regions.setdefault(one["image_id"], []).append(region)
    said: dict[Any, list[str]] = {}
    for one in _json(captions)["annotations"] if captions else ():
        said.setdefault(one["image_id"], []).append(one["caption"])
    for image in content["images"]:
        yield {
            "image_id": image["id"],
            "image": image["file_name"],
            "regions": regions.get(image["id"], []),
            "captions": said.get(image["id"], []),
        }


def _tables(path: Path) -> list[Path]:
    """The tables of a folder of charts; none where it holds Parquet."""
    if not path.is_dir() or any(path.rglob("*.parquet")):
        return []
    return sorted(file for file in path.iterdir() if file.suffix in TABLES)


def _chart(file: Path) -> Record:
    """A chart's record; a table that cannot be read is left for `read` to refuse."""
    record: Record = {"image_id": file.stem, "image": file.stem, "table": None}
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as opened:
            return record | {"table": list(csv.DictReader(opened))}
    try:
        content = _json(file)
    except ValueError as error:
        return record | {"error": str(error)}
    held = isinstance(content, dict) and "table" in content
    return record | (content if held else {"table": content})


def read(record: Mapping[str, Any]) -> Record:
    """A record as the generators take it: `image_id`, `regions`, `captions`, `title`, `table`.

    Raises:
        ValueError: where it has neither regions nor a table, or they are not as they should be.
    """
    if record.get("error"):
        raise ValueError(f"invalid table: {record['error']}")
    name = record.get("image_id", record.get("id"))
    if name is None or isinstance(name, (dict, list)):
        raise ValueError("no image_id: the record does not say which image it describes")
    found: Record = {"image_id": str(name), "title": str(record.get("title") or "")}
    if "table" in record:
        return found | {"regions": [], "captions": [], "table": table_of(record["table"])}
    given = record.get("objects") if "regions" not in record else record["regions"]
    if not isinstance(given, list) or not given:
        raise ValueError(f"no regions: nothing is known of the image {name}")
    said = record.get("captions") or []
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        raise ValueError(f"invalid captions: of the image {name}")
    return found | {"regions": [_region(one) for one in given], "captions": said, "table": []}


def _region(given: Any) -> Record:
    """`{caption, bbox}`, and what else is known, of any layout's region or a scene's object."""
    if not isinstance(given, Mapping):
        raise ValueError(f"invalid region: {str(given)[:80]!r} is no object")
    more = {name: given[name] for name in MORE if given.get(name)}
    if "box" in given:  # of a scene: two corners
        left, top, right, bottom = given["box"]
        caption, box = given["noun"], [left, top, right - left, bottom - top]
        caption = f"{more.get('color', '')} {caption}".strip()
    else:
        caption = given.get("caption", given.get("phrase"))
        box = given.get("bbox") or [given.get(side) for side in ("x", "y", "width", "height")]
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("invalid region: its caption is empty")
    if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        raise ValueError(f"invalid region: the box of {caption!r} is {box}, not four numbers")
    if not all(isinstance(text, str) for text in more.values()):
        raise ValueError(f"invalid region: what is known of {caption!r} is not text")
    return {"caption": caption.strip(), "bbox": [float(side) for side in box], **more}


def table_of(given: Any) -> list[dict[str, Any]]:
    """A chart's data as rows: given as rows, as columns, or as `{columns, rows}`.

    Numbers that are written as text become numbers.

    Raises:
        ValueError: for anything else, fewer than two rows or two columns, or rows of several kinds.
    """
    if isinstance(given, Mapping) and {"columns", "rows"} == set(given):
        if not all(len(row) == len(given["columns"]) for row in given["rows"]):
            raise ValueError("invalid table: a row has not as many values as there are columns")
        given = [dict(zip(given["columns"], row, strict=True)) for row in given["rows"]]
    elif isinstance(given, Mapping):
        columns = list(given.values())
        if not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            raise ValueError("invalid table: its columns are not lists of one length")
        given = [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(given, list) or not all(isinstance(row, Mapping) for row in given):
        raise ValueError("invalid table: it is neither rows nor columns")
    if len(given) < 2 or len(given[0]) < 2:
        raise ValueError("invalid table: it has fewer than two rows or two columns")
    if any(set(row) != set(given[0]) or None in row or None in row.values() for row in given):
        raise ValueError("invalid table: its rows do not have the same columns")
    return [{str(name): _value(value) for name, value in row.items()} for row in given]


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        number = float(value.replace(",", ""))
    except ValueError:
        return value.strip()
    return int(number) if number.is_integer() else number


def find_image(
    record: Mapping[str, Any], carried: Mapping[str, Any] | None, folder: str | None
) -> dict[str, Any]:
    """The record's image file as `{bytes, path}`; as `conversations.find_image`, and below FOLDERS.

    A record without a file name is looked for by its `image_id`, with any suffix.
    """
    name = record.get("image", record.get("image_id", record.get("id")))
    if carried is not None or folder is None:
        found = conversations.find_image({**record, "image": name}, carried, folder)
        if found is None:
            raise ValueError("no image: the record carries none")
        return found
    if not isinstance(name, (str, int)) or ".." in PurePosixPath(str(name)).parts:
        raise ValueError(f"no image: the record names {name!r}")
    suffixes = ("",) if PurePosixPath(str(name)).suffix.lower() in SUFFIXES else SUFFIXES
    for place in FOLDERS:
        for suffix in suffixes:
            inside = str(PurePosixPath(place) / f"{name}{suffix}")
            if (Path(folder) / inside).is_file():
                found = conversations.find_image({"image": inside}, None, folder)
                assert found is not None
                return found
    raise FileNotFoundError(f"missing image: {name} in {folder}")
