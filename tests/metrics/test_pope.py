"""POPE: answers counted by hand, parsers against their table, questions against their rules."""

import gzip
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.pope import scoring as pope
from firsthand.metrics.results import bootstrap, ratio

REFERENCE = Path(os.environ.get("FIRSTHAND_REFERENCE", "no reference")) / "pope"


def answered(*answers):
    return [
        {"id": i, "image_id": i, "prediction": said, "answer": gold}
        for i, (said, gold) in enumerate(answers)
    ]


ROWS = answered(
    ("Yes, there is.", "Yes."),
    ("Yes.", "no"),
    ("no", "yes"),
    ("No.", "no"),
    ("A dog stands there.", "yes"),
)


def test_figures_are_the_counts_by_hand():
    result = pope.score(ROWS)
    assert result == {
        "pope_accuracy": 2 / 5,
        "precision": 1 / 2,
        "recall": 1 / 3,
        "f1": pytest.approx(2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3)),
        "pope_yes_ratio": 2 / 5,
        "n_unparsed": 1,
        "n": 5,
        "n_errors": 0,
        "parser": "strict",
    }


@pytest.mark.parametrize(
    ("text", "strict", "official", "exact"),
    [
        ("Yes, there is a dog.", "yes", "yes", None),
        ("No.", "no", "no", None),
        ("NO", "no", "yes", "no"),
        (" yes ", "yes", "yes", "yes"),
        ("There isn't a dog in the image.", None, "yes", None),
        ("I cannot see a dog.", None, "yes", None),
        ("The image shows a dog. It is not a cat.", None, "yes", None),
        ("A dog is present.", None, "yes", None),
        ("No, it is not.", "no", "no", None),
        ("Not at all", None, "yes", None),
        ("**Yes**", "yes", "yes", None),
        ("Yesterday", None, "yes", None),
        ("", None, "yes", None),
    ],
)
def test_parsers_by_name(text, strict, official, exact):
    assert {name: parse(text) for name, parse in pope.PARSERS.items()} == {
        "strict": strict,
        "pope": official,
        "exact": exact,
    }


def test_legacy_parser_changes_the_score():
    assert pope.score(ROWS, parser="pope")["recall"] == 2 / 3
    assert pope.score(ROWS, parser="exact")["n_unparsed"] == 4


def test_ratios_without_denominator_are_undefined():
    silent = pope.score(answered(("maybe", "no")))
    assert math.isnan(silent["precision"])
    assert math.isnan(silent["recall"])
    assert (silent["pope_accuracy"], silent["n_unparsed"]) == (0.0, 1)
    assert math.isnan(pope.score([])["pope_accuracy"])


@pytest.mark.parametrize(
    ("rows", "parser", "error", "message"),
    [
        (ROWS, "lenient", ValueError, "Unknown parser 'lenient'"),
        ([ROWS[0], ROWS[0]], "strict", ValueError, "occurs twice"),
        (answered(("yes", "maybe")), "strict", ValueError, "no yes or no"),
        (answered((True, "yes")), "strict", TypeError, "of type bool"),
    ],
)
def test_bad_input_is_refused_by_name(rows, parser, error, message):
    with pytest.raises(error, match=message):
        pope.score(rows, parser)


def test_failed_rows_are_counted_and_left_out():
    failed = {"id": "x", "answer": "yes", "error": "truncated file", "prediction": None}
    assert pope.score([*ROWS, failed]) == pope.score(ROWS) | {"n_errors": 1}


def test_pairs_add_up_to_the_score():
    result, columns = pope.score(ROWS), pope.pairs(ROWS)
    names = {"pope_precision": "precision", "pope_recall": "recall", "pope_f1": "f1"}
    assert len(columns) == 5
    for name, column in columns.items():
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(result[names.get(name, name)])
    np.testing.assert_array_equal(columns["pope_precision"].sum(axis=0), (1, 2))


@given(st.text(max_size=20))
def test_strict_parser_reads_the_first_word_only(rest):
    assert pope.parse_strict(f"Yes, {rest}") == "yes"
    assert pope.parse_strict(f"no. {rest}") == "no"
    assert pope.parse_strict(f"Well, yes {rest}") is None


