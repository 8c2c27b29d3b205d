"""Vision logits as words, regions and scores, through the front door."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.modeling.vision_modeling import vision_logits
from firsthand.processing.collator import word_token
from firsthand.processing.generation import prepare_inputs
from firsthand.processing.masks import encode
from firsthand.processing.overlays import cell_labels, regions
from firsthand.processing.vision_words import read_words
from firsthand.recipes import cli, explain_logits
from firsthand.recipes.inputs import read_rows


@pytest.mark.parametrize("family", sorted(TINY))
def test_logits_are_those_of_the_image_tokens(family):
    model, processor = TINY[family](), tiny_processor(family)
    logits, grid = explain_logits.read_image(model, processor, tiny_image())
    row = {"image": tiny_image(), "question": "Something else entirely?"}
    with torch.no_grad():
        other = vision_logits(model, **prepare_inputs(processor, [row]))[0]
    assert len(logits) == grid[0] * grid[1]
    torch.testing.assert_close(logits, other, atol=1e-5, rtol=0)  # no image token sees the question


def reading_of(words: list[list[str]]):
    processor = tiny_processor("llava")
    flat = [word_token(processor.tokenizer, word) for row in words for word in row]
    logits = torch.full((len(flat), len(processor.tokenizer)), -5.0)
    logits[range(len(flat)), flat] = 5.0
    shape = len(words), len(words[0])
    return read_words(processor.tokenizer, logits, shape, {w for row in words for w in row})


def test_scores_by_hand():
    reading = reading_of([["dog", "dog"], ["cup", "tree"]])
    dog, cat = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    dog[:10] = True  # exactly the two tokens that say it
    cat[10:, 10:] = True  # said by none
    ious, pairs = explain_logits.score_words(reading, {"dog": dog, "cat": cat}, "resize")
    assert ious == {"dog": 1.0, "cat": 0.0}
    assert pairs["vision_logits_iou"] == (1.0, 2) and pairs["vision_logits_iou_found"] == (1.0, 1)
    assert pairs["vision_logits_iou_ceiling"] == (2.0, 2)
    assert pairs["words_found"] == (1, 2) and pairs["words_grounded"] == (1, 3)
    assert pairs["words_per_sample"] == (3, 1)


@pytest.fixture
def tiny(monkeypatch):
    pair = TINY["internvl"](), tiny_processor("internvl")
    monkeypatch.setattr(explain_logits, "load_model", lambda name: pair)
    return pair


def test_one_image_is_drawn(tiny, tmp_path, capsys):
    tiny_image().save(tmp_path / "photo.png")
    command = ["explain", "logits", "--image", str(tmp_path / "photo.png"), "--words", "Dog, cup"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "logits.json").read_text())
    assert [len(row) for row in found["labels"]] == [2, 2]
    assert [w["word"] for w in found["words"]][:2] == ["dog", "cup"]
    assert found["words"][0]["mask"]["size"] == [60, 80]
    assert Image.open(tmp_path / "overlay.png").width >= 448 and (tmp_path / "words.png").exists()
    assert "2 x 2 image tokens" in capsys.readouterr().out


def test_a_data_set_is_measured(tiny, tmp_path, capsys):
    command = ["explain", "logits", "--data", "scenes", "--split", "validation", "--samples", "4"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["arm"] for r in results} == {"plain", "shuffled"}
    assert {r["metric"] for r in results} == set(explain_logits.METRICS)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 4
    assert "vision_logits_iou" in capsys.readouterr().out
    assert cli.main(["explain", "logits", "--out", str(tmp_path)]) == 2
    assert "either --image" in capsys.readouterr().err


def test_samples_without_words_are_listed(tiny):
    model, processor = tiny
    mask = encode(np.ones((60, 80)))
    expression = {"text": "dog", "char_start": 2, "char_end": 5, "nouns": [], "mask": mask}
    turn = {"question": "?", "answer": "a dog", "expressions": [expression]}
    rows = [{"id": "1", "image": tiny_image(), "turns": [turn]}]
    arms, scored, drawn, dropped = explain_logits.measure(model, processor, rows)
    assert not scored and not arms["plain"] and not drawn
    assert [d["reason"] for d in dropped] == ["no noun", "no word with a mask"]


@pytest.mark.parametrize("frame", ["resize", "center_crop", "pad"])
def test_each_pixel_has_its_tokens_label(frame):
    labels = np.arange(12).reshape(3, 4)
    found = cell_labels(labels, (80, 60), frame)
    assert found.shape == (60, 80)
    if frame == "resize":
        assert np.array_equal(found, labels.repeat(20, 0).repeat(20, 1))
    if frame == "center_crop":
        assert (found[:, :10] == -1).all() and (found[:, 70:] == -1).all()
        assert found[0, 10] == 0 and found[59, 69] == 11
    if frame == "pad":  # 10 rows above and below are not of the image
        assert found[0, 0] == 0 and found[59, 79] == 11 and (found >= 0).all()


def test_regions_have_colours_names_and_a_legend():
    labels = np.array([[0, 1], [1, -1]])
    picture = regions(Image.new("RGB", (200, 200), "white"), labels, ["dog (25%)", "cup (50%)"])
    assert picture.width == 200 and picture.height > 200
    pixels = np.array(picture)
    assert (pixels[180, 180] == 255).all() and not (pixels[30, 150] == 255).all()
    assert not (pixels[30, 50] == pixels[30, 150]).all()
    with pytest.raises(ValueError, match="at most 8 colours"):
        regions(Image.new("RGB", (20, 20)), labels, ["one"])
