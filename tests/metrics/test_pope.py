"""POPE: answers counted by hand, parsers against their table, questions against their rules."""

import gzip
import json
import math
import os
import re
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
        "n_skipped": 0,
        "parser": "strict",
    }


@pytest.mark.parametrize(
    ("text", "strict", "official", "opera", "vcd", "exact"),
    [  # vcd: how it reads the text if the right answer is yes, and if it is no
        ("Yes, there is a dog.", "yes", "yes", "yes", ("yes", "yes"), None),
        ("No.", "no", "no", "no", ("no", "no"), None),
        ("NO", "no", "yes", "no", ("no", "no"), "no"),
        ("There isn't a dog in the image.", None, "yes", "no", ("no", "yes"), None),
        ("I cannot see a dog.", None, "yes", "yes", ("no", "no"), None),
        ("The image shows a dog. It is not a cat.", None, "yes", "no", ("no", "no"), None),
        ("A dog is present.", None, "yes", "yes", ("no", "yes"), None),
        (" yes ", "yes", "yes", "yes", ("yes", "yes"), "yes"),
        ("No, it is not.", "no", "no", "no", ("no", "no"), None),
        ("Not at all", None, "yes", "yes", ("no", "no"), None),
        ("**Yes**", "yes", "yes", "yes", ("yes", "yes"), None),
        ("Yesterday", None, "yes", "yes", ("yes", "yes"), None),
        ("", None, "yes", "yes", ("no", "yes"), None),
    ],
)
def test_parsers_by_name(text, strict, official, opera, vcd, exact):
    blind = {"strict": strict, "pope": official, "opera": opera}
    blind |= {"exact": exact, "lmms_eval": exact}
    assert {name: parse(text) for name, parse in pope.PARSERS.items()} == blind
    assert set(pope.PARSER_NAMES) == {*blind, "vcd"}
    for gold in ("yes", "no"):
        read = {name: pope.read_answer(text, gold, name) for name in blind}
        assert read == blind
    assert tuple(pope.read_answer(text, gold, "vcd") for gold in ("yes", "no")) == vcd


@given(st.text(alphabet="yesno 't.,N", max_size=12), st.sampled_from(["yes", "no"]))
def test_vcd_is_right_where_the_right_answer_stands_anywhere(text, gold):
    result = pope.score(answered((text, gold)), parser="vcd")
    assert result["pope_accuracy"] == float(gold in text.lower())
    assert result["n_unparsed"] == 0


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
        ([{"prediction": "yes", "answer": "no"}], "strict", ValueError, "needs id, answer"),
        ([{"id": 1, "answer": "no"}], "strict", TypeError, "of type NoneType"),
    ],
)
def test_bad_input_is_refused_by_name(rows, parser, error, message):
    with pytest.raises(error, match=message):
        pope.score(rows, parser)


def test_failed_rows_are_counted_and_left_out():
    failed = {"id": "x", "answer": "yes", "error": "truncated file", "prediction": None}
    assert pope.score([*ROWS, failed]) == pope.score(ROWS) | {"n_errors": 1}


def test_bad_rows_are_skipped_and_named_where_asked_for():
    bad = [ROWS[0], {"id": "w", "prediction": 3, "answer": "no"}, {"id": "a", "prediction": "No"}]
    bad += [{"id": "m", "prediction": "No", "answer": "maybe"}]
    result = pope.score([*ROWS, *bad], skip_bad=True)
    assert [skipped["id"] for skipped in result.pop("skipped")] == [0, "w", "a", "m"]
    assert result == pope.score(ROWS) | {"n_skipped": 4}
    columns = pope.pairs([*ROWS, *bad], skip_bad=True)
    assert all(len(column) == len(ROWS) for column in columns.values())
    ids = pope.pair_ids([*ROWS, *bad], skip_bad=True)
    assert ids == {name: [0, 1, 2, 3, 4] for name in columns}


def test_details_say_how_each_answer_was_read():
    failed = {"id": "x", "answer": "yes", "error": "truncated file"}
    assert pope.score([*ROWS, failed], details=True)["answers"][3:] == [
        {"id": 3, "image_id": 3, "answer": "no", "parsed": "no"},
        {"id": 4, "image_id": 4, "answer": "yes", "parsed": None},
    ]


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


def test_adversarial_draws_where_nothing_stands_beside():
    objects = {"a": ["dog"], "b": ["cat"], "c": ["cup"], "d": ["cup"]}
    drawn = {
        tuple(absent(pope.build_questions(objects, 2, "adversarial", s), "a")) for s in range(40)
    }
    assert drawn == {("cat",), ("cup",)}


