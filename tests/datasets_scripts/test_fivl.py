"""Grounded samples: what is built is what is loaded, and what breaks the contract is refused."""

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from pycocotools import mask as coco_mask

from firsthand.datasets_scripts.fivl import fivl


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def mask_of(size, box):
    inside = np.zeros(size[::-1], bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    return inside


def expression(**changes):
    one = {
        "text": "red kite",
        "phrase": "red kite",
        "char_start": 2,
        "char_end": 10,
        "nouns": ["kite"],
        "boxes": [[3.0, 4.0, 9.0, 12.0]],
        "score": 0.5,
        "mask": rle(mask_of((32, 24), (3, 4, 9, 12))),
    }
    return {**one, **changes}


def row(number=0, *expressions, **changes):
    turn = {"question": "What is there?", "answer": "A red kite.", "expressions": expressions}
    image = Image.new("RGB", (32, 24), (number % 256, 9, 9))
    return {"id": f"r{number}", "image": image, "turns": [turn], **changes}


def test_what_is_built_is_what_is_loaded(tmp_path):
    rejected = [{"turn": 1, "text": "unicorn", "reason": "not found in the image"}]
    text = {"id": "t", "turns": [{"question": "Hi?", "answer": "Hello."}]}
    rows = [row(n, expression(), source="made") for n in range(300)]
    rows += [row(300, expression(score=None, mask=None), rejected=rejected), text]
    folder = fivl.build(tmp_path / "out", rows, "validation", about="Made for a test.")
    assert len(list((folder / "data").glob("*.parquet"))) == 2
    loaded = load_dataset(str(folder), split="validation")
    assert loaded.features == fivl.features() and len(loaded) == 302
    first, last, only_text = loaded[0], loaded[300], loaded[301]
    assert first["turns"][0]["expressions"] == [expression()]
    assert first["image"].getpixel((0, 0)) == (0, 9, 9) and first["source"] == "made"
    assert last["turns"][0]["expressions"][0]["mask"] is None and last["rejected"] == rejected
    assert only_text["image"] is None and only_text["turns"][0]["expressions"] == []
    decoded = coco_mask.decode(first["turns"][0]["expressions"][0]["mask"]).astype(bool)
    assert (decoded == mask_of((32, 24), (3, 4, 9, 12))).all()
    assert len(set(loaded["record_key"])) == 257, "the colours repeat after 256 rows"
    card = (folder / "README.md").read_text("utf-8")
    for line in ("| rows | 302 |", "| expressions with a mask | 300 |", "Made for a test."):
        assert line in card
    assert "| rejected: not found in the image | 1 |" in card


def test_the_key_is_of_image_and_conversation():
    turns = [{"question": "a", "answer": "b"}]
    key = fivl.record_key(b"image", turns)
    assert len(key) == 64 and key == fivl.record_key(b"image", turns + [])
    assert key != fivl.record_key(b"other", turns) != fivl.record_key(None, turns)
    assert key != fivl.record_key(b"image", [{"question": "ab", "answer": ""}])
    assert key != fivl.record_key(b"image", turns * 2)
    more = [{**turns[0], "expressions": [expression()]}]
    assert key == fivl.record_key(b"image", more)


def test_paths_and_stored_images_are_taken_too(tmp_path):
    Image.new("RGB", (32, 24), (1, 2, 3)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    named = fivl.checked(row(image=tmp_path / "a.png"))
    stored = fivl.checked(row(image={"bytes": data, "path": "a.png"}))
    assert named == stored and named["image"] == {"bytes": data, "path": "a.png"}


BROKEN = [
    (row(turns=[]), "no turns"),
    (row(0, expression(char_start=0)), "characters 0 to 10 of its answer are 'A red kite'"),
    (row(0, expression(mask=rle(mask_of((24, 32), (1, 1, 5, 5))))), "its mask is"),
    (row(0, expression(mask=rle(np.zeros((24, 32), bool)))), "its mask is empty"),
    (row(0, expression(), image=None), "its row no image"),
]


@pytest.mark.parametrize("bad, told", BROKEN, ids=[told for _, told in BROKEN])
def test_a_row_that_breaks_the_contract_is_refused(bad, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        fivl.build(tmp_path / "out", [row(), bad])
    assert not (tmp_path / "out" / "data").exists()
    fivl.build(tmp_path / "out", [row()])
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 1


def test_a_photograph_on_its_side_has_the_size_that_it_is_shown_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (24, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert fivl.checked(row(0, expression(), image=tmp_path / "a.jpg"))["id"] == "r0"


def test_nothing_and_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        fivl.build(tmp_path / "out", [])
    fivl.build(tmp_path / "out", [row()])
    with pytest.raises(ValueError, match="holds data already"):
        fivl.build(tmp_path / "out", [row()])
