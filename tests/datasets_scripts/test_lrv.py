"""LRV's released layouts become Parquet that `load_dataset` reads, at any ratio of polarities."""

import gzip
import json
from collections import Counter

import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_image

from firsthand.datasets_scripts.lrv import lrv


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    for number in (1, 2):
        tiny_image(number).save(folder / f"{number}.jpg")
    tiny_image(3).save(folder / "bars.png")
    tiny_image(4).save(tmp_path / "outside.jpg")
    (folder / "9.jpg").write_bytes(b"no image")
    return folder


def record(image_id="1", question="Is there a dog?", answer="No dog.", task="negative"):
    return {"image_id": image_id, "question": question, "answer": answer, "task": task}


def written(path, content) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def many(positive: int, negative: int) -> list[dict]:
    tasks = ["negative"] * negative + ["image captioning"] * positive
    return [record(str(i % 2 + 1), f"Question {i}?", "So.", task) for i, task in enumerate(tasks)]


def test_instructions_with_a_config_for_each_ratio(tmp_path, images):
    rows = [
        *many(6, 4),
        record("\n2", "\nWhy?\n", "\nSo.", "\nnegative"),  # as an early release has it
        record(2, "How?", "Thus.", "Image captioning"),
        record("absent"),
        record("9"),
        record("../outside"),
        record(question=" "),
        record(answer=""),
        record(answer=["No."]),
        many(6, 4)[0],
        {"question": "No image?", "answer": "No."},
        "no record",
    ]
    source = written(tmp_path / "filter_cap.json", {"annotations": rows})
    out = tmp_path / "out"
    counts = lrv.build("instructions", source, images, out, ["1:1", "2:1", "0:1"])
    assert counts["kept"] == 12 and sum(counts.values()) == len(rows)
    lost = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [row["record"] for row in lost] == [13, 14, 15, 16, 17, 18, 19, 20, 21]
    reasons = " | ".join(row["reason"] for row in lost)
    for reason in (
        "missing image: absent", "corrupt image: 9.jpg", "missing image: ../outside",
        "question is empty", "answer is empty", "answer is a list", "occurs twice",
        "no image is named", "no object",
    ):  # fmt: skip
        assert reason in reasons
    for config, expected in {"1-1": (5, 5), "2-1": (6, 3), "0-1": (0, 5), "all": (7, 5)}.items():
        found = load_dataset(str(out), config, split="train")
        assert found.features == lrv.features()
        sides = Counter(found["polarity"])
        assert (sides["positive"], sides["negative"]) == expected
    row = found[10]
    assert row.pop("image").size == (80, 60)
    assert row == {**record("2", "Why?", "So."), "polarity": "negative"}
    assert found[11]["task"] == "Image captioning" and found[11]["image_id"] == "2"
    card = (out / "README.md").read_text()
    assert "| `2-1` | 6 | 3 | 0 |" in card and "| kept | 12 |" in card and "{split}" not in card


def test_charts_and_bare_lists(tmp_path, images):
    rows = [{"image_id": "bars.png", "question": "Which is highest?", "answer": "The third."}]
    source = written(tmp_path / "chart.json.gz", rows)
    assert lrv.build("charts", source, images, tmp_path / "out") == {"kept": 1}
    row = load_dataset(str(tmp_path / "out"), split="train")[0]
    assert (row["image_id"], row["task"], row["polarity"]) == ("bars.png", "", "")


def test_evaluation_sets_of_all_forms(tmp_path, images):
    rows = [
        {"image_id": "1", "question": "Is there a cat?"},
        {"image_id": "2", "instruction": "Describe it.", "answer_gt": "A cup."},
    ]
    source = written(tmp_path / "evaluation_set.json", rows)
    lrv.build("evaluation", source, images, tmp_path / "out", split="test")
    found = load_dataset(str(tmp_path / "out"), split="test")
    assert found["question"][:] == ["Is there a cat?", "Describe it."]
    assert found["answer"][:] == ["", "A cup."]
    assert set(found["polarity"]) == {""}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 4), st.integers(0, 4))
def test_a_ratio_is_exact_and_as_large_as_can_be(positive, negative, a, b):
    rows = [{"polarity": p} for p in ["positive"] * positive + ["negative"] * negative]
    try:
        found = Counter(row["polarity"] for row in lrv.choose(rows, f"{a}:{b}"))
    except ValueError:
        assert a + b == 0 or positive < a or negative < b
        return
    assert found["positive"] * b == found["negative"] * a
    assert positive - found["positive"] < a or negative - found["negative"] < b


def test_the_seed_draws_what_is_left_out():
    rows = [{"polarity": "positive", "n": i} for i in range(50)] + [{"polarity": "negative"}] * 5
    assert lrv.choose(rows, "1:1") == lrv.choose(rows, "1:1")
    assert lrv.choose(rows, "1:1") != lrv.choose(rows, "1:1", seed=1)


@pytest.mark.parametrize(
    ("kind", "content", "ratios", "message"),
    [
        ("pairs", [], [], "kind is 'pairs'"),
        ("instructions", [], [], "no record that can be used: it is empty"),
        ("instructions", {"rows": []}, [], "neither a list of records"),
        ("instructions", "[", [], "is not JSON"),
        ("instructions", [record("absent")], [], "can be used: missing image: absent"),
        ("instructions", [record()], ["half"], "the ratio is 'half'"),
        ("instructions", [record()], ["0:0"], "the ratio is '0:0'"),
        ("instructions", [record()], ["1:1"], "no row is positive"),
        ("instructions", many(1, 2), ["2:1"], "too few rows for the ratio 2:1"),
    ],
)
def test_what_cannot_work_is_said(kind, content, ratios, message, tmp_path, images):
    source = written(tmp_path / "s.json", content)
    with pytest.raises(ValueError, match=message):
        lrv.build(kind, source, images, tmp_path / "out", ratios)
    assert not (tmp_path / "out" / "data").exists()


def test_nothing_is_written_over(tmp_path, images, capsys):
    source = written(tmp_path / "p.json", many(2, 2))
    command = ["instructions", "--source", source, "--images", str(images), "--ratio", "1:1"]
    lrv.main([*command, "--out", str(tmp_path / "out")])
    assert "kept: 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds data already"):
        lrv.main([*command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no such folder of images"):
        lrv.main([*command[:4], str(tmp_path / "none"), "--out", str(tmp_path / "x")])