def test_images_are_drawn_among_those_with_enough_objects():
    objects = {i: [f"thing {k}" for k in range(i % 5)] for i in range(50)}
    drawn = pope.sample_images(objects, n=12, min_objects=3, seed=1)
    assert len(drawn) == 12
    assert all(names == sorted(objects[i]) and len(names) >= 3 for i, names in drawn.items())
    assert drawn == pope.sample_images(dict(reversed(objects.items())), 12, 3, 1)
    assert drawn != pope.sample_images(objects, 12, 3, 2)
    with pytest.raises(ValueError, match="Only 20 of 50 images show 3 objects or more, and 500"):
        pope.sample_images(objects)


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


QUESTIONS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
]
READ = [
    {
        "id": q["question_id"],
        "image_id": q["image"],
        "image": q["image"],
        "question": q["text"],
        "answer": q["label"],
    }
    for q in QUESTIONS
]


@pytest.mark.parametrize("name", ["coco.json", "coco.json.gz", "gqa.json", "gqa.json.gz"])
def test_question_files_are_lines_or_a_list(tmp_path, name):
    text = "\n".join(map(json.dumps, QUESTIONS)) + "\n"
    if name.startswith("gqa"):
        text = json.dumps(QUESTIONS, indent=4)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert pope.read_questions(tmp_path / name) == READ


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "question 1: POPE's questions have question_id"),
        ("[1]", "question 1: .* has int"),
        ("{", "line 1 is not JSON"),
        ("[{", "is not a JSON list"),
        (json.dumps(QUESTIONS + QUESTIONS[:1]), "question id 1 occurs twice"),
        (json.dumps([QUESTIONS[0] | {"label": "maybe"}]), "'maybe' is no yes or no"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        pope.read_questions(tmp_path / "q.json")


def test_answers_are_joined_by_id_whatever_their_order():
    answers = [{"id": "2", "prediction": "No."}, {"id": 1, "prediction": "Yes."}]
    joined = pope.join(READ, answers)
    assert [(row["id"], row["prediction"]) for row in joined] == [(1, "Yes."), (2, "No.")]
    assert pope.score(joined)["pope_accuracy"] == 1.0
    by_order = pope.join(READ, answers, by="order")
    assert [row["prediction"] for row in by_order] == ["No.", "Yes."]
    assert pope.score(by_order)["pope_accuracy"] == 0.0


def test_ids_of_one_side_are_refused_or_counted():
    answers = [{"id": 2, "prediction": "No."}, {"id": 9, "prediction": "No."}]
    with pytest.raises(ValueError, match="1 questions have no answer, e.g. 1"):
        pope.join(READ, answers)
    with pytest.raises(ValueError, match="1 answers belong to no question, e.g. 9"):
        pope.join(READ[1:], answers)
    with pytest.raises(ValueError, match="2 ids occur twice among the answers, e.g. 2, 9"):
        pope.join(READ, answers * 2)
    with pytest.raises(ValueError, match="1 answers to 2 questions by order"):
        pope.join(READ, answers[:1], by="order")
    with pytest.raises(ValueError, match="by id or by order, not by 'text'"):
        pope.join(READ, answers, by="text")
    result = pope.score(pope.join(READ, answers, skip_bad=True), skip_bad=True)
    assert (result["n"], result["n_errors"], result["n_skipped"]) == (1, 1, 1)
    assert result["skipped"][0]["id"] == 9


@pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="FIRSTHAND_REFERENCE does not name the reference questions"
)
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_published_questions_are_read_and_balanced(split):
    published = pope.read_questions(REFERENCE / f"coco_pope_{split}.json.gz")
    assert Counter(q["answer"] for q in published) == {"yes": 1500, "no": 1500}
    per_image = Counter((q["image_id"], q["answer"]) for q in published)
    assert (len(per_image), set(per_image.values())) == (1000, {3})
    assert len({(q["image_id"], q["question"]) for q in published}) == 3000
    nouns = [re.fullmatch(r"Is there an? (.*) in the image\?", q["question"])[1] for q in published]
    ours = [
        q["question"] == pope.existence_question(noun)
        for q, noun in zip(published, nouns, strict=True)
    ]
    assert sum(ours) == (2999 if split == "random" else 3000)  # one "a" before a vowel
    gold = [{"id": q["id"], "prediction": q["answer"]} for q in reversed(published)]
    joined = pope.join(published, gold)
    for parser in pope.PARSER_NAMES:
        result = pope.score(joined, parser)
        assert [result[k] for k in ("pope_accuracy", "precision", "recall", "f1")] == [1.0] * 4
        assert (result["pope_yes_ratio"], result["n_unparsed"], result["n"]) == (0.5, 0, 3000)
    always = pope.score([row | {"prediction": "Yes."} for row in published])
    assert (always["n"], always["pope_accuracy"], always["recall"]) == (3000, 0.5, 1.0)
