"""MMHal: requests that hold what the judge needs, replies read strictly, means by hand."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.mmhal import scoring as mmhal
from firsthand.metrics.results import bootstrap, ratio, result_rows

ROWS = [
    {
        "id": i,
        "question": f"Which colour is thing {i}?",
        "answer": "It is red.",
        "content": ["car", "street"],
        "prediction": said,
        "question_type": kind,
    }
    for i, (said, kind) in enumerate([("Red.", "0"), ("A {blue} one.", "1"), ("Green.", "1")])
]


def replies(*ratings):
    return [json.dumps({"reason": "so", "rating": rating}) for rating in ratings]


def rated(*ratings):
    return mmhal.rate(ROWS[: len(ratings)], lambda requests: replies(*ratings))


def test_requests_hold_all_that_the_judge_needs():
    requests = mmhal.build_requests(ROWS)
    assert [[m["role"] for m in request] for request in requests] == [["system", "user"]] * 3
    asked = requests[1][1]["content"]
    for part in ("car, street", "thing 1?", "It is red.", "A {blue} one.", '{"reason"'):
        assert part in asked
    bare = mmhal.build_requests([{k: v for k, v in ROWS[0].items() if k != "content"}])
    assert "(not given)" in bare[0][1]["content"]
    assert len(mmhal.PROMPT_HASH) == 12


def test_means_by_hand_and_by_type():
    result = mmhal.score(rated(6, 2, 4))
    assert result == {
        "mmhal_score": 4.0,
        "mmhal_hallucination_rate": pytest.approx(1 / 3),
        "mmhal_score_0": 6.0,
        "mmhal_hallucination_rate_0": 0.0,
        "mmhal_score_1": 3.0,
        "mmhal_hallucination_rate_1": 0.5,
        "n": 3,
        "n_unparsed": 0,
        "n_errors": 0,
        "n_skipped": 0,
        "prompt_hash": mmhal.PROMPT_HASH,
    }
    assert mmhal.score(rated(3))["mmhal_hallucination_rate"] == 0.0  # below 3, not 3


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "5",
        "rating: 5",
        '{"rating": 5}',
        '{"rating": 7, "reason": "x"}',
        '{"rating": -1, "reason": "x"}',
        '{"rating": 4.5, "reason": "x"}',
        '{"rating": "5", "reason": "x"}',
        '{"rating": true, "reason": "x"}',
        '{"rating": null, "reason": "x"}',
        '{"rating": 5, "reason": 3}',
        '{"rating": 5, "reason": "x", "more": 1}',
        '[{"rating": 5, "reason": "x"}]',
        '{"rating": 5, "reason": "x"} and so on',
        '```json\n{"rating": 5, "reason": "x"}\n```',
    ],
)
def test_other_replies_are_refused_and_never_zero(reply):
    with pytest.raises(ValueError):
        mmhal.parse(reply)
    rows = mmhal.rate(ROWS[:2], lambda requests: [*replies(6), reply])
    result = mmhal.score(rows)
    assert (result["mmhal_score"], result["n"], result["n_unparsed"]) == (6.0, 1, 1)
    assert rows[1]["reply"] == reply


@given(st.integers(0, 6), st.text())
def test_replies_as_asked_for_are_read(rating, reason):
    reply = {"rating": rating, "reason": reason}
    assert mmhal.parse(f" {json.dumps(reply)}\n") == reply


def test_failed_requests_are_counted_and_asked_again_later():
    rows = mmhal.rate(ROWS, lambda requests: [*replies(1), None, *replies(5)])
    result = mmhal.score(rows)
    assert (result["mmhal_score"], result["n"], result["n_unparsed"]) == (3.0, 2, 1)
    asked = []

    def judge(requests):
        asked.extend(requests)
        return replies(0)

    again = mmhal.score(mmhal.rate(rows, judge))
    assert asked == mmhal.build_requests(ROWS[1:2])
    assert (again["mmhal_score"], again["n"], again["n_unparsed"]) == (2.0, 3, 0)


def test_nothing_is_asked_about_failed_rows_and_nothing_rated_is_undefined():
    failed = [{"id": 0, "error": "truncated file"}]
    rows = mmhal.rate(failed, lambda requests: pytest.fail("asked"))
    result = mmhal.score(rows)
    assert math.isnan(result["mmhal_score"])
    assert math.isnan(result["mmhal_hallucination_rate"])
    assert (result["n"], result["n_errors"]) == (0, 1)


def test_rows_that_cannot_be_asked_about_are_refused_before_asking_or_kept():
    bad = {"id": "x", "question": "Why?", "prediction": "So."}
    with pytest.raises(TypeError, match="Row 'x': `answer` is of type NoneType"):
        mmhal.rate([*ROWS, bad], lambda requests: pytest.fail("asked"))
    rows = mmhal.rate([*ROWS, bad], lambda requests: replies(6, 6, 6), skip_bad=True)
    assert "`answer`" in rows[3]["error"]
    assert mmhal.score(rows)["n_errors"] == 1
    with pytest.raises(ValueError, match="1 replies to 3 requests"):
        mmhal.rate(ROWS, lambda requests: replies(1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 0, "rating": 3}, "id 0 occurs twice"),
        ({"rating": 3}, "needs an id"),
        ({"id": 9}, "Row 9 has no rating. Ask a judge"),
        ({"id": 9, "rating": True}, "Row 9 has no rating"),
        ({"id": 9, "rating": 8}, "the rating 8 is outside 0..6"),
        ({"id": 9, "rating": math.nan}, "outside 0..6"),
    ],
)
def test_bad_rows_are_refused_by_name_or_skipped(row, message):
    good = rated(6, 2, 4)
    with pytest.raises(ValueError, match=message):
        mmhal.score([*good, row])
    result = mmhal.score([*good, row], skip_bad=True)
    assert [skipped["id"] for skipped in result.pop("skipped")] == [row.get("id")]
    assert result == mmhal.score(good) | {"n_skipped": 1}


def test_pairs_add_up_to_the_score_and_name_their_rows():
    rows = rated(6, 2, 4)
    result, columns, ids = mmhal.score(rows), mmhal.pairs(rows), mmhal.pair_ids(rows)
    assert set(columns) == set(ids) == {name for name in result if name.startswith("mmhal")}
    assert ids["mmhal_score_1"] == [1, 2]
    for name, column in columns.items():
        assert len(column) == len(ids[name])
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(result[name])
    made = result_rows(columns, arm="plain", split="test", protocol={})
    assert made[0]["value"] == 4.0


def test_the_benchmark_s_records_become_rows():
    record = {"question": "Why?", "gt_answer": "So.", "image_content": ["car"], "model_answer": "?"}
    rows = mmhal.from_records([record] * 9 + [record | {"question_type": "counting"}])
    assert [row["question_type"] for row in rows] == [*"012345670", "counting"]
    assert rows[8] == {
        "id": 8,
        "image_id": 8,
        "question": "Why?",
        "answer": "So.",
        "content": ["car"],
        "question_type": "0",
        "prediction": "?",
    }
    assert mmhal.build_requests(rows[:1])
    asked = mmhal.from_records([{"question": "Why?", "gt_answer": "So."}])
    assert "prediction" not in asked[0]
    with pytest.raises(ValueError, match="Record 1 has no question or gt_answer"):
        mmhal.from_records([record, {"question": "Why?"}])
