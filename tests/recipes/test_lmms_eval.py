"""The real lmms-eval on local tasks and on its own POPE and MME, with the demo model.

Most of it needs lmms-eval, which is installed in an environment of its own: `make lmms-eval` makes
it and runs this file there.
"""

import functools
import importlib.util
import math
import shutil
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
import torch

from firsthand.metrics import pope, results
from firsthand.modeling import SteeringVector
from firsthand.recipes import cli, measure_lmms_eval
from firsthand.recipes.demo_data import SCENES, load_scenes
from firsthand.recipes.inputs import load_model, read_rows

TASKS = Path(__file__).parent / "lmms_tasks"
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed in this environment: make lmms-eval",
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of local tasks, with the path of the scenes filled in."""
    folder = shutil.copytree(TASKS, tmp_path_factory.mktemp("lmms") / "tasks")
    task = folder / "scenes_existence.yaml"
    task.write_text(task.read_text("utf-8").replace("SCENES", str(SCENES)), "utf-8")
    return folder


@pytest.fixture(scope="module")
def once():
    """lmms-eval's index of its 1,985 tasks, and the demo model, are made once for all runs."""
    from lmms_eval import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        patch.setattr(measure_lmms_eval, "load_model", functools.cache(load_model))
        yield


@pytest.fixture(scope="module")
def measure(tasks, once, tmp_path_factory):
    """Runs the command; gives its exit status, result rows and details."""

    def call(names: str, *options: str):
        folder = tmp_path_factory.mktemp("run")
        out, details = folder / "results.json", folder / "details.jsonl"
        line = ["measure", "lmms-eval", "--tasks", names, "--include-path", str(tasks)]
        status = cli.main([*line, "--out", str(out), "--details", str(details), *options])
        found = results.read_results(out) if out.exists() else []
        return status, found, read_rows(details) if details.exists() else []

    return call


@pytest.fixture(scope="module")
def plain(measure):
    return measure("scenes_existence")


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    """A random direction, as long as a layer's outputs are large, in a folder."""
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(576, generator=generator) for layer in range(10, 20)}
    folder = tmp_path_factory.mktemp("vector")
    SteeringVector(directions, method="random").save_pretrained(folder)
    return str(folder)


def said(details):
    return [(row["id"], row["prediction"]) for row in details]


@needs_lmms_eval
def test_lmms_eval_reports_the_accuracy_of_pope(plain):
    status, (row,), details = plain
    assert status == 0
    scores = pope.score(details)
    assert scores["n"] == row["n"] == 8 and scores["n_unparsed"] == 0
    assert 0 < scores["pope_accuracy"] < 1, "all right or all wrong shows nothing"
    assert row["value"] == scores["pope_accuracy"]
    assert (row["arm"], row["metric"]) == ("plain", "exact_match")
    right = [pope.parse_strict(d["prediction"]) == pope.parse_strict(d["answer"]) for d in details]
    assert [d["scores"]["exact_match"] for d in details] == right


@needs_lmms_eval
def test_interval_resamples_images_and_protocol_names_the_task(plain):
    _, (row,), details = plain
    images = [d["image_id"] for d in details]
    assert images == [images[0]] * 4 + [images[4]] * 4 and images[0] != images[4]
    columns = [d["scores"]["exact_match"] for d in details]
    assert (row["value"], row["low"], row["high"]) == results.bootstrap(columns, groups=images)
    protocol = row["protocol"]
    version = metadata.version("lmms-eval")
    assert protocol["variant"] == f"lmms-eval {version}, scenes_existence version 1"
    assert protocol["versions"]["lmms-eval"] == version
    assert protocol["max_new_tokens"] == 8 and protocol["n_errors"] == 0


@needs_lmms_eval
def test_answers_are_those_of_generate_answers(plain):
    from firsthand.processing.generation import generate_answers

    rows = [
        {"id": str(i), "image_id": scene["id"], "image": scene["image"], "question": q["question"]}
        for scene in load_scenes("test", 2)
        for i, q in enumerate([q for q in scene["questions"] if q["task"] == "existence"][:4])
    ]
    answers = list(generate_answers(*load_model(None), rows, max_new_tokens=8, progress=False))
    details = plain[2]
    assert [a["question"] for a in answers] == [d["question"] for d in details]
    assert [a["prediction"].split(".")[0] for a in answers] == [d["prediction"] for d in details]


@needs_lmms_eval
def test_strength_zero_changes_nothing_and_a_large_one_much(measure, plain, vector):
    status, (row,), details = measure("scenes_existence", "--vector", vector, "--strength", "0")
    assert status == 0 and row["arm"] == "steered"
    assert said(details) == said(plain[2]) and row["value"] == plain[1][0]["value"]
    assert row["protocol"]["fingerprint"] == plain[1][0]["protocol"]["fingerprint"]
    _, _, steered = measure("scenes_existence", "--vector", vector, "--strength", "40")
    assert [d["id"] for d in steered] == [d["id"] for d in details]
    assert said(steered) != said(details)


@needs_lmms_eval
def test_documents_that_cannot_be_asked_are_counted_and_the_others_are(measure, plain, capsys):
    status, (row,), details = measure("scenes_odd")
    out = capsys.readouterr().out
    assert status == 0 and "6 of 8 documents were not asked" in out
    assert row["protocol"]["n_errors"] == 6 and row["n"] == 8
    reasons = [d.get("error", "") for d in details]
    for start in (0, 4):
        assert "has none" in reasons[start] and "ImageFile', " in reasons[start + 1]
        assert "<image>" in reasons[start + 2] and reasons[start + 3] == ""
        assert said(details)[start + 3][1] == said(plain[2])[start + 3][1]
    assert pope.score(details)["n"] == 2


