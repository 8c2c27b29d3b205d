"""Scenes: exact ground truth, determinism, the splits' promises, and the committed copy."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from firsthand.datasets_scripts.scenes import scenes
from firsthand.recipes import demo_data

SPLITS = ("validation", "test", "test_prior", "test_unseen")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """Every noun in two training styles and the unseen one: discs of random colours."""
    root, rng = tmp_path_factory.mktemp("sprites"), random.Random(0)
    for style in ("noto", "fxemoji", scenes.UNSEEN_STYLE):
        for noun in scenes.NOUNS:
            folder = root / style / noun.replace(" ", "_")
            folder.mkdir(parents=True)
            image = Image.new("RGBA", (60, 40))
            color = tuple(rng.randint(0, 255) for _ in range(3))
            ImageDraw.Draw(image).ellipse((2, 2, 57, 37), fill=(*color, 255))
            image.save(folder / "0.png")
    return root


def test_a_scene_is_a_function_of_its_number(sprites):
    folder = scenes.SpriteFolder(sprites)
    a, b = (scenes.draw("test", 3, folder) for _ in range(2))
    assert a["image"].tobytes() == b["image"].tobytes()
    assert a["objects"] == b["objects"] and a["questions"] == b["questions"]
    assert scenes.draw("test", 4, folder)["image"].tobytes() != a["image"].tobytes()
    assert scenes.draw("test", 3, folder, seed=1)["objects"] != a["objects"]


def test_workers_change_nothing(sprites):
    one = list(scenes.iterate("test", 20, sprites))
    two = list(scenes.iterate("test", 20, sprites, workers=2))
    assert [r["image"].tobytes() for r in one] == [r["image"].tobytes() for r in two]


@pytest.mark.parametrize("split", SPLITS)
def test_ground_truth_is_consistent(split):
    """On the committed scenes: masks, boxes, positions, captions and questions agree."""
    for row in demo_data.load_scenes(split, 60):
        seen = np.zeros((224, 224), int)
        for o in row["objects"]:
            mask = coco_mask.decode({**o["mask"], "counts": o["mask"]["counts"].encode()})
            ys, xs = np.nonzero(mask)
            assert o["area"] == mask.sum() > 0
            assert o["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            seen += mask
        assert seen.max() == 1, "visible parts do not overlap"
        nouns = [o["noun"] for o in row["objects"]]
        assert 1 <= len(nouns) == len(set(nouns)) <= 5
        assert len({o["position"] for o in row["objects"]}) == len(nouns)
        assert row["caption"] == scenes.caption(row["objects"])
        dense = scenes.dense_captions(row["objects"])
        assert [d["box"] for d in dense] == [o["box"] for o in row["objects"]]
        assert all(d["caption"].endswith(n) for d, n in zip(dense, nouns, strict=True))
        answers = Counter((q["task"], q["answer"]) for q in row["questions"])
        assert answers["existence", "Yes."] == answers["existence", "No."] == len(nouns)
        assert answers["counting", scenes.NUMBERS[len(nouns)] + "."] == 1
        for q in row["questions"]:
            if q["task"] == "existence":
                asked = [n for n in scenes.NOUNS if scenes.existence_question(n) == q["question"]]
                assert (asked[0] in nouns) == (q["answer"] == "Yes.")


def themes(row):
    return [scenes.NOUNS[o["noun"]] for o in row["objects"]]


def test_the_prior_holds_in_test_and_is_broken_in_test_prior():
    def together(split):
        rows = [themes(r) for r in demo_data.load_scenes(split) if len(r["objects"]) > 1]
        return np.mean([len(set(t)) < len(t) for t in rows])

    assert together("test") > 0.8
    assert together("test_prior") == 0.0


def test_the_unseen_style_is_in_no_other_split():
    for split in SPLITS:
        styles = {o["style"] for r in demo_data.load_scenes(split) for o in r["objects"]}
        assert (scenes.UNSEEN_STYLE in styles) == (split == "test_unseen")
        assert styles <= {*scenes.TRAIN_STYLES, scenes.UNSEEN_STYLE}
    assert scenes.UNSEEN_STYLE not in scenes.TRAIN_STYLES


def test_enough_nouns_and_no_splits_share_scenes():
    assert len(scenes.NOUNS) >= 60
    images = [r["image"].tobytes() for s in SPLITS for r in demo_data.load_scenes(s, 40)]
    assert len(set(images)) == len(images)


def test_the_committed_copy_is_small_and_has_notices():
    folder = demo_data.SCENES
    assert sum(p.stat().st_size for p in folder.rglob("*.parquet")) <= 8e6
    card = (folder / "README.md").read_text("utf-8")
    for name in ("Microsoft", "Google", "Mozilla", "EmojiOne", "Twemoji", "CC BY 4.0"):
        assert name in card


def test_build_writes_what_load_dataset_reads(sprites, tmp_path):
    from datasets import load_dataset

    out = scenes.build(tmp_path / "out", sprites, {"test": 3, "test_prior": 2}, lossy=True)
    loaded = load_dataset(str(out), "test_prior", split="test_prior")
    assert len(loaded) == 2 and loaded[0]["image"].size == (224, 224)
    assert loaded.features["objects"] == scenes.features()["objects"]
    row = scenes.draw("test_prior", 1, scenes.SpriteFolder(sprites))
    assert loaded[1]["objects"] == row["objects"]


def test_bad_input_comes_before_any_drawing(sprites, tmp_path):
    with pytest.raises(ValueError, match="no split 'tset'"):
        scenes.build(tmp_path / "out", sprites, {"tset": 5})
    with pytest.raises(ValueError, match="test_photo: photo"):
        scenes.build(tmp_path / "out", sprites, {"test_photo": 5})
    with pytest.raises(FileNotFoundError, match="no sprite folder"):
        scenes.build(tmp_path / "out", tmp_path / "nothing", {"test": 5})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((200, 20, 20), "red"),
        ((20, 160, 40), "green"),
        ((30, 60, 200), "blue"),
        ((240, 220, 40), "yellow"),
        ((110, 60, 20), "brown"),
        ((250, 250, 250), "white"),
        ((10, 10, 10), "black"),
        ((128, 128, 128), "gray"),
    ],
)
def test_colors_have_their_names(rgb, name):
    pixels = np.full((50, 3), rgb, np.uint8)
    assert scenes.color_of(pixels) == (name, 1.0)
