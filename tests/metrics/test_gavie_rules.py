"""The offline judge: claims read out of plain sentences, and looked up in exact annotations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics import gavie
from firsthand.metrics.gavie import rules

COLORS = ["red", "blue", "orange"]
PLACES = ["top left", "center", "left of the car"]
WORDS = rules.Words(
    ["dog", "cat", "car", "bird", "orange", "alarm clock", "party"],
    {"color": COLORS, "position": PLACES},
    {"where": "position"},
)
OBJECTS = [
    {"noun": "dog", "properties": {"color": ["red"], "position": ["top left", "left of the car"]}},
    {"noun": "dog", "properties": {"color": ["blue"], "position": ["center"]}},
    {"noun": "car", "properties": {"position": []}},
    {"noun": "orange", "properties": {"color": ["orange"]}},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red dog top left, but no cat.", "dog; dog red; dog top left; no cat"),
        ("There is no dog, cat or bird.", "no dog; no cat; no bird"),
        ("No dog, a cat.", "no dog; cat"),
        ("The dog is not red.", "dog; no dog red"),
        ("There isn’t a red car.", "no car red"),
        ("I don't see a dog that is red.", "no dog red"),
        ("In the center there is a dog and a cat.", "dog; dog center; cat"),
        ("The car is blue and the dog is red.", "car; car blue; dog; dog red"),
        ("Two alarm clocks, dogs, parties.", "alarm clock; dog; party"),
        ("The dog is left of the car.", "dog; dog left of the car"),
        ("A dog top left, a cup center.", "dog; dog top left"),
        ("An orange car and an orange.", "car; car orange; orange"),
        ("A dog and a red and blue car.", "dog; car; car red; car blue"),
        ("A dog top left and a red car.", "dog; dog top left; car; car red"),
        ("It is red. It is red!", "bird red"),
        ("the image shows red", "bird red"),
        ("a cup, red", ""),
        ("", ""),
    ],
)
def test_claims_of_plain_sentences(text, expected):
    assert "; ".join(map(str, rules.claims(text, WORDS, topic="bird"))) == expected


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        (rules.Claim("dog"), True),
        (rules.Claim("cat"), False),
        (rules.Claim("cat", (), False), True),
        (rules.Claim("dog", (("color", "blue"),)), True),
        (rules.Claim("dog", (("color", "orange"),)), False),
        (rules.Claim("dog", (("color", "red"), ("position", "center")), False), True),
        (rules.Claim("dog", (("color", "red"), ("position", "top left")), False), False),
        (rules.Claim("car", (("color", "red"),)), None),
        (rules.Claim("car", (("color", "red"),), False), None),
        (rules.Claim("car", (("color", "red"), ("position", "center")), False), True),
        (rules.Claim("cat", (("color", "red"),)), False),
    ],
)
def test_what_holds(claim, truth):
    assert rules.holds(claim, OBJECTS) is truth


@pytest.mark.parametrize(
    ("question", "answer", "relevance", "accuracy"),
    [
        ("Is there a dog?", "Yes.", 10, 10),
        ("Is there a dog?", "No", 10, 0),
        ("Is there a cat?", "No, there is no cat.", 10, 10),
        ("Is there a cat?", "No there is a dog", 10, 10),
        ("Is there a cat?", "No dog is there.", 0, 0),
        ("Is there a cat?", "Yes, a red cat.", 10, 0),
        ("Is the dog red?", "Yes", 10, 10),
        ("Is the orange red?", "No.", 10, 10),
        ("What color is the dog?", "Blue.", 10, 10),
        ("What color is the dog?", "The dog is in the center.", 0, 10),
        ("What color is the cat?", "It is red.", 10, 0),
        ("What color is the cat?", "There is no cat.", 10, 10),
        ("Where is the dog?", "left of the car", 10, 10),
        ("Where is the dog?", "A car.", 0, 10),
        ("How many dogs are there?", "Two.", 10, 10),
        ("How many dogs are there?", "3 dogs", 10, 5),
        ("How many objects are there?", "There are four.", 10, 10),
        ("How many cats are there?", "There is no cat.", 10, 10),
        ("Describe the image.", "A dog, a car and a bird.", 10, 20 / 3),
        ("Describe the cat.", "There is no cat, but a dog.", 10, 10),
        ("Describe the image.", "", 0, 10),
    ],
)
def test_marks(question, answer, relevance, accuracy):
    found = rules.rule_judge(question, answer, OBJECTS, WORDS)
    assert (found["relevance"], found["accuracy"]) == (relevance, pytest.approx(accuracy))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Describe the image.", "A lovely day."),
        ("What color is the car?", "Red."),
        ("Is it sunny?", "Yes."),
        ("Is the car red?", "Yes."),
    ],
)
def test_what_the_annotations_do_not_decide_has_no_marks(question, answer):
    with pytest.raises(ValueError, match="the annotations decide no claim"):
        rules.rule_judge(question, answer, OBJECTS, WORDS)


@given(st.text(), st.text())
def test_any_text_is_marked_or_refused(question, answer):
    try:
        found = rules.rule_judge(question, answer, OBJECTS, WORDS)
    except ValueError:
        return
    assert found["relevance"] in (0, 10) and 0 <= found["accuracy"] <= 10


ROWS = [
    {"id": 0, "image_id": 7, "question": "Is there a dog?", "prediction": "Yes."},
    {"id": 1, "image_id": "7", "question": "Is there a cat?", "prediction": "Yes."},
    {"id": 2, "image_id": "7", "question": "Describe it.", "prediction": "Lovely."},
    {"id": 3, "error": "truncated"},
]


def test_figures_say_that_rules_made_them():
    rows = rules.rate(ROWS, {"7": OBJECTS}, WORDS)
    found = gavie.score(rows)
    assert (found["gavie_rule_relevance"], found["gavie_rule_accuracy"]) == (10, 5)
    assert (found["n"], found["n_unparsed"], found["n_errors"]) == (2, 1, 1)
    assert "gavie_accuracy" not in found
    assert rules.rate(rows, {}, WORDS, skip_bad=True)[0] == rows[0]  # marks stay
    judged = {key: value for key, value in rows[0].items() if key != "judge"} | {"id": "j"}
    with pytest.raises(ValueError, match="Only some of the rows were rated by rule_judge"):
        gavie.score([*rows, judged])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "Row 'x': no annotations of the image 8"),
        ({"prediction": None}, "`prediction` is of type NoneType"),
        ({"question": 1}, "`question` is of type int"),
    ],
)
def test_rows_that_rules_cannot_mark_are_refused_or_kept(change, message):
    bad = {**ROWS[0], "id": "x", **change}
    with pytest.raises(ValueError, match=message):
        rules.rate([*ROWS, bad], {"7": OBJECTS}, WORDS)
    rows = rules.rate([*ROWS, bad], {"7": OBJECTS}, WORDS, skip_bad=True)
    assert gavie.score(rows)["n_errors"] == 2
