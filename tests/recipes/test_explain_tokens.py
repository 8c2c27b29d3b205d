"""`firsthand explain tokens` on a checkpoint whose processor cuts images into tiles."""

import re

import pytest
from PIL import Image
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.modeling import Explanation
from firsthand.recipes.cli import main


def test_a_tiling_model_is_shown_the_image_whole(tmp_path, capsys):
    processor = tiny_processor("idefics3")
    processor.image_processor.do_image_splitting = True
    TINY["idefics3"]().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tiny_image(3, 160, 120).save(tmp_path / "photo.png")
    names = {"model": "model", "image": "photo.png", "out": "out"}
    given = [part for name, path in names.items() for part in (f"--{name}", str(tmp_path / path))]
    asked = ["--question", "What is it?", "--answer", "a dog, a cup."]
    assert main(["explain", "tokens", *given, *asked]) == 0
    printed = capsys.readouterr().out
    words = re.findall(r"^  (\w+) .*against blank [+-]\d+\.\d\d", printed, re.M)
    assert words == ["a", "dog", "a", "cup"]
    found = Explanation.load(tmp_path / "out")
    assert found.image.shape[1:] == (2, 2) and found.patches.shape[1:] == (4, 4)
    assert found.baseline == "blank"
    dog = float(found.word(1).visual_contribution)
    assert float(re.search(r"dog +visual contribution (\S+)", printed)[1]) == pytest.approx(
        dog, abs=0.01
    )
    with Image.open(tmp_path / "out" / "words.png") as sheet:
        assert min(sheet.size) > 100
