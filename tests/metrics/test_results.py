"""Result rows: intervals against closed forms, pairing, files and tables."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics import results

PROTOCOL = results.protocol(["a", "b"], prompt="Describe.", max_new_tokens=8, seed=0)


def row(**changes):
    base = results.result_row(
        "chair_i", (0.25, 0.1, 0.4), 40, arm="plain", split="test", protocol=PROTOCOL
    )
    return base | changes


def test_mean_interval_is_that_of_the_binomial():
    values = np.repeat([1.0, 0.0], [60, 140])
    value, low, high = results.bootstrap(values, n=4000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert value == pytest.approx(0.3)
    assert low == pytest.approx(0.3 - half, abs=0.01)
    assert high == pytest.approx(0.3 + half, abs=0.01)


def test_ratio_is_of_sums_and_resamples_rows_together():
    columns = [(1, 2), (0, 8), (3, 0)]
    assert results.bootstrap(columns, results.ratio)[0] == pytest.approx(4 / 10)
    assert results.bootstrap([(2, 4)] * 30, results.ratio) == (0.5, 0.5, 0.5)


def test_ratio_is_exact_to_the_last_digit():
    counts = [(1, 3), (0, 1), (1, 1)]  # the ratio of their means is 0.39999999999999997
    assert results.bootstrap(counts, results.ratio)[0] == 0.4
    assert results.bootstrap([(2, 5)] * 3, results.ratio) == (0.4, 0.4, 0.4)
    assert results.paired_difference(counts, [(0, 1)] * 3, results.ratio)[0] == 0.4


def test_five_thousand_rows_are_quick():
    """Processor time, which a busy machine does not stretch."""
    columns = np.random.default_rng(3).integers(0, 4, (5000, 2))
    started = time.process_time()
    results.bootstrap(columns, results.ratio)
    assert time.process_time() - started < 1.5


def test_metrics_import_little():
    code = (
        "import sys, firsthand.metrics\n"
        "assert not {'numpy', 'torch', 'evaluate'} & set(sys.modules)\n"
        "from firsthand.metrics import chair, pope, results, visual_reliance\n"
        "assert chair.score and pope.score and results.table and visual_reliance.score\n"
        "heavy = {'torch', 'transformers', 'evaluate', 'datasets', 'pandas', 'nltk', 'textblob'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_groups_are_resampled_whole():
    values = [1.0] * 50 + [0.0] * 50
    alone = results.bootstrap(values, n=2000)
    in_tens = results.bootstrap(values, n=2000, groups=[i // 10 for i in range(100)])
    assert in_tens[0] == alone[0] == 0.5
    assert (in_tens[2] - in_tens[1]) / (alone[2] - alone[1]) == pytest.approx(10**0.5, rel=0.15)
    assert results.bootstrap([1.0, 1.0, 0.0], groups=["x", "x", "y"])[0] == pytest.approx(2 / 3)


def test_paired_difference_of_equal_arms_is_exactly_zero():
    values = np.random.default_rng(0).random(50)
    assert results.paired_difference(values, values) == (0.0, 0.0, 0.0)


def test_pairing_cancels_what_the_arms_share():
    hard = np.random.default_rng(1).random(200)
    value, low, high = results.paired_difference(hard + 0.05, hard)
    assert value == pytest.approx(0.05)
    assert high - low < 1e-9
    ratios = results.paired_difference([(1, 2), (1, 2)], [(1, 4), (1, 4)], results.ratio)
    assert ratios == (0.25, 0.25, 0.25)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(0, 5))
def test_interval_stays_within_the_values_and_repeats(values, seed):
    value, low, high = results.bootstrap(values, n=50, seed=seed)
    slack = 1e-9
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert value == pytest.approx(np.mean(values), abs=1e-12)
    assert (value, low, high) == results.bootstrap(values, n=50, seed=seed)


def test_blocks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(2).random(40)
    whole = results.bootstrap(values)
    monkeypatch.setattr(results, "_DRAWS_AT_ONCE", 400)
    assert results.bootstrap(values) == whole


@pytest.mark.parametrize("values", [[], np.zeros((0, 2))])
def test_without_rows_there_is_no_value(values):
    assert all(math.isnan(v) for v in results.bootstrap(values, results.mean))


def test_zero_denominator_is_undefined_and_resamples_without_one_are_left_out():
    assert all(math.isnan(v) for v in results.bootstrap([(0, 0), (0, 0)], results.ratio))
    assert results.bootstrap([(1, 1), (0, 0)], results.ratio) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: results.bootstrap([1.0, math.nan]), "NaN or infinite"),
        (lambda: results.bootstrap(np.zeros((2, 2, 2))), r"got \(2, 2, 2\)"),
        (lambda: results.bootstrap([1.0, 2.0], groups=["x"]), "1 groups for 2 rows"),
        (lambda: results.paired_difference([1.0], [1.0, 2.0]), "same rows"),
        (
            lambda: results.table([row() | {"value": 1}]) and results.write_results("x", [{}]),
            "field",
        ),
    ],
)
def test_what_cannot_be_resampled_or_written_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_protocol_is_the_fingerprint_of_the_measurement():
    again = results.protocol(["b", "a"], prompt="Describe.", max_new_tokens=8, seed=0, libraries=())
    assert again["fingerprint"] == PROTOCOL["fingerprint"]
    assert again["ids_hash"] == PROTOCOL["ids_hash"]
    assert again["versions"] == {}
    assert PROTOCOL["versions"]["numpy"] == np.__version__
    assert PROTOCOL["n_ids"] == 2
    for change in ({"prompt": "Tell."}, {"max_new_tokens": 9}, {"lexicon_hash": "x"}, {"seed": 1}):
        arguments = {"prompt": "Describe.", "max_new_tokens": 8, "seed": 0} | change
        other = results.protocol(["a", "b"], **arguments)
        assert other["fingerprint"] != PROTOCOL["fingerprint"]
    truths = [results.protocol(["a"], truth_hash=truth) for truth in (None, "x", "y")]
    assert len({truth["fingerprint"] for truth in truths}) == 3
    assert results.protocol(["ab"])["ids_hash"] != PROTOCOL["ids_hash"]


def test_result_rows_of_pairs():
    columns = {"chair_i": np.array([(1, 4), (1, 4)]), "recall": np.array([(1, 1), (1, 1)])}
    rows = results.result_rows(columns, arm="plain", split="test", protocol=PROTOCOL)
    assert [(r["metric"], r["value"], r["low"], r["high"], r["n"]) for r in rows] == [
        ("chair_i", 0.25, 0.25, 0.25, 2),
        ("recall", 1.0, 1.0, 1.0, 2),
    ]
    assert list(rows[0]) == list(results.FIELDS)


def test_file_round_trip_with_nan(tmp_path):
    path = tmp_path / "deep" / "results.json"
    nothing = row(value=math.nan, low=math.nan, high=math.nan, n=0)
    results.write_results(path, [row(), nothing])
    assert json.loads(path.read_text())[1]["value"] is None
    first, second = results.read_results(path)
    assert first == row()
    assert math.isnan(second["value"])
    assert second["n"] == 0
    results.write_results(path, results.read_results(path))
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_results(path, [row()])

    def no_space(source, target):
        raise OSError("no space")

    monkeypatch.setattr(results.os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        results.write_results(path, [row(value=0.9)])
    assert results.read_results(path) == [row()]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"value": 1}]'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="result row"):
        results.read_results(path)


def test_table_puts_arms_side_by_side():
    undefined = row(metric="recall", value=math.nan, low=math.nan, high=math.nan, n=0)
    assert results.table([row(), row(arm="steered", value=0.125), undefined]).split("\n") == [
        "| metric | split | plain | steered |",
        "| --- | --- | --- | --- |",
        "| chair_i | test | 0.250 [0.100, 0.400] (n=40) | 0.125 [0.100, 0.400] (n=40) |",
        "| recall | test | undefined (n=0) |  |",
    ]
