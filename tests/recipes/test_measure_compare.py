"""`firsthand measure compare`: paired differences, and files that do not belong together."""

import math

import numpy as np
import pytest
from measuring import OBJECTS, compared, questions, refused, rows_of, save, save_captions

from firsthand.metrics import chair


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_captions(tmp_path)
    return tmp_path


def test_two_arms_and_their_difference(folder, capsys):
    save("a.jsonl", questions(["yes", "no"] * 30))
    save("b.jsonl", questions(["yes", "yes"] * 30))
    found = compared("a.jsonl", "b.jsonl", "--metric", "pope")
    values = {arm: found["pope_accuracy", arm]["value"] for arm in ("a", "b", "a - b")}
    assert values == {"a": 1.0, "b": 0.5, "a - b": 0.5}
    out = capsys.readouterr().out
    told = "pope_accuracy: a - b = +0.5000 [+0.5000, +0.5000] (n=60): the interval excludes 0"
    assert told in out and "images resampled: 30" in out
    named = compared("a.jsonl", "b.jsonl", "--metric", "pope", "--arms", "new", "old")
    assert ("pope_accuracy", "new - old") in named
    twice = ("compare", "a.jsonl", "b.jsonl", "--metric", "pope", "--arms", "x", "x")
    assert "two different names" in refused(capsys, *twice)


def test_the_interval_is_of_the_pairs(folder, capsys):
    """One answer of 80 differs: the paired interval is far narrower than one arm's, and has 0."""
    rng = np.random.default_rng(0)
    a = [["no", "yes"][int(rng.random() < 0.5)] for _ in range(80)]
    b = [*(["no" if a[0] == "yes" else "yes"]), *a[1:]]
    save("a.jsonl", questions(a))
    save("b.jsonl", questions(b))
    found = compared("a.jsonl", "b.jsonl", "--metric", "pope")
    one = found["pope_accuracy", "a - b"]
    alone = found["pope_accuracy", "a"]
    assert abs(one["value"]) == pytest.approx(1 / 80)
    assert one["high"] - one["low"] < 0.3 * (alone["high"] - alone["low"])
    assert "includes 0, so no difference is shown" in capsys.readouterr().out


def test_a_file_against_itself_is_exactly_zero(folder, capsys):
    options = ("--metric", "chair", "--objects", "objects.json")
    found = compared("rows.jsonl", "rows.jsonl", *options)
    differences = [row for (_, arm), row in found.items() if " - " in arm]
    assert len(differences) == 5
    assert all(row["value"] == row["low"] == row["high"] == 0 for row in differences)
    assert capsys.readouterr().out.count("the difference is exactly 0") == 5


def test_other_ids_are_an_error_or_counted(folder, capsys):
    save("a.jsonl", rows_of())
    save("b.jsonl", rows_of({"a": "A dog.", "b": "A cat.", "c": "", "e": "A dog.", "f": ""})[:4])
    words = ("a.jsonl", "b.jsonl", "--metric", "chair", "--objects", "objects.json")
    line = refused(capsys, "compare", *words)
    assert "a.jsonl has 1 that the other lacks ('d')" in line
    assert "b.jsonl has 1 that the other lacks ('e')" in line and "3 shared" in line
    found = compared(*words, "--common")
    assert found["chair_s", "a - b"]["n"] == 3
    assert "the 3 shared ids" in capsys.readouterr().out
    assert found["chair_i", "a"]["value"] == chair.score(rows_of()[:3], OBJECTS)["chair_i"]
    save("b.jsonl", [rows_of()[0] | {"id": "elsewhere"}])
    assert "share no id" in refused(capsys, "compare", *words, "--common")


def test_published_questions_in_common(folder):
    rows = questions(["yes", "no", "yes", "no"])
    asked = [
        {
            "question_id": int(row["id"]),
            "image": row["image_id"],
            "text": "?",
            "label": row["answer"],
        }
        for row in rows
    ]
    save("questions.json", asked)
    save("a.jsonl", [{"id": row["id"], "prediction": row["prediction"]} for row in rows])
    save("b.jsonl", [{"id": row["id"], "prediction": "yes"} for row in rows[:3]])
    words = ("a.jsonl", "b.jsonl", "--metric", "pope", "--questions", "questions.json", "--common")
    assert compared(*words)["pope_accuracy", "a - b"]["n"] == 3


def test_one_id_for_two_questions(folder, capsys):
    save("a.jsonl", questions(["yes", "no"]))
    save("b.jsonl", [row | {"image_id": "other.jpg"} for row in questions(["yes", "no"])])
    line = refused(capsys, "compare", "a.jsonl", "b.jsonl", "--metric", "pope")
    assert "'0' is not the same question" in line and "'other.jpg' in b.jsonl" in line


def test_what_failed_in_one_file_is_left_out_of_both(folder):
    rows = questions(["yes", "yes", "yes", "no"])
    save("a.jsonl", rows)
    failed = {"id": "1", "image_id": "0.jpg", "answer": "no", "error": "timeout"}
    save("b.jsonl", [rows[0], failed, *rows[2:]])
    found = compared("a.jsonl", "b.jsonl", "--metric", "pope")
    for arm in ("a", "b"):
        assert found["pope_accuracy", arm]["value"] == 1.0
        assert found["pope_accuracy", arm]["n"] == 3
        assert found["pope_accuracy", arm]["protocol"]["n_ids"] == 3


def test_lengths_in_two_units(folder, capsys):
    save("a.jsonl", rows_of())
    save("b.jsonl", [row | {"n_tokens": 9} for row in rows_of()])
    words = ("a.jsonl", "b.jsonl", "--metric", "chair", "--objects", "objects.json")
    assert "words in a.jsonl and in tokens in b.jsonl" in refused(capsys, "compare", *words)


def test_what_cannot_be_compared_is_said(folder, capsys):
    save("a.jsonl", rows_of())
    save("b.jsonl", rows_of(dict.fromkeys("abcd", "Nothing.")))
    found = compared("a.jsonl", "b.jsonl", "--metric", "chair", "--objects", "objects.json")
    assert math.isnan(found["chair_i", "a - b"]["value"])
    assert "chair_i: undefined in one of the files (n=4)" in capsys.readouterr().out
    save("a.jsonl", questions(["yes", "no"]))
    save("b.jsonl", questions(["yes", "yes"]))
    compared("a.jsonl", "b.jsonl", "--metric", "pope")
    assert "one image says nothing about others" in capsys.readouterr().out
