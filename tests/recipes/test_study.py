"""A study's arithmetic: arms of several seeds, their differences, and the critic's accuracy."""

import numpy as np
import pytest

from firsthand.metrics import chair, results
from firsthand.recipes import critic_accuracy, study
from firsthand.recipes.scorers import ChairScorer

PROTOCOL = {"fingerprint": "x"}


def arm(*values: float) -> study.Measured:
    columns = [[value, 1.0] for value in values]
    return {"recall": {"columns": columns, "groups": [f"s{i}" for i in range(len(values))]}}


def test_an_arm_of_one_seed_meets_every_seed_of_the_other():
    seeds, plain = [arm(1, 0.5), arm(0, 0.5)], [arm(0, 0.25)]
    found = study.differences(seeds, plain, "a - plain", "test", PROTOCOL)[0]
    assert found["value"] == pytest.approx(0.5 - 0.125) and found["n"] == 4
    turned = study.differences(plain, seeds, "plain - a", "test", PROTOCOL)[0]
    assert turned["value"] == -found["value"]
    with pytest.raises(ValueError, match="3 and 2 seeds cannot be paired"):
        study.differences([*seeds, arm(1, 1)], seeds, "x", "test", PROTOCOL)


def test_scenes_are_paired_where_arms_leave_out_different_rows():
    rng = np.random.default_rng(0)
    groups = [f"s{i // 3}" for i in range(30)]
    a, b = ({"columns": rng.integers(0, 3, (30, 2)) + [0, 1], "groups": groups} for _ in range(2))
    parts = [{"recall": {"columns": x["columns"].tolist(), "groups": groups}} for x in (a, b)]
    found = study.differences(parts[:1], parts[1:], "a - b", "test", PROTOCOL)[0]
    rows = results.paired_difference(a["columns"], b["columns"], results.ratio, groups=groups)
    assert (found["value"], found["low"], found["high"]) == pytest.approx(rows)
    fewer = {"recall": {"columns": parts[1]["recall"]["columns"][4:], "groups": groups[4:]}}
    found = study.differences(parts[:1], [fewer], "a - b", "test", PROTOCOL)[0]
    ratios = [sum(x) / sum(y) for x, y in (a["columns"].T, b["columns"][4:].T)]
    assert found["value"] == pytest.approx(ratios[0] - ratios[1])
    assert found["low"] < found["value"] < found["high"]


def test_a_part_that_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load_arm", lambda adapter: (adapter, None))
    asked = []

    def measure(model, processor, rows, seed):
        asked.append(model)
        return arm(seed)

    for _ in range(2):
        assert study.part(tmp_path, "a0", "out", "test", [], 3, measure) == arm(3)
    assert asked == ["out"]


def judged(scores=None, comparisons=()) -> dict:
    texts = ["a dog.", "a dog, a cat.", "a cat."]
    return {
        "prompt_key": "k",
        "images": [{"path": "a.png", "bytes": b""}],
        "responses": [{"text": text, "problem": None} for text in texts],
        "scores": scores or [0.0, 0.0, 0.0],
        "comparisons": [
            {"first": i, "second": j, "verdict": verdict} for i, j, verdict in comparisons
        ],
    }


EXACT = ChairScorer({"a": ["dog"]}, chair.lexicon_from_nouns(["dog", "cat"]), recall_weight=1.0)


def test_scores_are_right_where_their_order_is():
    """The truth: 1, 0.5 and -1. Pairs 01 and 02 are told right, 12 is a tie."""
    rows = critic_accuracy.accuracy([judged([2.0, 1.0, 1.0])], EXACT, "mine", {})
    assert {row["metric"]: (row["value"], row["n"]) for row in rows} == {
        "critic_decided": (pytest.approx(2 / 3), 3),
        "critic_accuracy": (1.0, 3),
    }


def test_verdicts_count_for_their_own_pair():
    verdicts = [(1, 0, "1"), (2, 0, "2"), (2, 1, "tie")]
    assert critic_accuracy.preferences(judged(comparisons=verdicts)) == {
        (0, 1): -1,
        (0, 2): 1,
        (1, 2): 0,
    }
    rows = critic_accuracy.accuracy([judged(comparisons=verdicts)], EXACT, "critic", {})
    assert [row["value"] for row in rows] == [pytest.approx(2 / 3), 0.5]
