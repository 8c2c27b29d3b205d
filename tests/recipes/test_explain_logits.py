"""`explain logits`: words of image tokens, spellings that count together, IoU by pixels."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import TINY, tiny_image, tiny_llava, tiny_processor, tiny_tokenizer

from firsthand.datasets_scripts.fivl.fivl import features
from firsthand.metrics.results import read_results
from firsthand.processing.collator import word_token
from firsthand.processing.masks import decode, encode, patch_coverage
from firsthand.processing.overlays import PALETTE, cell_labels, regions
from firsthand.processing.vision_words import best_iou, read_words, region_iou, spellings_of
from firsthand.recipes.cli import main
from firsthand.recipes.explain_logits import METRICS, masks_by_word, measure, score_words


def logits_of(tokens, vocabulary=400):
    """[N, V]: each row nearly certain of its token."""
    found = torch.zeros(len(tokens), vocabulary)
    found[range(len(tokens)), tokens] = 9.0
    return found


def expression(word, inside, **changes):
    start = "a dog and a cup".index(word)
    found = {"text": word, "phrase": word, "char_start": start, "char_end": start + len(word)}
    found |= {"nouns": [word], "boxes": [], "score": 1.0, "mask": encode(inside)}
    return found | changes


def box(top, left, bottom, right):
    mask = np.zeros((60, 80), bool)
    mask[top:bottom, left:right] = True
    return mask


def sample(name, *expressions, seed=0):
    turn = {"question": "What?", "answer": "a dog and a cup", "expressions": list(expressions)}
    row = {"id": name, "record_key": name, "image": tiny_image(seed), "source": "test"}
    return row | {"turns": [turn], "rejected": []}


def samples():
    dog = [expression("dog", box(0, 0, 30, 40)), expression("dog", box(40, 40, 60, 80))]
    return [sample("0", *dog), sample("1", expression("cup", box(5, 5, 33, 71)), seed=1)]


def test_spellings_count_together_and_other_tokens_are_no_words():
    tokenizer = tiny_tokenizer()
    dog, comma = word_token(tokenizer, "dog"), tokenizer(",").input_ids[0]
    top = word_token(tokenizer, "top")
    reading = read_words(tokenizer, logits_of([dog, dog, comma, top]), (2, 2))
    assert reading.labels == [["dog", "dog"], [None, "top"]] and reading.words == ["dog", "top"]
    assert reading.share("dog") == 0.5
    expected = logits_of([dog, dog, comma, top]).softmax(-1)
    spelled = sorted(spellings_of(tokenizer, "dog"))
    np.testing.assert_allclose(reading.soft("dog").ravel(), expected[:, spelled].sum(-1), rtol=1e-5)
    special = tokenizer.image_token_id
    assert read_words(tokenizer, logits_of([special]), (1, 1)).words == []


def test_a_piece_stands_for_the_longer_word_that_is_asked_for():
    tokenizer = tiny_tokenizer()
    piece = word_token(tokenizer, "dogma")  # " dog" + "ma"
    assert piece == word_token(tokenizer, "dog")
    logits = logits_of([piece])
    assert read_words(tokenizer, logits, (1, 1)).words == ["dog"]
    assert read_words(tokenizer, logits, (1, 1), ["dogma"]).words == ["dogma"]
    assert read_words(tokenizer, logits, (1, 1), ["dogma", "dog"]).words == ["dog"]
    assert read_words(tokenizer, logits, (1, 1), ["cup"]).words == ["dog"]
    assert read_words(tokenizer, logits, (1, 1), ["dogma"]).soft("dogma")[0, 0] > 0.9


def test_iou_is_that_of_pixels():
    rng = np.random.default_rng(0)
    mask = np.kron(rng.random((6, 8)) < 0.5, np.ones((10, 10))).astype(bool)  # 60 x 80
    region = rng.random((3, 4)) < 0.5
    cells = cell_labels(region.astype(int), (80, 60)) == 1
    expected = (cells & mask).sum() / (cells | mask).sum()
    assert region_iou(region, patch_coverage(mask, (3, 4))) == pytest.approx(expected)
    assert np.isnan(region_iou(np.zeros((2, 2), bool), np.zeros((2, 2))))


def test_best_iou_is_the_best_of_all_regions():
    coverage = np.random.default_rng(1).random((2, 3))
    every = [c for n in range(1, 7) for c in combinations(range(6), n)]
    slow = max(region_iou(np.isin(np.arange(6), c).reshape(2, 3), coverage) for c in every)
    assert best_iou(coverage) == pytest.approx(slow)


@pytest.mark.parametrize("frame", ["resize", "center_crop", "pad"])
def test_cells_lie_where_coverage_counts_them(frame):
    """A region's pixels cover its own image tokens wholly, and no others."""
    labels = np.arange(4).reshape(2, 2)
    at = cell_labels(labels, (80, 40), frame)
    for index in range(4):
        cover = patch_coverage(at == index, (2, 2), frame)
        assert (cover[labels != index] == 0).all()
        assert cover.ravel()[index] == pytest.approx(0.5 if frame == "pad" else 1)
    assert (at >= 0).mean() == (0.5 if frame == "center_crop" else 1)


