"""The metrics as Hub repos: cards whose examples run, evaluate modules, Spaces, cheap imports."""

import doctest
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

METRICS = Path(__file__).parents[2] / "metrics"
NAMES = ["amber", "chair", "gavie", "mementos", "mmhal", "pope", "visual_reliance"]
MARKS = {"relevance_reason": "", "relevance": 9, "accuracy_reason": "", "accuracy": 0}


@pytest.fixture
def in_checkout(monkeypatch):
    """The working directory of the cards' examples."""
    pytest.importorskip("evaluate")
    monkeypatch.chdir(METRICS.parent)


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_card_run(name, in_checkout):
    failures, examples = doctest.testfile(
        str(METRICS / name / "README.md"), module_relative=False, verbose=False
    )
    assert examples >= 3
    assert failures == 0


@pytest.mark.parametrize("name", NAMES)
def test_card_is_a_space_and_names_every_figure(name):
    _, front, body = (METRICS / name / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["sdk"] == "gradio"
    assert (METRICS / name / head["app_file"]).is_file()
    assert {"evaluate", "metric"} <= set(head["tags"])
    assert "range" in body
    assert "direction" in body


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_gives_what_the_function_gives(name, in_checkout):
    import evaluate

    inputs = {
        "amber": {
            "predictions": ["A dog, a cat."],
            "references": [1],
            "data": {
                "annotations": [
                    {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}
                ],
                "relation": {"dog": [], "cat": []},
            },
        },
        "chair": {"predictions": ["A dog, a cat."], "references": [["dog"]]},
        "gavie": {
            "predictions": ["A dog."],
            "questions": ["Describe."],
            "regions": [[{"caption": "a red car", "bbox": [1, 2, 30, 40]}]],
            "replies": [json.dumps(MARKS)],
        },
        "mementos": {
            "predictions": ["A dog, a cat."],
            "references": ["A dog."],
            "keywords": {"objects": [["dog"], ["cat"]], "behaviours": []},
        },
        "mmhal": {
            "predictions": ["Red."],
            "references": ["Blue."],
            "questions": ["Which colour?"],
            "judge": lambda requests: ['{"reason": "Not red.", "rating": 1}' for _ in requests],
        },
        "pope": {"predictions": ["Yes.", "Maybe."], "references": ["no", "yes"]},
        "visual_reliance": {
            "predictions": ["Yes."],
            "masked_predictions": ["No."],
            "references": ["Yes."],
        },
    }[name]
    result = evaluate.load(str(METRICS / name)).compute(**inputs)
    expected = {
        "amber": {"amber_chair": 0.5, "amber_cog": 1.0},
        "chair": {"chair_i": 0.5, "n_mentions": 2},
        "gavie": {"gavie_relevance": 9.0, "gavie_accuracy": 0.0},
        "mementos": {"mementos_objects_precision": 0.5, "n_bare_behaviours": 1},
        "mmhal": {"mmhal_score": 1.0, "mmhal_hallucination_rate": 1.0},
        "pope": {"pope_accuracy": 0.0, "n_unparsed": 1},
        "visual_reliance": {"visual_reliance": 1.0, "n": 1},
    }[name]
    assert {key: result[key] for key in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_space_computes_its_own_example(name, in_checkout):
    gradio = pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location(f"{name}_app", METRICS / name / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert len(app.compute(json.dumps(app.EXAMPLE))) > 5
    with pytest.raises(gradio.Error):
        app.compute('{"predictions": [1], "nonsense": 2}')


IMPORTS = """
import sys, time
start = time.perf_counter()
import firsthand.metrics
bare = time.perf_counter() - start
from firsthand.metrics import amber, chair, gavie, mementos, mmhal, pope, visual_reliance
assert amber.score and gavie.score and mementos.score and mmhal.score
from firsthand.metrics import chair as again
assert chair.score and pope.score and visual_reliance.score and again.score
heavy = {"torch", "transformers", "evaluate", "datasets", "pandas"} & set(sys.modules)
print(bare, *sorted(heavy))
"""


def test_front_door_is_cheap_and_brings_no_heavy_library():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=60
    )
    seconds, *heavy = done.stdout.split()
    assert float(seconds) < 0.2
    assert heavy == []
