"""Augmentation, end to end: no row is lost or doubled, and bad input is kept with its reason."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firsthand.datasets_scripts.fivl import fivl
from firsthand.processing.masks import decode, encode
from firsthand.recipes import cli, conversations
from firsthand.recipes.augment_fivl import FindMasks, NameExpressions, ReadRecord, run_steps
from firsthand.recipes.stages import Dropped

ROOT = Path(__file__).parents[2]


@dataclass
class Found:
    mask: np.ndarray
    score: float
    boxes: list


def scripted(image_size, phrase):
    """A square where the phrase decides; unicorns are found nowhere, ghosts have no pixels."""
    width, height = image_size
    mask = np.zeros((height, width), bool)
    if phrase == "unicorn":
        return None
    if phrase == "monster":
        mask = np.ones((height + 1, width), bool)
    elif phrase != "ghost":
        at = sum(map(ord, phrase)) % (width - 8)
        mask[4:12, at : at + 8] = True
    return Found(mask, 0.5, [(at, 4, at + 8, 12)] if mask.any() and phrase != "monster" else [])


class Scripted(FindMasks):
    """Masks by `scripted`, slowly enough to be killed half-way where FIRSTHAND_SLOW says so."""

    name = "FindMasks"

    def _segments(self, row, phrases):
        time.sleep(float(os.environ.get("FIRSTHAND_SLOW", 0)))
        return [scripted(row["size"], phrase) for phrase in phrases]


def steps(images):
    return [ReadRecord(str(images)), NameExpressions(), Scripted("scripted")]


def augment(data, out, images, workers=1):
    about = {"data": conversations.fingerprint(str(data), "train")}
    return run_steps(str(data), out, steps(images), about, str(images), "train", workers)


def record(number, answer="A red kite above a dog.", question="What is there?", **more):
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": "a.png", "conversations": said, **more}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png")):
        Image.new("RGB", (64 + 16 * number, 48), (9 * number, 80, 40)).save(folder / name)
    return folder


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def rows_of(out, folder="data"):
    files = sorted((out / folder).glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def test_a_conversation_becomes_a_grounded_sample(images, tmp_path):
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    one = record(7, image="deep/b.png")
    one["conversations"] += [
        {"from": "human", "value": "Is there a dog?"},
        {"from": "gpt", "value": "Yes"},
    ]
    data = tmp_path / "a.json"
    data.write_text(json.dumps([one]))
    assert augment(data, tmp_path / "out", images) == {"kept": 1, "dropped": 0}
    (row,) = load_dataset(str(tmp_path / "out"), split="train")
    assert row["id"] == "7" and row["source"] == "deep/b.png"
    assert row["image"].size == (80, 48) and row["image"].getpixel((0, 0)) == (9, 80, 40)
    first, second = row["turns"]
    assert first["question"] == "What is there?"
    said = [first["answer"][e["char_start"] : e["char_end"]] for e in first["expressions"]]
    assert said == [e["text"] for e in first["expressions"]] == ["red kite", "dog"]
    assert [e["nouns"] for e in first["expressions"]] == [["kite"], ["dog"]]
    for expression in first["expressions"]:
        expected = scripted((80, 48), expression["phrase"])
        assert (decode(expression["mask"]) == expected.mask).all()
        assert expression["boxes"] == [list(map(float, expected.boxes[0]))]
        assert expression["score"] == 0.5
    (only,) = second["expressions"]
    assert (only["text"], only["phrase"], only["nouns"]) == ("Yes", "dog", [])
    assert only["mask"] == first["expressions"][1]["mask"], "one phrase, one mask"
    assert row["rejected"] == []
    stored = load_dataset(str(tmp_path / "out"), split="train").features
    assert stored == fivl.features() and isinstance(stored["image"], ImageFeature)


def test_bad_input_is_kept_with_its_reason(images, tmp_path):
    (images / "text.png").write_text("no image")
    (images / "torn.png").write_bytes((images / "a.png").read_bytes()[:60])
    turns = record(0)["conversations"]
    bad = {
        "corrupt image": [record(1, image="text.png"), record(2, image="torn.png")],
        "missing image": [record(3, image="gone.png")],
        "image outside of the folder": [record(4, image="../secret.png")],
        "several images": [record(5, image=["a.png", "b.png"])],
        "no image named": [{"id": "6", "conversations": turns}],
        "invalid JSON": ['{"id": "7", "conver'],
        "invalid record": ["[1, 2]"],
        "no conversation": [{"id": "9", "image": "a.png"}],
        "no answer": [record(10, answer=" "), record(11, conversations=turns[:1])],
        "roles do not alternate": [record(12, conversations=[turns[0], turns[0]])],
    }
    good = [record(0), record(0, answer="A cat.")]
    lines = [good[0], *(r for group in bad.values() for r in group), good[1]]
    counts = augment(write(tmp_path / "a.jsonl", lines), tmp_path / "out", images)
    assert counts == {"kept": 2, "dropped": 12}
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["0", "0"]
    dropped = rows_of(tmp_path / "out", "dropped")
    given = [line if isinstance(line, str) else json.dumps(line) for line in lines[1:-1]]
    assert [row["record"] for row in dropped] == given, "they are kept as they were given"
    kinds = [kind for kind, group in bad.items() for _ in group]
    for row, kind in zip(dropped, kinds, strict=True):
        assert row["dropped"].startswith(f"ReadRecord: {kind}: "), row["dropped"]
    assert dropped[6]["dropped"].startswith("ReadRecord: invalid JSON: line 8: ")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| dropped: corrupt image | 2 |" in card and "| rows | 2 |" in card


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "question", "answer", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
KEYS = ("id", "image", "conversations", "messages", "turns", "question", "answer", "source")


@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=5))
def test_whatever_the_record_it_is_read_or_dropped(given_record):
    row = {"place": "line 1", "record": json.dumps(given_record), "image": None}
    try:
        read = ReadRecord("/nowhere").process(row)
    except Dropped as reason:
        assert ": " in str(reason)
    else:
        assert read["turns"] and read["image"] is None
        assert all(isinstance(t["question"] + t["answer"], str) for t in read["turns"])


def test_half_a_surrogate_pair_is_dropped(images, tmp_path):
    lines = ['{"id": "s", "question": "\\ud800", "answer": "x"}', record(1)]
    counts = augment(write(tmp_path / "a.jsonl", lines), tmp_path / "out", images)
    assert counts == {"kept": 1, "dropped": 1}
    assert "invalid text" in rows_of(tmp_path / "out", "dropped")[0]["dropped"]


def test_unusable_expressions_are_kept_with_their_reason(images, tmp_path):
    answer = "A unicorn, a ghost and a monster with a red kite."
    augment(write(tmp_path / "a.jsonl", [record(1, answer)]), tmp_path / "out", images)
    (row,) = rows_of(tmp_path / "out")
    assert [e["text"] for e in row["turns"][0]["expressions"]] == ["red kite"]
    assert [(r["turn"], r["text"]) for r in row["rejected"]] == [
        (1, "unicorn"),
        (1, "ghost"),
        (1, "monster"),
    ]
    reasons = [r["reason"] for r in row["rejected"]]
    assert reasons[:2] == ["not found in the image", "empty mask"]
    assert reasons[2] == "mask of another size: (49, 64), the image (48, 64) (H, W)"


def test_text_only_rows_stay_without_image_and_expressions(images, tmp_path):
    said = [{"from": "human", "value": "Name a dog."}, {"from": "gpt", "value": "A poodle."}]
    data = write(tmp_path / "a.jsonl", [{"id": "t", "conversations": said}, record(1)])
    augment(data, tmp_path / "out", images)
    text, _ = rows_of(tmp_path / "out")
    assert text["image"] is None
    turn = {"question": "Name a dog.", "answer": "A poodle.", "expressions": []}
    assert text["turns"] == [turn] and text["rejected"] == []


def test_a_shard_of_bad_records_spoils_nothing(images, tmp_path):
    from datasets import load_dataset

    data = write(tmp_path / "a.jsonl", ["not JSON"] * 256 + [record(1)])
    assert augment(data, tmp_path / "out", images) == {"kept": 1, "dropped": 256}
    for streaming in (False, True):
        stored = load_dataset(str(tmp_path / "out"), split="train", streaming=streaming)
        assert [row["id"] for row in stored] == ["1"]


def test_nothing_kept_is_told(tmp_path, images, capsys):
    data = write(tmp_path / "b.jsonl", [record(1, image="gone.png")])
    assert cli.main(arguments(tmp_path, images, "--data", str(data))) == 2
    assert "missing image: 1" in capsys.readouterr().err


def test_folders_of_one_name_are_not_mixed_up(images, tmp_path):
    """`datasets` caches a local folder by its name and card."""
    from datasets import load_dataset

    for where, answer in (("one", "A red kite."), ("two", "A dog.")):
        (tmp_path / where).mkdir()
        data = write(tmp_path / where / "a.jsonl", [record(1, answer)])
        augment(data, tmp_path / where / "out", images)
        (row,) = load_dataset(str(tmp_path / where / "out"), split="train")
        assert row["turns"][0]["answer"] == answer


def test_equal_ids_keep_their_own_masks(images, tmp_path):
    lines = [record(1), record(1, "A cat."), record(1, image="deep/b.png"), record(2)]
    augment(write(tmp_path / "a.jsonl", lines), tmp_path / "out", images)
    rows = rows_of(tmp_path / "out")
    keys = [row["record_key"] for row in rows]
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0], "the key is of content alone"
    assert [len(row["turns"][0]["expressions"]) for row in rows] == [2, 1, 2, 2]


def test_photographs_are_turned_as_they_are_shown(images, tmp_path):
    from datasets import load_dataset

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (64, 48)).save(images / "turned.jpg", exif=exif)
    data = write(tmp_path / "a.jsonl", [record(1, image="turned.jpg")])
    augment(data, tmp_path / "out", images)
    (row,) = load_dataset(str(tmp_path / "out"), split="train")
    assert row["image"].size == (48, 64)
    assert row["turns"][0]["expressions"][0]["mask"]["size"] == [64, 48]


MANY = 600  # three shards


def many():
    answers = ("A red kite and a unicorn.", "Two dogs on a beach.", "Yes", "A ghost.")
    rows = [record(n // 2, answers[n % 4], f"What about dog {n}?") for n in range(MANY)]
    rows[5] = record(5, image="gone.png")
    rows[300] = '{"id": '
    return rows


def content(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("data", "dropped", "source")
        for path in sorted((out / folder).rglob("*.parquet"))
    } | {"card": (out / "README.md").read_bytes()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The data, its images, and the output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "images").mkdir()
    Image.new("RGB", (64, 48), (0, 80, 40)).save(folder / "images" / "a.png")
    data = write(folder / "many.jsonl", many())
    counts = augment(data, folder / "out", folder / "images")
    assert counts == {"kept": MANY - 2, "dropped": 2}
    return folder


def test_every_row_comes_out_once_and_in_order(whole):
    asked = [row["turns"][0]["question"] for row in rows_of(whole / "out")]
    expected = [f"What about dog {n}?" for n in range(MANY) if n not in (5, 300)]
    assert asked == expected


def test_workers_change_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # where workers find this module
    augment(whole / "many.jsonl", tmp_path / "out", whole / "images", workers=2)
    assert content(tmp_path / "out") == content(whole / "out")


KILLED = """
import importlib.util, sys
sys.path.insert(0, sys.argv[2])
spec = importlib.util.spec_from_file_location("test_augment_fivl", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
sys.modules["test_augment_fivl"] = tests
spec.loader.exec_module(tests)
tests.augment(sys.argv[3], sys.argv[4], sys.argv[5])
"""


@pytest.mark.parametrize("after", ["source", "second"])
def test_a_killed_run_is_finished_by_the_same_call(whole, tmp_path, after):
    here, out = Path(__file__), tmp_path / "out"
    arguments = [here, here.parents[1], whole / "many.jsonl", out, whole / "images"]
    running = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FIRSTHAND_SLOW": "0.003"},
    )
    seen = {
        "source": lambda: (out / "source").exists(),
        "second": lambda: (out / "state" / "completions" / "00001").exists(),
    }[after]
    limit = time.monotonic() + 120
    while not seen():
        assert running.poll() is None and time.monotonic() < limit, "it never got there"
        time.sleep(0.005)
    time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (out / "README.md").exists(), "it was killed too late to tell anything"
    augment(*map(str, (whole / "many.jsonl", out, whole / "images")))
    assert content(out) == content(whole / "out")
    augment(*map(str, (whole / "many.jsonl", out, whole / "images")))
    assert content(out) == content(whole / "out"), "a third run finds nothing to do"


def test_another_run_in_the_same_folder_is_refused(images, tmp_path):
    data = write(tmp_path / "a.jsonl", [record(1)])
    augment(data, tmp_path / "out", images)
    before = content(tmp_path / "out")
    write(data, [record(1), record(2)])
    with pytest.raises(ValueError, match="other steps or another source"):
        augment(data, tmp_path / "out", images)
    assert content(tmp_path / "out") == before


def arguments(tmp_path, images, *more):
    data = write(tmp_path / "a.jsonl", [record(1)])
    out = str(tmp_path / "out")
    return ["augment", "fivl", "--data", str(data), "--images", str(images), "--out", out, *more]


WRONG = [
    (["--data", "gone.json"], "gone.json: no such file"),
    (["--images", "nowhere"], "nowhere: no such folder"),
    (["--expressions", "endpoint"], "--endpoint URL --endpoint-model NAME"),
    (["--endpoint", "http://127.0.0.1:9/v1"], "go together"),
]


@pytest.mark.parametrize("more, told", WRONG, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_settings_that_cannot_work_are_told_first(images, tmp_path, capsys, more, told):
    assert cli.main(arguments(tmp_path, images, *more)) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "data").exists()


def test_a_json_file_that_is_none(images, tmp_path, capsys):
    (tmp_path / "b.json").write_text('[{"id": 1},')
    assert cli.main(arguments(tmp_path, images, "--data", str(tmp_path / "b.json"))) == 2
    assert "not a JSON list" in capsys.readouterr().err


def test_a_grounded_data_set_is_augmented_again(images, tmp_path):
    """A folder that `datasets` reads goes in as JSON does, with the images that it carries."""
    data = write(tmp_path / "a.jsonl", [record(1), record(2, "A cat.")])
    augment(data, tmp_path / "one", images)
    augment(tmp_path / "one", tmp_path / "two", images)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for before, after in zip(one, two, strict=True):
        assert before["image"]["bytes"] == after["image"]["bytes"]
        assert before["turns"] == after["turns"] and before["record_key"] == after["record_key"]


def test_annotated_masks_are_used_as_they_are(images, tmp_path):
    pytest.importorskip("firsthand.processing.segmenters")
    mask = np.zeros((48, 64), bool)
    mask[10:20, 30:50] = True
    small = encode(mask[:24])
    things = [
        {"noun": "kite", "box": [30, 10, 50, 20], "mask": encode(mask)},
        {"noun": "dog", "box": [30, 10, 50, 20], "mask": small},
    ]
    data = write(tmp_path / "a.jsonl", [record(1, objects=things)])
    out = str(tmp_path / "out")
    asked = ["--data", str(data), "--images", str(images), "--out", out]
    assert cli.main(["augment", "fivl", *asked, "--segmenter", "annotated"]) == 0
    (row,) = rows_of(tmp_path / "out")
    (kite,) = row["turns"][0]["expressions"]
    assert kite["text"] == "red kite" and (decode(kite["mask"]) == mask).all()
    (dog,) = row["rejected"]
    assert dog["text"] == "dog" and dog["reason"].startswith("mask of another size")


def test_the_collator_reads_what_augment_wrote(images, tmp_path):
    """Labels come from the masks: the words of the answer stand where the masks are."""
    from tiny_models import tiny_llava, tiny_processor

    from firsthand.processing.collator import VisionLabelCollator

    data = write(tmp_path / "a.jsonl", [record(1)])
    augment(data, tmp_path / "out", images)
    (row,) = rows_of(tmp_path / "out")
    model, processor = tiny_llava(), tiny_processor()
    sample = {**row, "image": Image.open(io.BytesIO(row["image"]["bytes"]))}
    collator = VisionLabelCollator(processor, model.config, threshold=0.0)
    assert (collator([sample])["vision_labels"] != -100).any()
