"""`firsthand explain warn` on a tiny checkpoint with a warning of its own."""

import json
import re

import pytest
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.processing.warning import HallucinationWarning
from firsthand.recipes.cli import main
from firsthand.recipes.explain_warn import object_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warn")
    TINY["llava"]().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    tiny_image().save(folder / "photo.png")
    HallucinationWarning(["support"], 2, [0.0], [1.0], [-1.0], 0.0, 0.4).save(folder / "w.json")
    return folder


def asked(folder, *more):
    return ["explain", "warn", "--image", str(folder / "photo.png"), *map(str, more)]


def test_words_are_scored_marked_and_written(folder, capsys):
    model = ["--model", folder / "model", "--warning", folder / "w.json"]
    said = ["--question", "What is it?", "--answer", "a dog on a <b> cup.", "--out", folder / "out"]
    assert main(asked(folder, *model, *said)) == 0
    found = json.loads((folder / "out" / "warning.json").read_text())
    assert [w["text"] for w in found["words"]][0] == "dog"
    for word in found["words"]:
        ratio = word["log_likelihood_ratio"]
        assert word["score"] == pytest.approx(1 / (1 + 2.718281828**ratio))
        assert word["warned"] == (word["score"] >= 0.4)
    page = (folder / "out" / "warning.html").read_text()
    assert "<b> cup" not in page and "dog" in page
    assert page.count("<figure>") == len(found["words"])
    assert re.search(r"^  dog +made up 0\.\d\d", capsys.readouterr().out, re.M)


def test_another_model_needs_a_warning_of_its_own(folder, capsys):
    assert main(asked(folder, "--model", folder / "model")) == 2
    assert "firsthand.recipes.fit_warning" in capsys.readouterr().err


def test_an_answer_without_objects_is_refused(folder, capsys):
    more = ["--model", folder / "model", "--warning", folder / "w.json", "--answer", "yes."]
    assert main(asked(folder, *more)) == 2
    assert "no object word" in capsys.readouterr().err


def test_compounds_stay_whole_and_articles_stay_out():
    text = "A red traffic light, and the old table."
    assert [text[slice(*span)] for span in object_words(text)] == ["traffic light", "table"]
