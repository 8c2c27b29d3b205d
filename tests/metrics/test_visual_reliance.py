"""Visual reliance against sums done by hand, and against rows that do not pair."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.results import bootstrap, ratio
from firsthand.metrics.visual_reliance import scoring as visual_reliance


def views(**scores):
    return [
        {"id": i, "condition": condition, "score": value}
        for condition, values in scores.items()
        for i, value in enumerate(values)
    ]


ROWS = views(
    plain=[1, 1, 1, 0.0],
    masked=[0, 0, 1, 1.0],
    control=[1, 0, 1, 1.0],
    blank=[0, 0, 1, 0.0],
)


def test_figures_are_the_sums_by_hand():
    assert visual_reliance.score(ROWS) == {
        "visual_reliance": pytest.approx(1 / 3),
        "absolute_drop": pytest.approx(1 / 4),
        "flip_rate": pytest.approx(2 / 3),
        "control_adjusted": pytest.approx(1 / 3),
        "normalised": pytest.approx(1 / 2),
        "score_plain": 0.75,
        "score_masked": 0.5,
        "score_control": 0.75,
        "score_blank": 0.25,
        "score_outside": pytest.approx(float("nan"), nan_ok=True),
        "n": 4,
        "n_control": 4,
        "n_unmasked": 0,
        "n_errors": 0,
    }


def test_answers_are_scored_by_their_first_words():
    rows = [
        {"id": 1, "condition": "plain", "prediction": "Yes, a dog.", "answer": "Yes."},
        {"id": 1, "condition": "masked", "prediction": "No.", "answer": "Yes."},
    ]
    assert visual_reliance.score(rows)["visual_reliance"] == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Top-left.", "top left", 1.0),
        ("top", "top left", 0.0),
        ("yesterday", "yes", 0.0),
        ("The dog is red", "red", 0.0),
        ("", "yes", 0.0),
        ("anything", "", 0.0),
    ],
)
def test_answer_score(prediction, answer, expected):
    assert visual_reliance.answer_score(prediction, answer) == expected


def test_ids_without_masked_view_and_failed_ids_are_counted():
    rows = ROWS + [
        {"id": "yes or no", "condition": "plain", "score": 1.0},
        {"id": "broken", "condition": "plain", "score": 1.0},
        {"id": "broken", "condition": "masked", "error": "truncated file"},
        {"id": "broken", "condition": "control", "score": 1.0},
        {"id": "broken", "condition": "blank", "score": 1.0},
    ]
    counted = visual_reliance.score(ROWS) | {"n_unmasked": 1, "n_errors": 1}
    assert visual_reliance.score(rows) == counted


def test_missing_conditions_and_zero_scores_are_undefined():
    result = visual_reliance.score(views(plain=[0, 0], masked=[1, 0]))
    undefined = ("visual_reliance", "control_adjusted", "normalised", "flip_rate", "score_blank")
    assert all(math.isnan(result[name]) for name in undefined)
    assert result["absolute_drop"] == -0.5
    assert visual_reliance.score([])["n"] == 0


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (views(plain=[1], dark=[1]), ValueError, "Unknown condition 'dark'"),
        (views(plain=[1], masked=[1, 1]), ValueError, "1 masked ids have no plain row, e.g. 1"),
        (views(plain=[1, 1], masked=[1, 1], blank=[1]), ValueError, "'blank' rows cover other"),
        (views(plain=[1], masked=[1]) * 2, ValueError, "occurs twice under 'plain'"),
        (views(plain=[1.5], masked=[1]), ValueError, "outside 0..1"),
        (
            [{"id": 0, "condition": "plain", "prediction": None, "answer": "yes"}],
            TypeError,
            "`prediction` is of type NoneType",
        ),
    ],
)
def test_rows_that_do_not_pair_are_refused(rows, error, message):
    with pytest.raises(error, match=message):
        visual_reliance.score(rows)


def test_pairs_add_up_to_the_score():
    result, columns = visual_reliance.score(ROWS), visual_reliance.pairs(ROWS)
    assert len(columns) == 5
    for name, column in columns.items():
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(result[name])
    assert list(visual_reliance.pairs(views(plain=[1], masked=[0]))) == [
        "visual_reliance",
        "absolute_drop",
        "flip_rate",
    ]


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_reliance_is_at_most_one_and_zero_if_nothing_changes(scores):
    plain, masked = zip(*scores, strict=True)
    assert visual_reliance.score(views(plain=plain, masked=masked))["visual_reliance"] <= 1
    assert visual_reliance.score(views(plain=plain, masked=plain))["visual_reliance"] == 0


def test_ids_without_room_for_a_control_are_left_out_of_it():
    some = [r for r in ROWS if r["condition"] != "control" or r["id"] in (0, 3)]
    found = visual_reliance.score(some)
    assert found["visual_reliance"] == pytest.approx(1 / 3) and found["n_control"] == 2
    assert found["control_adjusted"] == pytest.approx((1 - 0 + 1 - 1) / 1)
    assert len(visual_reliance.pairs(some)["control_adjusted"]) == 2
    alone = some + [{"id": 9, "condition": "control", "score": 1}]
    with pytest.raises(ValueError, match="'control' rows cover other ids.*9"):
        visual_reliance.score(alone)


def test_what_is_left_of_the_image_has_its_score():
    assert visual_reliance.score(ROWS + views(outside=[1, 1, 1, 1.0]))["score_outside"] == 1
    with pytest.raises(ValueError, match="'outside' rows cover other ids"):
        visual_reliance.score(ROWS + views(outside=[1, 1]))


def test_regions_of_like_size_are_scored_together():
    areas = [0.05, 0.06, 0.5, 0.30001]
    rows = [r | {"area": areas[r["id"]]} if r["condition"] == "masked" else r for r in ROWS]
    table = visual_reliance.by_area(rows)
    assert [line["n"] for line in table] == [1, 1, 0, 0, 2]
    assert [(line["low"], line["high"]) for line in table][0] == (0.0, 0.05)
    assert table[0]["visual_reliance"] == 1.0 and math.isnan(table[2]["visual_reliance"])
    assert (
        table[4]["visual_reliance"]
        == visual_reliance.score([r for r in rows if r["id"] in (2, 3)])["visual_reliance"]
    )
    assert [line["n"] for line in visual_reliance.by_area(ROWS)] == [0] * 5


def test_the_accuracy_of_vqa():
    def slow(prediction, answers):
        total = 0.0
        for i in range(len(answers)):
            others = answers[:i] + answers[i + 1 :]
            total += min(1.0, sum(a == prediction for a in others) / 3)
        return total / len(answers)

    for same in range(11):
        answers = ["dog"] * same + ["cat"] * (10 - same)
        assert visual_reliance.vqa_score("The Dog.", answers) == pytest.approx(slow("dog", answers))
    rows = [
        {"id": 1, "condition": c, "prediction": p, "answers": ["2", "two", "2"] * 3}
        for c, p in (("plain", "2."), ("masked", "none"))
    ]
    assert visual_reliance.score(rows)["visual_reliance"] == 1.0
    assert visual_reliance.vqa_score("x", []) == 0.0
