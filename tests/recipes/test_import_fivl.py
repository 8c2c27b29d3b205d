"""The published layout: coverage and back, refused pickles, joined records, a whole round trip."""

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from firsthand.datasets_scripts.fivl import fivl
from firsthand.processing.masks import boxes_of, decode, encode, from_frame, patch_coverage
from firsthand.recipes import export_fivl, import_fivl
from firsthand.recipes.import_fivl import GRID, load_coverage, mask_of_coverage

SIZE = (160, 120)


def disc(size, x, y, radius):
    v, u = np.mgrid[: size[1], : size[0]] + 0.5
    return (u - x) ** 2 + (v - y) ** 2 <= radius**2


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(60, 400),
    height=st.integers(60, 400),
    place=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.floats(0.05, 0.6)),
)
def test_mask_to_coverage_and_back(width, height, place):
    """The coverage of the mask that is read back is the published one within quantisation."""
    size, side = (width, height), max(width, height)
    mask = disc(size, place[0] * width, place[1] * height, place[2] * side)
    coverage = patch_coverage(mask, (GRID, GRID), "pad")
    again = mask_of_coverage(coverage, size, "pad")
    back = patch_coverage(again, (GRID, GRID), "pad")
    step = GRID / side  # one pixel over a patch's side
    inside = patch_coverage(np.ones_like(mask), (GRID, GRID), "pad") > 1 - 1e-9
    assert np.abs(back - coverage)[inside].max(initial=0) <= 2 * step + step**2 + 1e-9
    wrong = (again != mask).sum()  # and the mask itself differs at its outline only
    outline = ((coverage > 0) & (coverage < 1)).sum() / GRID**2 * side**2
    assert wrong <= outline


def test_patches_of_whole_pixels_come_back_exactly():
    coverage = np.random.default_rng(0).integers(0, 197, (GRID, GRID)) / 196
    mask = mask_of_coverage(coverage, (336, 336), "pad")
    assert np.array_equal(patch_coverage(mask, (GRID, GRID), "pad"), coverage)


def test_a_half_covered_patch_is_filled_towards_its_neighbour():
    coverage = np.zeros((2, 2))
    coverage[:, 0], coverage[:, 1] = 1, 0.5
    mask = mask_of_coverage(coverage, (40, 40), "resize")
    assert mask[:, :30].all() and not mask[:, 30:].any()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


BAD_FILES = {
    "refused": saved({"x": Evil()}),
    "refused mask": pickle.dumps(Evil(), protocol=2),
    "corrupt": b"no tensor at all"[:3] * 30,
    "wrong": saved(torch.zeros(12, 12)),
    "wrong mask": saved([1, 2]),
    "0..255": saved(torch.full((24, 24), 300.0)),
    "not in 0": saved(torch.full((24, 24), float("nan"))),
}


@pytest.mark.parametrize("told", BAD_FILES)
def test_what_is_no_coverage_is_refused(told):
    with pytest.raises(ValueError, match=told if told != "corrupt" else "corrupt|refused"):
        load_coverage(BAD_FILES[told])


def test_coverage_is_read_as_it_was_saved():
    values = torch.arange(576, dtype=torch.float64).reshape(24, 24) % 256
    assert np.array_equal(load_coverage(saved(values)) * 255, values.numpy())
    assert load_coverage(saved(values.to(torch.uint8)))[0, 3] == 3 / 255


def prompt(text, name, box=(30, 60, 100, 120)):
    corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return {"prompt": text, "mask_img": "x.png", "mask_rel": name, "bbox": [corners]}