@needs_lmms_eval
def test_tasks_that_do_not_fit_are_refused_and_the_others_are_kept(measure, plain, capsys):
    names = "scenes_blind,scenes_choice,scenes_sampled,scenes_existence"
    status, (row,), details = measure(names)
    said_why = capsys.readouterr().err
    assert status == 2 and row["value"] == plain[1][0]["value"] and said(details) == said(plain[2])
    for reason in (
        "scenes_blind was not measured: none of its 8 documents can be asked",
        "scenes_choice was not measured: the task compares likelihoods",
        "scenes_sampled was not measured: the task samples (temperature 0.7)",
    ):
        assert reason in said_why


@needs_lmms_eval
def test_unknown_tasks_are_named_before_a_model_is_loaded(measure, capsys):
    assert measure("scenes_existence,no_such_task", "--model", "no/such/model")[0] == 2
    assert "has no task no_such_task" in capsys.readouterr().err


@needs_lmms_eval
def test_settings_are_passed_on_read_or_refused():
    from firsthand.recipes.lmms_eval_adapter import cut, generate_settings

    wanted = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "until": ["x"]}
    assert generate_settings(wanted) == {"max_new_tokens": 16, "num_beams": 1}
    assert generate_settings({"until": None}) == {"max_new_tokens": 1024}
    assert generate_settings({"do_sample": False, "temperature": 0.2}) == {"max_new_tokens": 1024}
    with pytest.raises(ValueError, match="do not|does not know"):
        generate_settings({"visual_cot": True})
    assert cut("yes.\n\nASSISTANT: no", ["ASSISTANT:", "\n\n", ""]) == "yes."
    assert cut(" a b ", None) == "a b" and cut("a.b", ".") == "a"


@needs_lmms_eval
def test_their_pope_and_mme_agree_with_ours(measure, hub):
    """Their own tasks, whose data sets stand on the loopback Hub, made of the scenes."""
    from datasets import Dataset

    rows, pairs = [], []
    for scene in load_scenes("test", 3):
        asked = [q for q in scene["questions"] if q["task"] == "existence"]
        for number, q in enumerate(asked):
            answer = q["answer"].strip(".").lower()
            rows.append({"question": q["question"], "answer": answer, "image": scene["image"]})
            rows[-1]["question_id"] = f"{scene['id']}/{number}"
        yes, no = (next(q for q in asked if q["answer"] == a) for a in ("Yes.", "No."))
        pairs += [{**q, "question_id": scene["id"], "image": scene["image"]} for q in (yes, no)]
    pairs = [{**pair, "category": "existence"} for pair in pairs]
    Dataset.from_list(rows).push_to_hub("lmms-lab-encoder/POPE", split="test")
    Dataset.from_list(pairs).push_to_hub("lmms-lab-encoder/MME", split="test")
    status, found, details = measure("pope,mme", "--gen-kwargs", "until=.")
    assert status == 0
    figures = {row["metric"]: row for row in found}
    ours = pope.score([d for d in details if d["task"] == "pope"], "exact")
    assert ours["n"] == len(rows) and 0 < ours["pope_accuracy"] < 1
    for theirs, name in (("pope_accuracy",) * 2, ("pope_f1_score", "f1")):
        assert figures[theirs]["value"] == pytest.approx(ours[name], abs=1e-12)
    for name in ("precision", "recall"):
        assert figures[f"pope_{name}"]["value"] == pytest.approx(ours[name], abs=1e-12)
    assert math.isnan(figures["pope_accuracy"]["low"]), "their aggregation is not known to us"
    right = defaultdict(list)
    for pair, row in zip(pairs, [d for d in details if d["task"] == "mme"], strict=True):
        wanted = pope.parse_strict(pair["answer"])
        right[pair["question_id"]].append(pope.parse_strict(row["prediction"]) == wanted)
    acc = 100 * sum(sum(both) / 2 for both in right.values()) / len(right)
    plus = 100 * sum(all(both) for both in right.values()) / len(right)
    assert figures["mme_perception_score"]["value"] == pytest.approx(acc + plus)


@needs_lmms_eval
def test_a_judge_that_gives_no_verdict_gives_no_figure(measure, hub, monkeypatch, capsys):
    """lmms-eval itself reports 100 for LLaVA-Bench without one verdict."""
    from datasets import Dataset

    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    rows = [
        {
            "question_id": scene["id"],
            "question": "Describe the image.",
            "gpt_answer": scene["caption"],
            "caption": scene["caption"],
            "category": "detail",
            "image": scene["image"],
        }
        for scene in load_scenes("test", 2)
    ]
    Dataset.from_list(rows).push_to_hub("lmms-lab-encoder/llava-bench-in-the-wild", split="train")
    status, found, details = measure("llava_in_the_wild", "--gen-kwargs", "max_new_tokens=4")
    assert status == 2 and found == [] and len(details) == 2
    assert "the judge gave no verdict on 2 of 2 documents" in capsys.readouterr().err


def test_without_lmms_eval_the_way_to_install_it_is_said(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else find(name)
    )
    line = ["measure", "lmms-eval", "--tasks", "mme", "--out", str(tmp_path / "r.json")]
    assert cli.main(line) == 2
    said_how = capsys.readouterr().err
    assert "torchvision" in said_how and "--no-deps lmms-eval==" in said_how
    assert cli.main([*line, "--strength", "1"]) == 2
    assert "--vector" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_list_of_packages_stands_beside_the_recipe_and_names_the_version():
    text = measure_lmms_eval.REQUIREMENTS.read_text("utf-8")
    names = [line for line in text.splitlines() if not line.startswith("#")]
    assert names and not any(name.startswith(("torch", "lmms")) for name in names)
    assert f"--no-deps lmms-eval=={measure_lmms_eval.VERSION}\n" in text
