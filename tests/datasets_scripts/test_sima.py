"""Published layouts become Parquet that `load_dataset` and the preference recipe read."""

import gzip
import json

import pytest
from datasets import load_dataset
from tiny_models import tiny_image, tiny_processor

from firsthand.datasets_scripts.sima import sima
from firsthand.recipes.train_preference import load_pairs, problems


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        tiny_image(len(name)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


def pair(image="a.png", chosen="A dog.", rejected="A cat.", question="<image>\nWhat?") -> dict:
    found = {"id": "7", "image": image, "conversations": said(question, chosen)}
    return {**found, "rejected_conversations": said(question, rejected)}


def written(path, content) -> str:
    text = json.dumps(content) if isinstance(content, list) else content
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def test_preferences_of_povid_train(tmp_path, images):
    """Paths that start elsewhere are found by their file's name; what fails is kept."""
    rows = [
        pair("./data/coco/a.png"),
        pair("b.png", question="Where is it?\n<image>"),
        pair("absent.png"),
        pair("broken.png"),
        pair("../a.png/../../etc/passwd"),
        pair(rejected="A dog."),
        pair(chosen=""),
        {**pair(), "rejected_conversations": said("Other?", "A cat.")},
        {"id": "x", "image": "a.png"},
        "no record",
    ]
    out = tmp_path / "out"
    counts = sima.build("preferences", written(tmp_path / "p.json", rows), images, out)
    assert counts["kept"] == 2 and sum(counts.values()) == len(rows)
    lost = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [row["record"] for row in lost] == [3, 4, 5, 6, 7, 8, 9, 10]
    reasons = " | ".join(row["reason"] for row in lost)
    for reason in (
        "missing image: absent.png", "corrupt image: broken.png", "both answers are the same",
        "turn 2 is empty", "do not answer the same prompt", "no conversation", "no object",
    ):  # fmt: skip
        assert reason in reasons
    found = load_pairs(str(out), "train")
    problem = problems(tiny_processor("internvl"), limit=512)
    assert [problem(found[i]) for i in range(2)] == [None, None]
    assert found[0]["prompt"] == [{"role": "user", "content": "What?"}]
    assert found[0]["chosen"] == [{"role": "assistant", "content": "A dog."}]
    assert found[1]["prompt"][0]["content"] == "Where is it?"
    assert found[0]["images"][0].size == (80, 60)
    assert len({found[i]["prompt_key"] for i in range(2)}) == 2
    again = load_dataset(str(out), split="train")
    assert again.num_rows == 2 and again.features == sima.features("preferences")


def test_prompts_of_both_layouts(tmp_path, images):
    lines = [
        json.dumps({"image": "a.png", "text": "Describe <image>", "ground_truth": "A dog."}),
        json.dumps({"image": "b.png", "conversations": said("What?", "A cup.", "More?", "No.")}),
        "{no json",
        json.dumps({"image": "a.png", "text": " "}),
    ]
    source = written(tmp_path / "p.jsonl.gz", "\n".join(lines))
    counts = sima.build("prompts", source, images, tmp_path / "out", split="pool")
    assert counts["kept"] == 2 and counts["dropped: the question is empty"] == 1
    assert counts["dropped: line 3 is not JSON"] == 1
    rows = load_dataset(str(tmp_path / "out"), split="pool")
    assert rows["question"][:] == ["Describe", "What?"]
    assert rows["ground_truth"][:] == ["A dog.", "A cup."]


def test_a_key_is_of_image_and_prompt():
    assert sima.key_of(b"1", "a") == sima.key_of(b"1", "a")
    assert len({sima.key_of(b"1", "a"), sima.key_of(b"2", "a"), sima.key_of(b"1", "b")}) == 3


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("pairs", [], "kind is 'pairs'"),
        ("prompts", [], "holds no record that can be used: it is empty"),
        ("prompts", '{"a": 1}', "holds a dict, not a list"),
        ("prompts", "[", "is not JSON"),
        ("preferences", [pair("absent.png")], "can be used: missing image: absent.png"),
    ],
)
def test_what_cannot_work_is_said(kind, content, message, tmp_path, images):
    source = written(tmp_path / "s.json", content)
    with pytest.raises(ValueError, match=message):
        sima.build(kind, source, images, tmp_path / "out")


def test_nothing_is_written_over(tmp_path, images, capsys):
    source = written(tmp_path / "p.json", [pair()])
    command = ["preferences", "--source", source, "--images", str(images)]
    sima.main([*command, "--out", str(tmp_path / "out")])
    assert "kept: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds data already"):
        sima.main([*command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no such folder of images"):
        sima.main([*command[:4], str(tmp_path / "none"), "--out", str(tmp_path / "x")])