@pytest.fixture
def published(tmp_path):
    """A published data set: two records of one id, a tar of tensors, an image."""
    (tmp_path / "images" / "coco").mkdir(parents=True)
    Image.new("RGB", SIZE, (40, 90, 10)).save(tmp_path / "images" / "coco" / "a.png")
    mask = disc(SIZE, 60, 50, 30)
    files = {
        "coco_segmented/a_0000.pt": saved(
            torch.from_numpy(255 * patch_coverage(mask, (24, 24), "pad"))
        ),
        "coco_segmented/empty.pt": saved(torch.zeros(24, 24)),
        "coco_segmented/evil.pt": saved(Evil()),
    }
    with tarfile.open(tmp_path / "masks.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"dataset_grounded/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    said = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A red kite and evil birds."},
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "Yes"},
    ]
    good = prompt("red kite", "coco_segmented/a_0000.pt")
    bad = [
        prompt("dragon", "coco_segmented/a_0000.pt"),
        prompt("kite", "coco_segmented/gone.pt"),
        prompt("birds", "coco_segmented/empty.pt"),
        prompt("evil birds", "coco_segmented/evil.pt"),
    ]
    one = {"id": "9", "image": "coco/a.png", "conversations": said}
    again = {**one, "conversations": [said[0], {"from": "gpt", "value": "A kite."}]}
    segments = [
        {"turn": 1, "prompts": [good, *bad]},
        {"turn": 2, "prompts": [prompt("Yes", "coco_segmented/a_0000.pt")]},
    ]
    wrong_turn = [{"turn": 5, "prompts": [prompt("kite", "coco_segmented/a_0000.pt")]}]
    records = [{**one, "segment": segments}, {**again, "segment": wrong_turn}]
    (tmp_path / "whole.json").write_text(json.dumps(records))
    (tmp_path / "llava.json").write_text(json.dumps([one, again]))
    bare = [{"id": r["id"], "segment": r["segment"]} for r in records]
    (tmp_path / "segments.json").write_text(json.dumps(bare))
    return tmp_path, mask


