"""The study of steering, whole but on a tiny model and two scenes: every arm, and going on."""

import csv
import json

import pytest
import torch
from tiny_models import tiny_internvl, tiny_processor

from firsthand.metrics import results
from firsthand.recipes import evaluate_steering as study
from firsthand.recipes.evaluate_steering import ARMS, Study, choose

CALL = ["--split", "test", "--count", "2", "--choose_on", "2", "--fit_on", "2"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tiny model in place of the demo's, short answers, two strengths an arm."""
    model, processor = tiny_internvl(layers=4), tiny_processor("internvl")
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    monkeypatch.setattr(study.demo_model, "load_demo_model", lambda: (model, processor))
    monkeypatch.setattr(study, "MAX_NEW_TOKENS", 3)
    monkeypatch.chdir(tmp_path)
    for arm, strengths in ARMS.items():
        monkeypatch.setitem(ARMS, arm, (strengths[0], strengths[-1]))
    return model, processor


def _rows(count=2):
    return study.demo_data.load_scenes("test", count)


def test_every_arm_is_measured_and_a_second_call_measures_nothing(tiny, tmp_path, monkeypatch):
    model, _ = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    study.main([*CALL, "--out", str(tmp_path / "steering.csv")])
    with (tmp_path / "steering.csv").open() as file:
        rows = list(csv.DictReader(file))
    for arm in ("plain", *ARMS):
        found = {r["metric"] for r in rows if r["arm"] == arm and r["split"] == "test"}
        assert {"chair_s", "chair_i", "recall", "mean_length", "pope_accuracy"} <= found, arm
        assert "kl_to_plain" in found
    tried = {r["arm"] for r in rows if r["split"] == "validation"}
    assert {f"vcd, strength {s:g}" for s in ARMS["vcd"]} <= tried
    assert {f"{arm} - plain" for arm in ARMS} <= {r["arm"] for r in rows}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert 0 < json.loads((tmp_path / "steering-work" / "gate.json").read_text()) < 1
    first = (tmp_path / "steering.csv").read_text()
    monkeypatch.setattr(Study, "_answers", lambda *a, **k: pytest.fail("was measured before"))
    study.main([*CALL, "--out", str(tmp_path / "steering.csv")])
    assert (tmp_path / "steering.csv").read_text() == first
    assert len(results.read_results(tmp_path / "steering.json")) == len(rows)
    with pytest.raises(ValueError, match="use another --work"):
        study.main([*CALL, "--seed", "1", "--out", str(tmp_path / "steering.csv")])


def test_the_picture_has_a_bar_for_each_split_where_objects_are_named():
    def row(arm, split, value, metric="chair_i"):
        return {"arm": arm, "split": split, "metric": metric, "value": value, "low": 0, "high": 1}

    found = [row("plain", "test", 0.25), row("plain", "test_prior", 0.5)]
    found += [row("vcd", "test", float("nan")), row("vcd", "test_prior", 0.75)]
    found += [row("vcd - plain", "test", -0.1), row("pai", "validation", 0.125)]
    drawn = study.picture([*found, row("plain", "test", 0.9, "recall")])
    values = [text for text in ("0.25", "0.50", "0.75", "0.90", "0.12") if f">{text}<" in drawn]
    assert values == ["0.25", "0.50", "0.75"] and ">vcd</text>" in drawn
    assert study.picture(found[2:3]) is None


def test_the_divergence_is_that_of_the_next_tokens(tiny, tmp_path):
    model, processor = tiny
    one = Study(model, processor, tmp_path, study.demo_data.load_scenes("validation", 2))
    row = study.demo_rows.caption_rows(_rows(1))[0]
    for arm in ("mean", "vista", "nullu", "icd"):
        nothing = {"nullu": 0}.get(arm, 0.0)
        total, count = one.divergence(arm, ARMS[arm][-1], row, "a dog, a cup")
        assert count == len(processor.tokenizer("a dog, a cup").input_ids)
        assert total > 0
        if arm in ("mean", "vista"):
            assert one.divergence(arm, nothing, row, "a dog, a cup")[0] == pytest.approx(
                0, abs=1e-4
            )
    settings = study.contrast_settings("icd", 0.0, 0.0)
    one._settings = lambda arm, strength: settings
    assert one.divergence("icd", 0.0, row, "a dog")[0] == pytest.approx(0, abs=1e-4)


def _measured(chair_i, recall):
    return {
        name: {"columns": [[value, 1.0]], "groups": ["a"]}
        for name, value in (("chair_i", chair_i), ("recall", recall))
    }


def test_silence_is_not_chosen():
    plain = _measured(0.3, 0.8)
    tried = {-0.5: _measured(0.1, 0.5), 0.5: _measured(0.2, 0.78), 1.0: _measured(0.25, 0.9)}
    assert choose(tried, plain) == 0.5
    assert choose({-1.0: _measured(0.1, 0.2), 0.5: _measured(0.0, 0.1)}, plain) == 0.5
