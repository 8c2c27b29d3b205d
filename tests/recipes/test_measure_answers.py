"""Answers of a model as prediction rows: none lost, none made twice, bad rows kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value
from tiny_models import tiny_image, tiny_internvl, tiny_processor

from firsthand.processing.generation import generate_answers
from firsthand.recipes import answering, cli
from firsthand.recipes.answering import Answerer
from firsthand.recipes.measure_answers import answer

TOKENS = 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_internvl().save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        tiny_image(i).save(folder / f"{i}.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:50])
    return folder


def questions(count: int) -> list[dict]:
    asked = ("Is there a dog in the image?", "Describe the image.", "What is at the top left?")
    return [
        {"id": f"q{i}", "image": f"{i % 4}.png", "question": f"{asked[i % 3]} {i}", "answer": "yes"}
        for i in range(count)
    ]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def arguments(saved, data, out, *more):
    listed = ["measure", "answers", "--data", data, "--model", saved, "--out", out]
    return [*map(str, listed), "--max-new-tokens", str(TOKENS), *map(str, more)]


def test_answers_are_those_of_the_model_in_the_order_of_the_rows(saved, images, tmp_path, capsys):
    given = questions(10)
    data, out = jsonl(tmp_path / "q.jsonl", given), tmp_path / "out.jsonl"
    assert cli.main(arguments(saved, data, out, "--images", images, "--batch-size", 4)) == 0
    assert "10 predictions, 0 errors" in capsys.readouterr().out
    made = rows_of(out)
    model, processor = tiny_internvl(), tiny_processor("internvl")
    asked = [{**r, "image_id": r["image"], "image": tiny_image(i % 4)} for i, r in enumerate(given)]
    expected = list(generate_answers(model, processor, asked, TOKENS, progress=False))
    assert made == [
        {"image_id": r["image"], "id": r["id"], "question": r["question"], "answer": "yes",
         "prediction": e["prediction"]}
        for r, e in zip(given, expected, strict=True)
    ]  # fmt: skip


def test_bad_rows_are_kept_with_their_reason(saved, images, tmp_path, capsys):
    good = questions(3)
    rows = [
        good[0],
        '{"id": "torn line", "questi',
        {"id": "a", "image": "0.png", "question": " "},
        {"id": "b", "image": "gone.png", "question": "x"},
        {"id": "c", "image": "torn.png", "question": "x"},
        {"id": "d", "question": "x"},
        {"id": "e", "image": "../secret.png", "question": "x"},
        good[1],
        good[0],
        {"image": "1.png", "question": "No id?", "image_id": "one"},
    ]
    data, out = jsonl(tmp_path / "q.jsonl", rows), tmp_path / "out.jsonl"
    assert cli.main(arguments(saved, data, out, "--images", images)) == 0
    assert "3 predictions, 7 errors" in capsys.readouterr().out
    made = rows_of(out)
    assert [("prediction" in r) for r in made] == [i in (0, 7, 9) for i in range(10)]
    reasons = ["invalid JSON: line 2", "the question is empty", "missing image", "corrupt image",
               "the row has no image", "image outside of the folder"]  # fmt: skip
    for row, reason in zip([*made[1:7]], reasons, strict=True):
        assert row["error"].startswith(reason), row
    assert made[8]["error"] == "the id 'q0' occurs twice"
    assert made[9]["id"] == "9" and made[9]["image_id"] == "one"


def test_a_data_set_carries_its_images(saved, tmp_path):
    features = Features({"image": Image(), "question": Value("string"), "task": Value("string")})
    rows = [{"image": tiny_image(i % 2), "question": f"What? {i}", "task": "t"} for i in range(5)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    answerer = Answerer(str(tmp_path / "c"), model=str(saved), max_new_tokens=TOKENS)
    counts = answer(str(tmp_path / "d.parquet"), tmp_path / "out.jsonl", answerer)
    made = rows_of(tmp_path / "out.jsonl")
    assert counts == {"predictions": 5, "errors": 0}
    assert [r["id"] for r in made] == list("01234") and len({r["image_id"] for r in made}) == 2
    assert all(r["task"] == "t" and isinstance(r["prediction"], str) for r in made)


def test_each_image_is_encoded_once(saved, images, tmp_path, monkeypatch):
    model, processor = answering.opened_model(str(saved))
    encoded, real = [], model.get_image_features

    def counting(pixel_values, **more):
        encoded.append(len(pixel_values))
        return real(pixel_values=pixel_values, **more)

    monkeypatch.setattr(model, "get_image_features", counting)
    data = jsonl(tmp_path / "q.jsonl", questions(40))
    answerer = Answerer(str(tmp_path / "c"), model=str(saved), max_new_tokens=2)
    answer(str(data), tmp_path / "out.jsonl", answerer, str(images))
    assert sum(encoded) == 4


def test_nothing_is_answered_twice_after_kill_9(saved, images, tmp_path):
    data, count = jsonl(tmp_path / "q.jsonl", questions(120)), 120
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--images", images, "--batch-size", 4]
    assert cli.main(arguments(saved, data, whole, *options)) == 0
    running = subprocess.Popen(
        [sys.executable, "-m", "firsthand.recipes.cli", *arguments(saved, data, out, *options)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
    )  # fmt: skip
    answers, limit = Path(f"{out}.answers"), time.monotonic() + 120
    while len(list(answers.glob("??/*.json"))) < 12:
        assert running.poll() is None and time.monotonic() < limit, "it never got there"
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and not out.exists()
    before = {file: file.stat().st_mtime_ns for file in answers.glob("??/*.json")}
    assert 12 <= len(before) < count, "it was killed too late to tell anything"
    assert cli.main(arguments(saved, data, out, *options)) == 0
    assert rows_of(out) == rows_of(whole)
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert len(list(answers.glob("??/*.json"))) == count


def test_answers_of_other_weights_are_not_taken_for_these(saved, images, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    data, out = jsonl(tmp_path / "q.jsonl", questions(2)), tmp_path / "out.jsonl"
    given = arguments(tmp_path / "model", data, out, "--images", images)
    assert cli.main(given) == 0
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert cli.main(given) == 2
    assert cli.main([*given, "--cache", str(tmp_path / "fresh")]) == 0


WRONG = [
    (["--data", "gone.jsonl"], "gone.jsonl: no such file"),
    (["--images", "nowhere"], "nowhere: no such folder"),
    (["--endpoint", "http://127.0.0.1:9/v1"], "go together"),
]


@pytest.mark.parametrize("more, told", WRONG, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_settings_that_cannot_work_are_told_first(saved, images, tmp_path, capsys, more, told):
    data = jsonl(tmp_path / "q.jsonl", questions(1))
    given = arguments(saved, data, tmp_path / "out.jsonl", "--images", images, *more)
    assert cli.main(given) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_no_row_that_can_be_asked_is_told(saved, images, tmp_path, capsys):
    data = jsonl(tmp_path / "q.jsonl", [{"id": "1", "image": "gone.png", "question": "x"}])
    given = arguments(saved, data, tmp_path / "out.jsonl", "--images", images)
    assert cli.main(given) == 2
    assert "no row" in capsys.readouterr().err
