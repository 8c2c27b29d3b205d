"""Head grids and single heads through the front door, with answers known by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.modeling.families import image_grids
from firsthand.processing.answered import forced
from firsthand.processing.figures import grids
from firsthand.processing.masks import encode
from firsthand.recipes import cli, explain_heads
from firsthand.recipes.explain_heads import HeadStudy, best_heads, one_view


def sample(name: str, left: bool = True, text: str = "dog") -> dict:
    mask = np.zeros((60, 80), bool)
    mask[:, :30] = left
    mask[:, 50:] = not left
    answer = "a dog top left, a cup."
    start = answer.find(text)
    expression = {"text": text, "char_start": start, "char_end": start + len(text)}
    expression |= {"nouns": [text], "boxes": [], "score": 1.0, "mask": encode(mask)}
    turn = {"question": "What is it?", "answer": answer, "expressions": [expression]}
    return {"id": name, "image": tiny_image(len(name)), "turns": [turn]}


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_head_that_looks_into_the_mask_wins(family, monkeypatch):
    model, processor = TINY[family](), tiny_processor(family)
    planted = []

    def look_left(model, inputs, positions):
        """Layer 1, head 2 looks at the left half; all others look evenly."""
        ((rows, columns),) = image_grids(model.config, inputs)
        attention = torch.full((2, 4, len(positions), rows, columns), 0.01)
        attention[1, 2, :, :, : columns // 2] = 0.05
        planted.append(positions)
        return attention

    monkeypatch.setattr(explain_heads, "head_attention", look_left)
    study = HeadStudy(model, processor)
    study.read([sample("a"), sample("b", left=False)], progress=False)
    assert study.items == 2 and study.unmatched == 0 and not study.dropped
    asked = forced(model, processor, tiny_image(), "What is it?", "a dog top left, a cup.")
    assert planted[0] == asked.producers(asked.tokens(2, 5))
    plain, control = (study.grids[arm]["auroc"] for arm in ("plain", "shuffled"))
    # one mask lies on the left, where the planted head looks; the control has the same two swapped
    assert plain.mean[1, 2] == pytest.approx(control.mean[1, 2])
    assert np.allclose(plain.mean[0], 0.5) and (plain.count == 2).all()
    left = HeadStudy(model, processor)
    left.read([sample("a"), sample("c")], progress=False)
    assert best_heads(left.grids["plain"]["auroc"].mean, 1) == [(1, 2)]
    assert left.grids["plain"]["auroc"].mean[1, 2] > 0.7


def test_what_cannot_be_compared_is_listed():
    model, processor = TINY["internvl"](), tiny_processor("internvl")
    wrong = sample("w")
    wrong["turns"][0]["expressions"][0]["char_start"] = 3
    empty = sample("e")
    empty["turns"][0]["expressions"][0]["mask"] = encode(np.zeros((60, 80)))
    everything = sample("f")
    everything["turns"][0]["expressions"][0]["mask"] = encode(np.ones((60, 80)))
    textless = {**sample("t"), "image": None}
    study = HeadStudy(model, processor)
    study.read([sample("a"), wrong, empty, everything, textless], progress=False)
    assert study.items == 1
    reasons = [d["reason"] for d in study.dropped]
    assert "characters 3 to 5 of the answer are not the expression" in reasons
    assert "the mask is empty" in reasons and "no image" in reasons
    assert "its mask is all or nothing of what is seen" in reasons


def test_the_models_own_answer_may_lack_the_expression(monkeypatch):
    model, processor = TINY["internvl"](), tiny_processor("internvl")
    said = forced(model, processor, tiny_image(), "What is it?", "A DOG, a dogma, a dog")
    monkeypatch.setattr(explain_heads, "generated", lambda *a: said)
    study = HeadStudy(model, processor, own_answer=True)
    assert study._occurrences(explain_heads.Expression("dog", 0, 3, [], None), said.answer) == [
        (2, 5),
        (18, 21),
    ]
    study.read([sample("a"), sample("b", text="cup")], progress=False)
    assert (study.items, study.unmatched) == (1, 1)


def test_the_smallest_mask_of_a_turn():
    two = sample("a")
    small = np.zeros((60, 80), bool)
    small[:20, :20] = True
    cup = {**two["turns"][0]["expressions"][0], "text": "cup", "char_start": 18, "char_end": 21}
    two["turns"][0]["expressions"].append({**cup, "mask": encode(small)})
    model, processor = TINY["llava"](), tiny_processor("llava")
    both, smallest = HeadStudy(model, processor), HeadStudy(model, processor, smallest=True)
    both.read([two], progress=False)
    smallest.read([two], progress=False)
    assert (both.items, smallest.items) == (2, 1)


@pytest.fixture
def tiny(monkeypatch):
    pair = TINY["internvl"](), tiny_processor("internvl")
    monkeypatch.setattr(explain_heads, "load_model", lambda name: pair)
    return pair


def test_heads_through_the_front_door(tiny, tmp_path, capsys):
    command = ["explain", "heads", "--data", "scenes", "--split", "validation", "--samples", "3"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "heads.json").read_text())
    assert found["samples"] == 3 and found["items"] > 3 and found["frame"] == "resize"
    for arm in ("plain", "shuffled"):
        for grid in found["grids"][arm].values():
            assert np.array(grid["count"]).shape == (2, 4)
    best = found["top"]["auroc"][0]
    means = found["grids"]["plain"]["auroc"]["mean"]
    assert best["mean"] == max(max(row) for row in means) == means[best["layer"]][best["head"]]
    assert Image.open(tmp_path / "heads.png").width > 300
    assert "shuffled masks" in capsys.readouterr().out
    assert cli.main([*command[:-1], "0", "--out", str(tmp_path)]) == 2


def test_one_head_through_the_front_door(tiny, tmp_path, capsys):
    tiny_image().save(tmp_path / "photo.png")
    command = ["explain", "head", "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path)]
    command += ["--answer", "a dog", "--question", "What?", "--layer", "1"]
    assert cli.main([*command, "--head", "3"]) == 0
    found = json.loads((tmp_path / "head.json").read_text())
    assert found["tokens"] == ["a", " dog"] and np.array(found["attention"]).shape == (2, 2, 2)
    shares = np.array(found["attention"]).sum((1, 2))
    assert shares.tolist() == pytest.approx(found["image_share"])
    assert (tmp_path / "tokens.png").exists()
    assert cli.main([*command, "--head", "4"]) == 2
    assert "heads 0 to 3" in capsys.readouterr().err


def test_tiles_are_switched_off():
    processor = tiny_processor("idefics3")
    processor.image_processor.do_image_splitting = True
    assert one_view(processor).image_processor.do_image_splitting is False


def test_grids_are_drawn_cell_by_cell():
    values = np.array([[0.0, 1.0], [np.nan, 0.5]])
    picture = grids({"x": values}, "title", {"x": [(0, 1)]}, {"x": 0.5})
    assert picture.size == grids({"x": values}, "title").size
    assert np.any(np.array(picture) != np.array(grids({"x": values}, "title")))
    with pytest.raises(ValueError, match="at least one panel"):
        grids({})
    with pytest.raises(ValueError, match=r"must be \[layers, heads\]"):
        grids({"x": [1, 2]})