# dog is in 3 images, cat in 2, cup in 2, car in 1; cup stands beside dog, car beside cat
OBJECTS = {
    "a": ["dog", "cup"],
    "b": ["dog", "cup", "dog"],
    "c": ["dog", "cat"],
    "d": ["cat", "car"],
}


def absent(questions, image_id):
    return [q["object"] for q in questions if q["image_id"] == image_id and q["answer"] == "no"]


@given(st.sampled_from(["random", "popular", "adversarial"]), st.integers(0, 9), st.integers(1, 2))
def test_questions_are_balanced_true_and_distinct(strategy, seed, half):
    questions = pope.build_questions(OBJECTS, 2 * half, strategy, seed)
    assert len({q["id"] for q in questions}) == len(questions) == 4 * 2 * half
    for question in questions:
        shown = question["object"] in OBJECTS[question["image_id"]]
        assert question["answer"] == ("yes" if shown else "no")
    asked = Counter((q["image_id"], q["object"]) for q in questions)
    assert set(asked.values()) == {1}
    counts = Counter((q["image_id"], q["answer"]) for q in questions)
    assert set(counts.values()) == {half}


def test_popular_asks_the_most_frequent_absent_objects():
    questions = pope.build_questions(OBJECTS, 4, "popular")
    assert absent(questions, "a") == ["cat", "car"]
    assert absent(questions, "d") == ["dog", "cup"]


def test_adversarial_asks_what_usually_stands_beside():
    objects = OBJECTS | {"e": ["dog"], "f": ["cat"], "g": ["car"]}
    questions = pope.build_questions(objects, 2, "adversarial")
    assert absent(questions, "e") == ["cup"]  # beside dog twice, cat once
    assert absent(questions, "f") == ["dog"]  # dog and car once each: the more frequent
    assert absent(questions, "g") == ["cat"]


def test_random_draws_all_absent_objects_evenly():
    drawn = Counter(
        name
        for seed in range(400)
        for name in absent(pope.build_questions(OBJECTS, 2, "random", seed), "a")
    )
    assert set(drawn) == {"cat", "car"}
    assert drawn["cat"] == pytest.approx(200, abs=50)


def test_questions_repeat_and_do_not_depend_on_the_order_of_images():
    questions = pope.build_questions(OBJECTS, 2, "random", 7)
    assert questions == pope.build_questions(OBJECTS, 2, "random", 7)
    backwards = pope.build_questions(dict(reversed(OBJECTS.items())), 2, "random", 7)
    assert sorted(questions, key=str) == sorted(backwards, key=str)


def test_few_objects_give_few_questions_still_balanced():
    objects = {"a": ["dog"], "b": ["cat", "cup"], "c": [], "d": ["car"]}
    questions = pope.build_questions(objects, 6)
    counts = Counter((q["image_id"], q["answer"]) for q in questions)
    assert counts == {(i, s): len(objects[i]) for i in "abd" for s in ("yes", "no")}


def test_question_text():
    texts = {q["object"]: q["question"] for q in pope.build_questions({1: ["apple"], 2: ["dog"]})}
    assert texts == {
        "apple": "Is there an apple in the image?",
        "dog": "Is there a dog in the image?",
    }
    own = pope.build_questions({1: ["dog"], 2: ["cup"]}, question="Can you see {}?".format)
    assert own[0]["question"] == "Can you see dog?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OBJECTS, 3), "even"),
        ((OBJECTS, 0), "at least 2"),
        ((OBJECTS, 2, "hard"), "Unknown strategy 'hard'"),
        (({"a": ["dog", "cat"], "b": ["dog"]}, 4), "'a' needs 2 absent objects"),
    ],
)
def test_impossible_questions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pope.build_questions(*arguments)


@pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="FIRSTHAND_REFERENCE does not name the reference questions"
)
def test_published_questions_are_read_and_balanced():
    with gzip.open(REFERENCE / "coco_pope_adversarial.json.gz", "rt") as file:
        published = [json.loads(line) for line in file]
    always = [
        {"id": q["question_id"], "prediction": "Yes.", "answer": q["label"]} for q in published
    ]
    result = pope.score(always)
    assert (result["n"], result["pope_accuracy"], result["recall"]) == (3000, 0.5, 1.0)
