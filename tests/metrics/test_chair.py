"""CHAIR against sums done by hand, and against bad input."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.chair import scoring as chair
from firsthand.metrics.results import bootstrap, ratio

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
    assert result["coverage"] == pytest.approx((2 / 2 + 1 / 2) / 2)  # two images show an object
    counts = ("n_captions", "n_mentions", "n_hallucinated", "n_objects", "n_errors", "n_silent")
    assert [result[name] for name in counts] == [3, 7, 3, 4, 0, 1]
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
    figures = ("chair_s", "chair_i", "recall", "coverage", "mean_length")
    assert all(math.isnan(empty[name]) for name in figures)
    assert empty["n_captions"] == 0


def test_empty_captions_count_as_captions_that_say_nothing():
    rows = [caption("", 1), caption(" \n", 2), caption("A dog.", 1)]
    result = chair.score(rows, OBJECTS)
    assert [result[name] for name in ("n_captions", "n_empty", "n_silent")] == [3, 2, 2]
    assert result["mean_length"] == pytest.approx(2 / 3)


def test_failed_rows_are_counted_and_left_out():
    failed = {"id": "x", "image_id": 1, "error": "truncated file", "prediction": None}
    assert chair.score([*ROWS, failed], OBJECTS) == chair.score(ROWS, OBJECTS) | {"n_errors": 1}


@pytest.mark.parametrize(
    ("rows", "objects", "error", "message"),
    [
        ([ROWS[0], ROWS[0]], OBJECTS, ValueError, "occurs twice"),
        (ROWS, {1: ["dog"]}, ValueError, "No ground truth for 2 image ids, e.g. 2, 3"),
        (ROWS[:1], {"one": ["dog"]}, ValueError, "it knows 1, e.g. 'one'"),
        (ROWS[:1], {1: ["unicorn"]}, ValueError, "Image 1: 'unicorn' is no object"),
        (ROWS[:1], {1: "dog"}, TypeError, "not one string"),
        (ROWS[:1], {1: {"dog": 2}}, TypeError, "not a dict"),
        (ROWS[:1], {1: None}, TypeError, "not a NoneType"),
        (ROWS[:1], [["dog"]], TypeError, "not be a list"),
        (ROWS[:1], {"images": [], "annotations": []}, ValueError, "objects_from_coco"),
        ([{"id": 1, "prediction": "a dog"}], OBJECTS, ValueError, r"only \['id', 'prediction'\]"),
        ([caption(None)], OBJECTS, TypeError, "of type NoneType"),
        ([caption(["a dog"])], OBJECTS, TypeError, "of type list"),
    ],
)
def test_bad_input_is_refused_by_name(rows, objects, error, message):
    with pytest.raises(error, match=message):
        chair.score(rows, objects)


def test_bad_rows_are_skipped_with_their_reason_where_asked_for():
    bad = [ROWS[0], caption(None), caption("A cat.", 9), {"id": "x"}]
    result = chair.score([*ROWS, *bad], OBJECTS, skip_bad=True)
    clean = chair.score(ROWS, OBJECTS)
    assert {name: result[name] for name in clean} == clean | {"n_skipped": 4}
    reasons = {row["id"]: row["reason"] for row in result["skipped"]}
    assert "occurs twice" in reasons[ROWS[0]["id"]]
    assert "NoneType" in reasons["1:None"]
    assert reasons["9:A cat."] == "No ground truth for the image id 9."
    assert "needs id and image_id" in reasons["x"]
    columns = chair.pairs([*ROWS, *bad], OBJECTS, skip_bad=True)
    np.testing.assert_array_equal(columns["chair_i"], chair.pairs(ROWS, OBJECTS)["chair_i"])


def test_ids_written_as_numbers_and_as_text_are_the_same():
    as_text = {str(key): names for key, names in OBJECTS.items()}
    assert chair.score(ROWS, as_text) == chair.score(ROWS, OBJECTS)
    rows = [row | {"image_id": str(row["image_id"])} for row in ROWS]
    assert chair.score(rows, OBJECTS) == chair.score(ROWS, OBJECTS)


def test_pairs_add_up_to_the_score():
    result, columns = chair.score(ROWS, OBJECTS), chair.pairs(ROWS, OBJECTS)
    assert list(columns) == ["chair_s", "chair_i", "recall", "coverage", "mean_length"]
    np.testing.assert_array_equal(columns["chair_i"], [(1, 4), (2, 3), (0, 0)])
    for name, column in columns.items():
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(result[name])


@given(st.lists(st.sampled_from(["a dog", "a cat", "two sofas", "bananas"]), max_size=6))
def test_repeating_every_caption_changes_no_ratio(phrases):
    once = [caption(", ".join(phrases), 1), caption("a bowl", 2)]
    twice = once + [row | {"id": f"again {row['id']}"} for row in once]
    a, b = chair.score(once, OBJECTS), chair.score(twice, OBJECTS)
    for name in ("chair_s", "chair_i", "recall", "coverage", "mean_length"):
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


LONG = [
    caption("A dog near a cat. A sofa, a sofa!", 1),  # dog by word 2, *cat* by 5, couch by 7
    caption("One banana and\na bowl", 2),  # banana by 2, bowl by 5
    caption("A baby elephant.", 3),  # *elephant* by 3
]


@pytest.mark.parametrize(
    ("words", "n_mentions", "n_hallucinated", "found", "length"),
    [
        (1, 0, 0, 0, 3),
        (2, 2, 0, 2, 6),  # "baby" of "baby elephant" is no person
        (5, 5, 2, 3, 13),
        (7, 6, 2, 4, 15),
        (99, 7, 2, 4, 17),
    ],
)
def test_a_length_budget_keeps_what_ends_within_it(
    words, n_mentions, n_hallucinated, found, length
):
    result = chair.at_length(LONG, OBJECTS, words)
    assert [result["n_mentions"], result["n_hallucinated"]] == [n_mentions, n_hallucinated]
    assert result["recall"] == found / 4
    assert result["mean_length"] == pytest.approx(length / 3)
    assert (result["budget_words"], result["n_captions"]) == (words, 3)


def test_a_budget_beyond_all_captions_is_the_score():
    whole, cut = chair.score(LONG, OBJECTS), chair.at_length(LONG, OBJECTS, 10**6)
    assert cut == whole | {"budget_words": 10**6}


@pytest.mark.parametrize(("recall", "words"), [(0.1, 2), (0.5, 2), (0.51, 5), (0.75, 5), (1, 7)])
def test_a_recall_budget_is_the_smallest_that_reaches_it(recall, words):
    result = chair.at_recall(LONG, OBJECTS, recall)
    assert result == chair.at_length(LONG, OBJECTS, words)
    assert result["recall"] >= recall > chair.at_length(LONG, OBJECTS, words - 1)["recall"]


def test_budgets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="leaves no caption"):
        chair.at_length(LONG, OBJECTS, 0)
    for recall in (0, 1.2, math.nan):
        with pytest.raises(ValueError, match="not in"):
            chair.at_recall(LONG, OBJECTS, recall)
    with pytest.raises(ValueError, match="out of reach: whole captions mention 1 of the 4"):
        chair.at_recall([caption("a dog", 1), caption("sky", 2)], OBJECTS, 0.5)
