"""Visual reliance through its front door: views, resuming, evaluation sets, bad rows."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_image, tiny_internvl, tiny_processor

from firsthand.metrics import visual_reliance
from firsthand.processing.masks import encode
from firsthand.recipes import build_reliance_sets, cli, measure_visual_reliance
from firsthand.recipes import measure_visual_reliance as recipe
from firsthand.recipes.inputs import read_rows

GREY = (122, 116, 104)


def sample(name: str = "s", box=(10.0, 10.0, 30.0, 40.0)) -> dict:
    mask = np.zeros((60, 80), bool)
    mask[20:30, 15:20] = True
    return {
        "id": name,
        "image_id": name,
        "image": tiny_image(),
        "question": "Is there a dog?",
        "answer": "yes",
        "expressions": [{"boxes": [list(box)], "mask": encode(mask)}],
    }


def views(one: dict, region: str = "bbox", fill: str = "black") -> dict[str, dict]:
    rows = recipe.rows_of([one], region, fill, 0, GREY, {})
    return {row["condition"]: row for row in rows}


def test_the_views_of_a_question():
    made = views(sample())
    pixels = {name: np.array(row["image"]) for name, row in made.items()}
    inside = np.zeros((60, 80), bool)
    inside[10:40, 10:30] = True
    original = np.array(tiny_image())
    assert np.array_equal(pixels["plain"], original) and not pixels["blank"].any()
    assert not pixels["masked"][inside].any()
    assert np.array_equal(pixels["masked"][~inside], original[~inside])
    assert np.array_equal(pixels["outside"][inside], original[inside])
    assert not pixels["outside"][~inside].any()
    changed = (pixels["control"] != original).any(-1)
    assert not (changed & inside).any() and (pixels["control"] == 0).all(-1).sum() >= 600
    assert made["masked"]["area"] == pytest.approx(600 / 4800)
    assert {row["id"] for row in made.values()} == {"s"} and "area" not in made["plain"]


def test_masks_instead_of_boxes_and_no_room_elsewhere():
    assert views(sample(), "mask")["masked"]["area"] == pytest.approx(50 / 4800)
    assert "control" not in views(sample(box=(0.0, 0.0, 60.0, 50.0)))
    assert views(sample(box=(0.0, 0.0, 0.0, 0.0))) == {}  # nothing to remove


def test_unreadable_samples_keep_their_reason():
    broken = {**sample(), "expressions": [{"boxes": [], "mask": encode(np.ones((3, 3)))}]}
    (row,) = recipe.rows_of([broken], "mask", "mean", 0, GREY, {})
    assert "a mask is (3, 3)" in row["error"] and row["condition"] == "plain"


def test_a_blurred_image_is_not_blank():
    blank = np.array(views(sample(), fill="blur")["blank"]["image"])
    assert set(map(tuple, blank.reshape(-1, 3))) == {GREY}


@pytest.fixture
def tiny(monkeypatch):
    loaded = []

    def load(name):
        loaded.append(name)
        return tiny_internvl(), tiny_processor("internvl")

    monkeypatch.setattr(measure_visual_reliance, "load_model", load)
    return loaded


def ask(folder, *more: str) -> list[dict]:
    command = ["measure", "visual-reliance", "--data", "scenes", "--split", "validation"]
    command += ["--count", "2", "--predictions", str(folder / "p.jsonl"), "--max-new-tokens", "2"]
    command += ["--out", str(folder / "r.json"), *more]
    assert cli.main(command) == 0
    return read_rows(folder / "p.jsonl")


def test_the_front_door_and_going_on_after_a_stop(tiny, tmp_path, capsys):
    rows = ask(tmp_path)
    conditions = {r["condition"] for r in rows}
    assert conditions == set(visual_reliance.CONDITIONS)
    assert len({(r["id"], r["condition"]) for r in rows}) == len(rows)
    printed = capsys.readouterr().out
    assert "area of the regions" in printed and "visual_reliance" in printed
    results = json.loads((tmp_path / "r.json").read_text())
    assert {r["metric"] for r in results} >= {"visual_reliance", "flip_rate", "absolute_drop"}
    assert results[0]["protocol"]["variant"] == "relative drop, bbox filled with mean"
    lines = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "p.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed in a line
    again = ask(tmp_path)
    by_key = {(r["id"], r["condition"]): r for r in rows}
    assert len(again) == len(rows)
    assert {(r["id"], r["condition"]): r for r in again} == by_key


def test_questions_of_one_image_are_resampled_together(tiny, tmp_path):
    rows = ask(tmp_path)
    ids = visual_reliance.pair_ids(rows)
    assert ids["visual_reliance"] == list(dict.fromkeys(r["id"] for r in rows))
    assert len(ids["control_adjusted"]) == visual_reliance.score(rows)["n_control"]
    assert {len(v) for k, v in ids.items()} == {
        len(column) for column in visual_reliance.pairs(rows).values()
    }


def test_a_model_without_data_is_refused(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("")
    command = ["measure", "visual-reliance", "--predictions", str(tmp_path / "p.jsonl")]
    assert cli.main([*command, "--model", "x"]) == 2
    assert "--model answers the questions of --data" in capsys.readouterr().err


QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 7, "image_id": 42, "question": "What is it?"},
        {"question_id": 8, "image_id": 42, "question": "Unanswered?"},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 7,
            "multiple_choice_answer": "dog",
            "answers": [{"answer": "dog"}] * 9 + [{"answer": "cat"}],
        }
    ]
}


def written(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_evaluation_sets_become_conversations(tmp_path):
    out, answers = tmp_path / "out.jsonl", tmp_path / "answers.json"
    common = ["--out", str(out), "--answers", str(answers)]
    vqa = ["vqav2", "--questions", written(tmp_path / "q.json", QUESTIONS)]
    vqa += ["--annotations", written(tmp_path / "a.json", ANNOTATIONS)]
    build_reliance_sets.main([*vqa, *common])
    (row,) = read_rows(out)
    assert row["image"] == "COCO_val2014_000000000042.jpg" and row["id"] == "7"
    assert [m["value"] for m in row["conversations"]] == ["<image>\nWhat is it?", "dog"]
    assert json.loads(answers.read_text()) == {"7": ["dog"] * 9 + ["cat"]}
    gqa = {"11": {"imageId": "n1", "question": "Red?", "answer": "no"}}
    build_reliance_sets.main(["gqa", "--questions", written(tmp_path / "g.json", gqa), *common])
    assert read_rows(out)[0]["image"] == "n1.jpg"
    pope = '{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}\n'
    build_reliance_sets.main(["pope", "--questions", written(tmp_path / "p.json", pope), *common])
    assert read_rows(out)[0]["conversations"][1]["value"] == "yes"


@pytest.mark.parametrize(
    ("benchmark", "content", "message"),
    [
        ("vqav2", QUESTIONS, "give --annotations"),
        ("gqa", [1], "is no GQA file"),
        ("gqa", {"1": {"question": "?"}}, "has no 'imageId'"),
        ("pope", "", "holds no answered question"),
        ("gqa", "{", "is not JSON"),
    ],
)
def test_files_of_another_layout_are_refused(benchmark, content, message, tmp_path):
    path = tmp_path / "q.json"
    written(path, content)
    with pytest.raises(ValueError, match=message):
        build_reliance_sets.build(benchmark, path, None)


def test_accepted_answers_reach_the_rows():
    rows = list(recipe.rows_of([sample("7/0")], "bbox", "mean", 0, GREY, {"7": ["dog", "puppy"]}))
    assert all(row["answers"] == ["dog", "puppy"] for row in rows)
    assert all(isinstance(row["image"], Image.Image) for row in rows)
