"""CHAIR against sums done by hand, against published counts, and against bad input."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.chair import scoring as chair
from firsthand.metrics.results import bootstrap, ratio

REFERENCE = Path(os.environ.get("FIRSTHAND_REFERENCE", "no reference")) / "chair"
OBJECTS = {1: ["dog", "couch"], 2: ["banana", "bowl"], 3: []}


def caption(text, image_id=1, **more):
    return {"id": f"{image_id}:{text}", "image_id": image_id, "question": "?"} | {
        "prediction": text,
        **more,
    }


ROWS = [
    caption("A dog, a dog and a cat on a sofa.", 1),  # dog dog *cat* couch
    caption("Two bananas near an apple; an apple pie.", 2),  # banana *apple* *apple*
    caption("Nothing at all.", 3),
]


def test_figures_are_the_sums_by_hand():
    result = chair.score(ROWS, OBJECTS)
    assert result["chair_s"] == pytest.approx(2 / 3)
    assert result["chair_i"] == pytest.approx(3 / 7)
    assert result["recall"] == pytest.approx(3 / 4)
    assert result["mean_length"] == pytest.approx((10 + 8 + 3) / 3)
    assert result["length_unit"] == "words"
    counts = ("n_captions", "n_mentions", "n_hallucinated", "n_objects", "n_errors")
    assert [result[name] for name in counts] == [3, 7, 3, 4, 0]
    assert result["variant"] == "original"
    assert result["lexicon_hash"] == chair.COCO.hash


def test_details_give_every_word_with_its_place():
    captions = chair.score(ROWS, OBJECTS, details=True)["captions"]
    assert captions[0] == {
        "id": ROWS[0]["id"],
        "image_id": 1,
        "words": ["dog", "dog", "cat", "sofa"],
        "spans": [(2, 5), (9, 12), (19, 22), (28, 32)],
        "nodes": ["dog", "dog", "cat", "couch"],
        "hallucinated": [False, False, True, False],
    }
    assert captions[2]["words"] == captions[2]["hallucinated"] == []


def test_tokens_are_the_length_where_every_row_counts_them():
    rows = [caption("A dog.", 1, n_tokens=4), caption("A bowl.", 2, n_tokens=8)]
    result = chair.score(rows, OBJECTS)
    assert (result["mean_length"], result["length_unit"]) == (6.0, "tokens")
    mixed = chair.score([rows[0], caption("A bowl", 2)], OBJECTS)
    assert (mixed["mean_length"], mixed["length_unit"]) == (2.0, "words")


def test_no_object_mentioned_anywhere_is_undefined_not_zero():
    result = chair.score([caption("Sky.", 1)], OBJECTS)
    assert math.isnan(result["chair_i"])
    assert (result["chair_s"], result["recall"], result["n_mentions"]) == (0.0, 0.0, 0)
    empty = chair.score([], OBJECTS)
    assert all(math.isnan(empty[name]) for name in ("chair_s", "chair_i", "recall", "mean_length"))
    assert empty["n_captions"] == 0


def test_failed_rows_are_counted_and_left_out():
    failed = {"id": "x", "image_id": 1, "error": "truncated file", "prediction": None}
    assert chair.score([*ROWS, failed], OBJECTS) == chair.score(ROWS, OBJECTS) | {"n_errors": 1}


@pytest.mark.parametrize(
    ("rows", "objects", "error", "message"),
    [
        ([ROWS[0], ROWS[0]], OBJECTS, ValueError, "occurs twice"),
        (ROWS, {1: ["dog"]}, ValueError, "No ground truth for 2 image ids, e.g. 2, 3"),
        (ROWS[:1], {"1": ["dog"]}, ValueError, "of the same type"),
        (ROWS[:1], {1: ["unicorn"]}, ValueError, "'unicorn' is no object"),
        (ROWS[:1], {1: "dog"}, TypeError, "not one string"),
        ([caption(None)], OBJECTS, TypeError, "of type NoneType"),
        ([caption(["a dog"])], OBJECTS, TypeError, "of type list"),
    ],
)
def test_bad_input_is_refused_by_name(rows, objects, error, message):
    with pytest.raises(error, match=message):
        chair.score(rows, objects)


def test_pairs_add_up_to_the_score():
    result, columns = chair.score(ROWS, OBJECTS), chair.pairs(ROWS, OBJECTS)
    assert list(columns) == ["chair_s", "chair_i", "recall", "mean_length"]
    np.testing.assert_array_equal(columns["chair_i"], [(1, 4), (2, 3), (0, 0)])
    for name, column in columns.items():
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(result[name])


@given(st.lists(st.sampled_from(["a dog", "a cat", "two sofas", "bananas"]), max_size=6))
def test_repeating_every_caption_changes_no_ratio(phrases):
    once = [caption(", ".join(phrases), 1), caption("a bowl", 2)]
    twice = once + [row | {"id": f"again {row['id']}"} for row in once]
    a, b = chair.score(once, OBJECTS), chair.score(twice, OBJECTS)
    for name in ("chair_s", "chair_i", "recall", "mean_length"):
        assert a[name] == pytest.approx(b[name])
    assert b["n_mentions"] == 2 * a["n_mentions"]


SCENES = {
    1: [
        {"noun": "dog", "position": "top left"},
        {"noun": "teddy bear", "position": "center"},
        {"noun": "cup", "position": "bottom right"},
    ]
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a dog top left, a teddy bear center, a cup bottom right.", 3),
        ("A dog in the upper-left corner and a teddy bear in the middle.", 2),
        ("a dog bottom right, a teddy bear top left, a cup center.", 0),
        ("a dog, top left. a cup", 0),  # the clause of the dog ends before the position
        ("top left a dog", 0),  # the position must follow
        ("a dog top left, a dog top left", 1),
        ("a dog and a cup bottom right", 1),  # it is the cup's
        ("a cat top left", 0),
        ("", 0),
    ],
)
def test_position_belongs_to_the_noun_before_it(text, right):
    assert chair.position_accuracy([caption(text)], SCENES) == pytest.approx(right / 3)


def test_position_accuracy_of_scenes_without_objects_is_undefined():
    assert math.isnan(chair.position_accuracy([caption("a dog")], {1: []}))
    assert math.isnan(chair.position_accuracy([], SCENES))


def test_position_pairs_and_bad_positions():
    rows = [caption("a dog top left"), caption("nothing")]
    np.testing.assert_array_equal(chair.position_pairs(rows, SCENES), [(1, 3), (0, 3)])
    with pytest.raises(ValueError, match="'somewhere' is no position"):
        chair.position_accuracy(rows[:1], {1: [{"noun": "dog", "position": "somewhere"}]})
    with pytest.raises(ValueError, match="No ground truth"):
        chair.position_accuracy(rows, {2: []})


@pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="FIRSTHAND_REFERENCE does not name the reference captions"
)
@pytest.mark.parametrize(
    "name", ["Instruction1_llava", "Instruction1_minigpt-4", "Instruction2_llava"]
)
def test_published_counts_on_real_captions(name):
    with gzip.open(REFERENCE / f"{name}.jsonl.gz", "rt") as file:
        published = [json.loads(line) for line in file]
    rows = [
        {"id": i, "image_id": row["image_id"], "prediction": row["caption"]}
        for i, row in enumerate(published)
    ]
    objects = {row["image_id"]: row["objects"] for row in published}
    result = chair.score(rows, objects, details=True)
    differ = [
        row["image_id"]
        for row, ours in zip(published, result["captions"], strict=True)
        if row["original"] != ours["nodes"]
    ]
    assert differ == []
    expected = json.loads((REFERENCE / "expected_scores.json").read_text())[name]["original"]
    for figure in ("chair_s", "chair_i", "recall"):
        assert result[figure] == pytest.approx(expected[figure], abs=1e-12)