def test_scores_of_one_sample():
    tokenizer, row = tiny_tokenizer(), samples()[0]
    dog, top = word_token(tokenizer, "dog"), word_token(tokenizer, "top")
    masks = masks_by_word(row, []) | {"cup": box(0, 40, 30, 80)}
    np.testing.assert_array_equal(masks["dog"], box(0, 0, 30, 40) | box(40, 40, 60, 80))
    reading = read_words(tokenizer, logits_of([dog, top, top, top]), (2, 2), masks)
    ious, pairs = score_words(reading, masks, "resize")
    dog_iou = 1200 / (1200 + 800)
    assert ious == pytest.approx({"dog": dog_iou, "cup": 0})
    best = best_iou(patch_coverage(masks["dog"], (2, 2))) + 1
    expected = [(dog_iou, 2), (dog_iou, 1), (best, 2), (1, 2), (1, 2), (2, 1)]
    for name, pair in zip(METRICS, expected, strict=True):
        assert pairs[name] == pytest.approx(pair), name


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_is_measured_in_its_own_frame(family):
    model, processor = TINY[family](), tiny_processor(family)
    arms, rows, drawn, dropped = measure(model, processor, samples())
    assert [r["id"] for r in rows] == ["0", "1"] and len(drawn) == 2 and not dropped
    assert len(arms["plain"]) == len(arms["shuffled"]) == 2
    for pairs in (*arms["plain"], *arms["shuffled"]):
        found, ceiling = pairs["vision_logits_iou"], pairs["vision_logits_iou_ceiling"]
        assert 0 <= found[0] <= ceiling[0] <= ceiling[1] == found[1] == 1


def test_bad_rows_are_left_out_with_their_reason():
    wrong = encode(np.ones((9, 9), bool))
    rows = [
        *samples(),
        sample("2", expression("dog", box(0, 0, 9, 9), nouns=[])),
        sample("3", expression("dog", box(0, 0, 9, 9), mask=wrong)),
        {**sample("4"), "image": None},
    ]
    arms, kept, _, dropped = measure(tiny_llava(), tiny_processor("llava"), rows)
    assert len(kept) == len(arms["plain"]) == 2
    reasons = [d["reason"] for d in dropped]
    assert (
        "no noun" in reasons and "no image" in reasons and reasons.count("no word with a mask") == 2
    )
    assert len(arms["shuffled"]) == 1, "the sample before the first has no mask"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llava().save_pretrained(folder)
    tiny_processor("llava").save_pretrained(folder)
    return folder


def test_data_through_the_command_line(saved, tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(samples(), features=features()).to_parquet(path)
    arguments = ["explain", "logits", "--model", str(saved), "--data", str(path)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    rows = read_results(tmp_path / "out" / "results.json")
    assert {(r["arm"], r["metric"]) for r in rows} == {
        (arm, metric) for arm in ("plain", "shuffled") for metric in METRICS
    }
    assert all(r["n"] == 2 and r["protocol"]["n_ids"] == 2 for r in rows)
    assert "vision_logits_iou" in capsys.readouterr().out
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 2
    assert Image.open(tmp_path / "out" / "overlays.png").width > 320


def test_image_through_the_command_line(saved, tmp_path, capsys):
    tiny_image().save(tmp_path / "a.png")
    arguments = ["explain", "logits", "--model", str(saved), "--image", str(tmp_path / "a.png")]
    assert main([*arguments, "--words", "dog", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "logits.json").read_text())
    assert np.shape(found["labels"]) == (4, 4) and found["words"][0]["word"] == "dog"
    for row in found["words"]:
        probability = np.array(row["probability"])
        assert probability.shape == (4, 4) and 0 <= probability.min() <= probability.max() <= 1
        assert decode(row["mask"]).shape == (60, 80)
        assert decode(row["mask"]).mean() == pytest.approx(row["share"])
    assert Image.open(tmp_path / "out" / "overlay.png").width >= 448
    assert main(["explain", "logits"]) == 2
    assert main([*arguments, "--data", "scenes"]) == 2
    assert "either --image" in capsys.readouterr().err


def test_regions_are_tinted_and_named():
    image = Image.new("RGB", (100, 100), "white")
    drawn = regions(image, [[0, -1], [-1, -1]], ["dog (25%)"])
    assert drawn.width == 100 and drawn.height > 100, "a legend stands below"
    assert drawn.getpixel((5, 5)) != (255, 255, 255) == drawn.getpixel((90, 90))
    with pytest.raises(ValueError, match="names for labels"):
        regions(image, [[1]], ["dog"])
    with pytest.raises(ValueError, match="names for labels"):
        regions(image, [[0]], ["x"] * (len(PALETTE) + 1))