def rows_of(folder):
    files = sorted((folder / "data").glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


@pytest.mark.parametrize("joined", [False, True])
def test_published_records_become_grounded_samples(published, joined):
    folder, mask = published
    name, said = ("segments.json", folder / "llava.json") if joined else ("whole.json", None)
    out = folder / "out"
    counts = import_fivl.import_published(
        folder / name, folder / "masks.tar", folder / "images", out, said
    )
    assert counts == {"kept": 2, "dropped": 0}
    first, second = rows_of(out)
    assert first["record_key"] != second["record_key"] and first["id"] == second["id"] == "9"
    (kite,), (yes,) = (turn["expressions"] for turn in first["turns"])
    assert (kite["text"], kite["nouns"], kite["char_start"]) == ("red kite", ["kite"], 2)
    assert (yes["text"], yes["phrase"], yes["nouns"]) == ("Yes", "Yes", [])
    inside = decode(kite["mask"])
    assert inside.shape == SIZE[::-1]
    assert (inside & mask).sum() / (inside | mask).sum() > 0.93
    expected = from_frame(np.array([[30, 60, 100, 120]]) / 336, SIZE, "pad").clip(0)
    assert np.allclose(kite["boxes"], expected)
    reasons = {r["text"]: r["reason"].split(":")[0] for r in first["rejected"]}
    assert reasons == {
        "dragon": "not in the answer",
        "kite": "missing mask",
        "birds": "empty mask",
        "evil birds": "refused mask file",
    }
    assert [r["reason"] for r in second["rejected"]] == ["no such turn: 5 of 1"]


@pytest.mark.parametrize(
    "segment", [7, [1], [{"turn": 1}], [{"turn": "x", "prompts": [{}]}], ["a"]]
)
def test_malformed_segments_are_dropped_and_boxes_rejected(published, segment):
    folder, _ = published
    good = json.loads((folder / "whole.json").read_text())[1]
    odd = prompt("kite", "coco_segmented/a_0000.pt") | {"bbox": [{"left": 1}]}
    boxes = [{"turn": 1, "prompts": [odd]}]
    records = [{**good, "segment": segment}, {**good, "segment": boxes}]
    (folder / "odd.json").write_text(json.dumps(records))
    counts = import_fivl.import_published(
        folder / "odd.json", folder / "masks.tar", folder / "images", folder / "out"
    )
    assert counts == {"kept": 1, "dropped": 1}
    (row,) = rows_of(folder / "out")
    assert row["rejected"][0]["reason"].startswith("malformed boxes")


def test_ids_that_cannot_be_told_apart_are_dropped(published):
    folder, _ = published
    once = json.loads((folder / "llava.json").read_text())[:1]
    (folder / "llava.json").write_text(json.dumps(once))
    counts = import_fivl.import_published(
        folder / "segments.json", folder / "masks.tar", folder / "images", folder / "out",
        folder / "llava.json",
    )  # fmt: skip
    assert counts == {"kept": 0, "dropped": 2}


def test_a_folder_of_tensors_and_wrong_ones(published):
    folder, _ = published
    with tarfile.open(folder / "masks.tar") as tar:
        tar.extractall(folder / "unpacked", filter="data")
    by_tar = import_fivl.MaskFiles(folder / "masks.tar")
    by_folder = import_fivl.MaskFiles(folder / "unpacked")
    inner = import_fivl.MaskFiles(folder / "unpacked" / "dataset_grounded")
    name = "coco_segmented/a_0000.pt"
    assert by_tar.read(name) == by_folder.read(name) == inner.read(name)
    for outside in ("../whole.json", "/etc/hostname", "gone.pt"):
        with pytest.raises(FileNotFoundError, match="missing mask"):
            by_folder.read(outside)
    with pytest.raises(FileNotFoundError, match="no such folder or tar"):
        import_fivl.MaskFiles(folder / "nothing.tar")
    with pytest.raises(ValueError, match="not a plain tar"):
        import_fivl.MaskFiles(folder / "llava.json")


def grounded(folder):
    """Two rows of one image and conversation, two expressions of one mask, a row of text."""
    mask = disc(SIZE, 60, 50, 30)
    boxes = boxes_of(mask[None]).tolist()
    kite = {
        "text": "kite", "phrase": "kite", "char_start": 2, "char_end": 6, "nouns": ["kite"],
        "boxes": boxes, "score": 0.5, "mask": encode(mask),
    }  # fmt: skip
    sky = {**kite, "text": "sky", "char_start": 14, "char_end": 17, "nouns": ["sky"]}
    bird = {**kite, "mask": encode(disc(SIZE, 120, 90, 20))}
    asked = {"question": "What?", "answer": "A kite in the sky"}
    image = Image.new("RGB", SIZE, (40, 90, 10))
    rows = [
        {"id": "a", "image": image, "turns": [{**asked, "expressions": [kite, sky]}]},
        {"id": "a", "image": image, "turns": [{**asked, "expressions": [bird]}]},
        {"id": "t", "turns": [asked]},
    ]
    return fivl.build(folder, rows)


def test_out_and_in_again_is_the_same_within_quantisation(tmp_path):
    data = grounded(tmp_path / "grounded")
    published = tmp_path / "published"
    assert export_fivl.export(data, published) == {"records": 3, "masks": 2}
    import_fivl.import_published(
        published / "fivl_instruct.json", published / "dataset_grounded.tar",
        published / "images", tmp_path / "again",
    )  # fmt: skip
    before, after = rows_of(data), rows_of(tmp_path / "again")
    assert [r["record_key"] for r in before] == [r["record_key"] for r in after]
    assert [r["rejected"] for r in after] == [[], [], []]
    step = GRID / max(SIZE)
    for old, new in zip(before, after, strict=True):
        pairs = zip(old["turns"][0]["expressions"], new["turns"][0]["expressions"], strict=True)
        for one, same in pairs:
            assert [one[k] for k in ("text", "char_start", "char_end", "nouns")] == [
                same[k] for k in ("text", "char_start", "char_end", "nouns")
            ]
            assert np.abs(np.array(one["boxes"]) - same["boxes"]).max() <= max(SIZE) / 336
            a, b = decode(one["mask"]), decode(same["mask"])
            assert (a & b).sum() / (a | b).sum() > 0.93
            grids = [patch_coverage(m, (GRID, GRID), "pad") for m in (a, b)]
            assert np.abs(grids[0] - grids[1]).max() <= 2 * step + step**2
    with pytest.raises(ValueError, match="exists"):
        export_fivl.export(data, published)
    with pytest.raises(ValueError, match="no grounded data set"):
        export_fivl.export(published, tmp_path / "more")


def test_the_command_line(tmp_path, capsys):
    data = grounded(tmp_path / "grounded")
    import_fivl.main(["write", "--data", str(data), "--out", str(tmp_path / "published")])
    assert json.loads(capsys.readouterr().out) == {"records": 3, "masks": 2}
    with pytest.raises(SystemExit, match="error: .*exists"):
        import_fivl.main(["write", "--data", str(data), "--out", str(tmp_path / "published")])
