"""GAVIE: requests that hold what the judge needs, replies read strictly, means by hand."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics import gavie
from firsthand.metrics.gavie import gqa
from firsthand.metrics.results import bootstrap, ratio, result_rows

REGIONS = [
    {"caption": "a red\ncar", "bbox": [20, 55.5, 120, 60]},
    {"caption": "a {tree}", "bbox": [0, 0, 30, 90]},
]
ROWS = [
    {"id": i, "image_id": "1", "question": "Describe it.", "prediction": said, "regions": REGIONS}
    for i, said in enumerate(["A red car.", "A {blue} dog.", "Green."])
]


def marks(relevance, accuracy, **more):
    reasons = {"relevance_reason": "r", "accuracy_reason": "a"}
    return {"relevance": relevance, "accuracy": accuracy, **reasons, **more}


def reply(relevance, accuracy):
    return json.dumps(marks(relevance, accuracy))


def judge_of(*pairs):
    return lambda requests: [reply(*pair) for pair in pairs]


def rated(*pairs):
    return gavie.rate(ROWS[: len(pairs)], [judge_of(*pairs)])


def test_requests_hold_all_that_the_judge_needs():
    request = gavie.build_request(ROWS[1:2])
    assert [message["role"] for message in request] == ["system", "user"]
    asked = request[1]["content"]
    for part in (
        "- a red car: x 20, y 55.5, width 120, height 60\n- a {tree}: x 0, y 0, width 30, ",
        "Instruction: Describe it.\nAnswer: A {blue} dog.",
        '{"relevance_reason": "...", "relevance": N, "accuracy_reason": "...", "accuracy": N}',
    ):
        assert part in asked
    joint = gavie.build_request(ROWS)[1]["content"]
    assert "Answer 1: A red car.\nAnswer 2: A {blue} dog.\nAnswer 3: Green." in joint
    assert '{"answers": [{"answer": 1, ' in joint
    assert len(gavie.PROMPT_HASH) == 12


def test_the_legacy_format_repeats_the_published_defect_and_no_more():
    fixed, legacy = (
        gavie.build_request(ROWS[:1], name)[1]["content"] for name in gavie.BBOX_FORMATS
    )
    assert legacy == fixed.replace("height 60", "height 120").replace("height 90", "height 30")
    with pytest.raises(ValueError, match="bbox_format is 'wrong': choose fixed or legacy"):
        gavie.build_request(ROWS[:1], "wrong")


def test_means_by_hand():
    assert gavie.score(rated((8, 2), (10, 7), (3, 0))) == {
        "gavie_relevance": 7.0,
        "gavie_accuracy": 3.0,
        "n": 3,
        "n_unparsed": 0,
        "n_errors": 0,
        "n_skipped": 0,
        "n_unread": 0,
        "prompt_hash": gavie.PROMPT_HASH,
    }


def test_samples_give_means_and_spread():
    judges = [judge_of((8, 2), (5, 5)), judge_of((8, 6), (5, 5)), lambda _: [None, "?"]]
    rows = gavie.rate(ROWS[:2], judges)
    found = gavie.score(rows)
    assert (found["gavie_relevance"], found["gavie_accuracy"]) == (6.5, 4.5)
    assert found["gavie_relevance_spread"] == 0
    assert found["gavie_accuracy_spread"] == pytest.approx(math.sqrt(8) / 2)
    assert (found["n"], found["n_unparsed"], found["n_unread"]) == (2, 0, 2)
    assert rows[0]["unread"] == [{"reason": "the request failed", "reply": None}]
    assert rows[1]["unread"][0]["reply"] == "?"
    one = rated((1, 1)) + gavie.rate(ROWS[1:2], [judge_of((1, 1))] * 2)
    assert gavie.pair_ids(one)["gavie_accuracy_spread"] == [1]  # one sample has no spread


GOOD = reply(5, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "relevance: 5, accuracy: 5",
        json.dumps({"relevance": 5, "accuracy": 5}),
        reply(11, 5),
        reply(5, -1),
        reply("5", 5),
        reply(True, 5),
        reply(None, 5),
        reply(math.nan, 5),
        reply(10**400, 5),
        json.dumps(marks(5, 5, relevance_reason=3)),
        json.dumps(marks(5, 5, more=1)),
        f"[{GOOD}]",
        f"{GOOD} and so on",
        f"```json\n{GOOD}\n```",
        json.dumps({"answers": [marks(5, 5, answer=1)]}),
        "Relevancy:\nscore of answer1: 5",
        "Relevancy:\nscore of answer1: 5\nAccuracy:\nscore of answer1: 11",
        "Relevancy:\nscore of answer1: 5\nAccuracy:\nscore of answer1: 5/100",
        "Relevancy:\nscore of answer1: 5\nAccuracy:\nscore of answer1: 5-6",
        "Relevancy:\nscore of answer1: 5\nAccuracy:\nscore of answer1: 1.2.3",
        "Relevancy:\nscore of answer1: 5\nAccuracy:\nscore of answer1: good",
        "Relevancy:\nscore of answer1: 5\nAccuracy:\nscore of answer2: 5",
        "Relevancy:\nscore of answer1: 5\nscore of answer1: 6\nAccuracy:\nscore of answer1: 5",
        "Accuracy:\nscore of answer1: 5\nAccuracy:\nscore of answer1: 5",
    ],
)
def test_other_replies_are_refused_and_never_zero(text):
    with pytest.raises(ValueError):
        gavie.parse(text)
    rows = gavie.rate(ROWS[:2], [lambda requests: [reply(6, 6), text]])
    found = gavie.score(rows)
    assert (found["gavie_accuracy"], found["n"], found["n_unparsed"]) == (6.0, 1, 1)
    assert rows[1]["unread"][0]["reply"] == text and "ratings" not in rows[1]


@given(st.floats(0, 10), st.integers(0, 10), st.text())
def test_replies_as_asked_for_are_read(relevance, accuracy, reason):
    said = marks(relevance, accuracy, accuracy_reason=reason)
    assert gavie.parse(f" {json.dumps(said)}\n") == [said]
    both = {"answers": [{**said, "answer": 1}, marks(0, 10, answer=2)]}
    assert gavie.parse(json.dumps(both), 2) == [said, marks(0, 10)]


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=5))
def test_the_published_form_is_read(pairs):
    lines = ["**Relevancy:**"]
    for k, (relevance, _) in enumerate(pairs, 1):
        lines += [f"score of the answer{k}: {relevance}/10", "reason:", f"so {k}"]
    lines += ["", "accuracy:"]
    for k, (_, accuracy) in enumerate(pairs, 1):
        lines += [f"Score of answer{k}: {accuracy}.", f"Reason: accuracy {accuracy}"]
    found = gavie.parse("\n".join(lines), len(pairs))
    assert [(one["relevance"], one["accuracy"]) for one in found] == pairs
    assert found[0]["relevance_reason"] == "so 1"
    assert found[-1]["accuracy_reason"] == f"accuracy {pairs[-1][1]}"


@pytest.mark.parametrize(
    "entries",
    [
        [marks(1, 1, answer=1)],
        [marks(1, 1, answer=2), marks(1, 1, answer=1)],
        [marks(1, 1, answer=1), marks(1, 1, answer=1)],
        [marks(1, 1), marks(1, 1)],
    ],
)
def test_joint_replies_number_every_answer(entries):
    with pytest.raises(ValueError):
        gavie.parse(json.dumps({"answers": entries}), 2)


def joint_judge(asked):
    """Marks an answer by its own text, and keeps the prompts."""

    def judge(requests):
        replies = []
        for request in requests:
            text = request[1]["content"]
            asked.append(text)
            said = [line for line in text.split("\n") if line.startswith("Answer ")]
            listed = [
                marks(len(line.split(": ")[1]), 1, answer=k) for k, line in enumerate(said, 1)
            ]
            replies.append(json.dumps({"answers": listed}))
        return replies

    return judge


def arms(count=30):
    texts = {"a": "1", "b": "22", "c": "333"}
    return {
        arm: [{**ROWS[0], "id": i, "prediction": text} for i in range(count)]
        for arm, text in texts.items()
    }


def test_joint_marks_come_back_to_their_models():
    asked, again = [], []
    found = gavie.rate_jointly(arms(), [joint_judge(asked)] * 2)
    for arm, expected in {"a": 1, "b": 2, "c": 3}.items():
        assert gavie.score(found[arm])["gavie_relevance"] == expected
    orders = {
        tuple(line[-1] for line in text.split("\n") if line[:7] == "Answer ") for text in asked
    }
    assert len(orders) == 6 and len(asked) == 60  # all orders occur
    assert asked[:30] != asked[30:]  # drawn anew for each sample
    gavie.rate_jointly(arms(), [joint_judge(again)] * 2)
    assert again == asked
    gavie.rate_jointly(arms(), [joint_judge(other := [])] * 2, seed=1)
    assert other != asked


def test_an_answer_that_failed_is_left_out_of_all_arms():
    rows = arms(2)
    rows["b"][1] = {"id": 1, "error": "truncated"}
    found = gavie.rate_jointly(rows, [joint_judge(asked := [])])
    assert len(asked) == 1
    assert found["a"][1]["error"] == "no usable answer of b"
    assert gavie.score(found["a"])["n_errors"] == gavie.score(found["b"])["n_errors"] == 1
    with pytest.raises(ValueError, match="The id 1 is missing in c"):
        gavie.rate_jointly(arms(2) | {"c": arms(1)["c"]}, [joint_judge([])])
    found = gavie.rate_jointly(arms(2) | {"c": arms(1)["c"]}, [joint_judge([])], skip_bad=True)
    assert found["a"][1]["error"] == "no usable answer of c" and "ratings" in found["a"][0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": ROWS}, "cannot be judged jointly: use `rate`"),
        ({"a": ROWS, "b": ROWS[:1] * 2}, "b: the id 0 occurs twice"),
        ({"a": ROWS[:1], "b": [{**ROWS[0], "question": "Why?"}]}, "0 stands for two questions"),
        ({"a": ROWS, "b": [{**ROWS[0], "ratings": [marks(1, 1)]}]}, "was judged already"),
    ],
)
def test_arms_that_cannot_be_judged_jointly(given, message):
    with pytest.raises(ValueError, match=message):
        gavie.rate_jointly(given, [lambda requests: pytest.fail("asked")])


def test_failed_requests_are_counted_and_asked_again_later():
    rows = gavie.rate(ROWS, [lambda requests: [reply(1, 1), None, reply(5, 5)]])
    found = gavie.score(rows)
    assert (found["gavie_accuracy"], found["n"], found["n_unparsed"]) == (3.0, 2, 1)
    asked = []

    def judge(requests):
        asked.extend(requests)
        return [reply(0, 0)]

    again = gavie.score(gavie.rate(rows, [judge]))
    assert asked == [gavie.build_request(ROWS[1:2])]
    assert (again["gavie_accuracy"], again["n"], again["n_unparsed"]) == (2.0, 3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": None}, "Row 'x': `prediction` is of type NoneType"),
        ({"question": 3}, "`question` is of type int"),
        ({"regions": []}, "`regions` must be a list"),
        ({"regions": [{"caption": "a", "bbox": [1, 2, 3]}]}, "`regions` must be"),
        ({"regions": [{"caption": "a", "bbox": [1, 2, 3, math.inf]}]}, "`regions` must be"),
        ({"regions": [{"bbox": [1, 2, 3, 4]}]}, "`regions` must be"),
    ],
)
def test_rows_that_cannot_be_asked_about_are_refused_before_asking_or_kept(change, message):
    bad = {**ROWS[0], "id": "x", **change}
    with pytest.raises(TypeError, match=message):
        gavie.rate([*ROWS, bad], [lambda requests: pytest.fail("asked")])
    rows = gavie.rate([*ROWS, bad], [judge_of((1, 1), (2, 2), (3, 3))], skip_bad=True)
    assert rows[3]["error"]
    assert gavie.score(rows)["n"] == 3 and gavie.score(rows)["n_errors"] == 1


def test_judges_must_answer_everything():
    with pytest.raises(ValueError, match="1 replies to 3 requests"):
        gavie.rate(ROWS, [judge_of((1, 1))])
    with pytest.raises(ValueError, match="at least one judge"):
        gavie.rate(ROWS, [])
    rows = gavie.rate([{"id": 0, "error": "broken"}], [lambda _: pytest.fail("asked")])
    assert math.isnan(gavie.score(rows)["gavie_accuracy"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 0, "ratings": [marks(1, 1)]}, "id 0 occurs twice"),
        ({"ratings": [marks(1, 1)]}, "needs an id"),
        ({"id": 9}, "Row 9 has no ratings. Ask a judge"),
        ({"id": 9, "ratings": []}, "Row 9 has no ratings"),
        ({"id": 9, "ratings": [3]}, "relevance is None"),
        ({"id": 9, "ratings": [marks(1, 12)]}, "accuracy is 12, not a number from 0 to 10"),
    ],
)
def test_bad_rows_are_refused_by_name_or_skipped(row, message):
    good = rated((6, 2), (4, 4))
    with pytest.raises(ValueError, match=message):
        gavie.score([*good, row])
    found = gavie.score([*good, row], skip_bad=True)
    assert [skipped["id"] for skipped in found.pop("skipped")] == [row.get("id")]
    assert found == gavie.score(good) | {"n_skipped": 1}


def test_pairs_add_up_to_the_score_and_name_their_rows():
    rows = gavie.rate(ROWS, [judge_of((6, 2), (4, 4), (0, 9)), judge_of((6, 3), (4, 6), (1, 9))])
    found, columns, ids = gavie.score(rows), gavie.pairs(rows), gavie.pair_ids(rows)
    assert set(columns) == set(ids) == {name for name in found if name.startswith("gavie")}
    assert len(columns) == 4
    for name, column in columns.items():
        assert len(column) == len(ids[name]) == 3
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(found[name])
    assert result_rows(columns, arm="plain", split="test", protocol={})[0]["value"] == 3.5


def test_lrv_records_become_rows():
    records = [
        {"image_id": "2344", "question": "\nIs there a cat?"},
        {"image_id": 7, "instruction": "Describe.", "answer_gt": "No cat."},
        {"image": "images/2344.jpg", "instruction": "Why?", "answer": "So.", "gt": "x"},
    ]
    rows = gavie.from_records(records)
    assert [row["image_id"] for row in rows] == ["2344", "7", "2344"]
    assert [row["question"] for row in rows] == ["Is there a cat?", "Describe.", "Why?"]
    assert [row.get("prediction") for row in rows] == [None, None, "So."]
    with pytest.raises(ValueError, match="Record 1 has no question or image"):
        gavie.from_records([records[0], {"question": "Why?"}])


GQA = [
    {"id": i, "question": "Which animal?", "answer": "cat", "prediction": said}
    for i, said in enumerate(["A kitten.", "A dog.", "Cat {or} dog."])
]


def verdict(correct):
    return json.dumps({"reason": "r", "correct": correct})


def test_judged_gqa_accuracy():
    request = gqa.build_requests(GQA)[2][1]["content"]
    for part in ("Which animal?", "Right answer: cat", "Answer to check: Cat {or} dog."):
        assert part in request
    rows = gqa.rate(GQA, lambda requests: [verdict(True), verdict(False), None])
    assert gqa.score(rows) == {
        "gqa_judged_accuracy": 0.5,
        "n": 2,
        "n_unparsed": 1,
        "n_errors": 0,
        "n_skipped": 0,
        "prompt_hash": gqa.PROMPT_HASH,
    }
    assert gqa.pair_ids(rows) == {"gqa_judged_accuracy": [0, 1]}
    assert gqa.pairs(rows)["gqa_judged_accuracy"].tolist() == [[1, 1], [0, 1]]
    again = gqa.rate(rows, lambda requests: [verdict(True)] * len(requests))
    assert gqa.score(again)["gqa_judged_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "text", ["", "true", '{"correct": true}', '{"correct": 1, "reason": ""}', "[]", verdict("yes")]
)
def test_other_verdicts_are_refused_and_never_wrong_answers(text):
    with pytest.raises(ValueError):
        gqa.parse(text)
    rows = gqa.rate(GQA[:2], lambda requests: [verdict(True), text])
    assert gqa.score(rows)["gqa_judged_accuracy"] == 1
    assert gqa.score(rows)["n_unparsed"] == 1 and rows[1]["reply"] == text


def test_gqa_rows_that_cannot_be_judged():
    bad = {"id": "x", "question": "Which?", "prediction": "A cat."}
    with pytest.raises(TypeError, match="Row 'x': `answer`"):
        gqa.rate([*GQA, bad], lambda requests: pytest.fail("asked"))
    rows = gqa.rate([*GQA, bad], lambda requests: [verdict(True)] * 3, skip_bad=True)
    assert gqa.score(rows)["n_errors"] == 1
    with pytest.raises(ValueError, match="was not judged"):
        gqa.score(GQA)
    with pytest.raises(ValueError, match="1 replies to 3"):
        gqa.rate(GQA, lambda requests: [verdict(True)])
    assert gqa.score(GQA, skip_bad=True)["n_skipped"] == 3
