"""The study of misleading instructions: exact figures on scripted answers, kept parts."""

import csv

import pytest

from firsthand.recipes import evaluate_instruction, study
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.evaluate_instruction import measure, questions_of

COUNT = 6


@pytest.fixture(scope="module")
def scenes_():
    return load_scenes("test", COUNT)


def right(row, truth):
    """What a model that sees everything answers."""
    if "answer" not in row:
        return truth[row["image_id"]]["caption"]
    there = row["answer"] == "yes"
    if row.get("presumed") and there:
        shown = [o for o in truth[row["image_id"]]["objects"] if o["noun"] == row["object"]]
        asked = "position" if row["question"].startswith("Where") else "color"
        return f"{shown[0][asked] or 'I cannot tell'}."
    if row.get("presumed"):
        return f"There is no {row['object']} in the image."
    return "Yes." if there else "No."


def said(rows, script):
    truth = {row["id"]: row for row in rows}
    return [
        {k: v for k, v in row.items() if k != "image"} | {"prediction": script(row, truth)}
        for row in questions_of(rows, seed=0)
    ]


def ratios(found):
    totals = {name: [sum(c) for c in zip(*part["columns"], strict=True)]
              for name, part in found.items()}  # fmt: skip
    return {name: a / b for name, (a, b) in totals.items()}


def test_every_object_is_asked_about_and_presumed(scenes_):
    rows = questions_of(scenes_, seed=0)
    presumed = [row for row in rows if row.get("presumed")]
    polled = [row for row in rows if row.get("strategy")]
    assert [r["object"] for r in presumed] == [r["object"] for r in polled]
    assert len({row["id"] for row in rows}) == len(rows) == COUNT + 2 * len(polled)
    shown = {row["id"]: {o["noun"] for o in row["objects"]} for row in scenes_}
    for row in presumed:
        assert (row["object"] in shown[row["image_id"]]) == (row["answer"] == "yes")
        assert row["object"] in row["question"]
    for answer in ("yes", "no"):
        asked = {row["question"].split()[0] for row in presumed if row["answer"] == answer}
        assert asked == {"Where", "What"}, "both wordings are asked of both"


def test_right_answers_are_right(scenes_):
    found = ratios(measure(said(scenes_, right), scenes_))
    ones = ("pope_accuracy", "accuracy_existing", "accuracy_absent", "denied_absent", "recall")
    assert {found[name] for name in (*ones, "position_accuracy")} == {1.0}
    assert found["chair_i"] == found["denied_existing"] == 0.0 and found["pope_yes_ratio"] == 0.5
    assert found["gavie_rule_relevance"] == found["gavie_rule_accuracy"] == 10.0


def test_one_who_says_yes_to_everything(scenes_):
    def script(row, truth):
        return "Yes." if "answer" in row else right(row, truth)

    found = ratios(measure(said(scenes_, script), scenes_))
    assert (found["accuracy_existing"], found["accuracy_absent"]) == (1.0, 0.0)
    assert (found["pope_yes_ratio"], found["denied_absent"]) == (1.0, 0.0)
    assert 5 < found["gavie_rule_accuracy"] < 7, "half of the answers, and captions are right"


def test_one_who_denies_everything(scenes_):
    def script(row, truth):
        return "No, it is not there." if "answer" in row else right(row, truth)

    found = ratios(measure(said(scenes_, script), scenes_))
    assert (found["accuracy_existing"], found["accuracy_absent"]) == (0.0, 1.0)
    assert (found["denied_existing"], found["denied_absent"]) == (1.0, 1.0)


def test_arms_are_asked_once_and_compared(tmp_path, monkeypatch):
    """A second call reads the kept answers; pooled seeds and a paired difference come out."""
    asked = []

    def generated(model, processor, rows, *_, **__):
        truth = {row["id"]: row for row in load_scenes("test", COUNT)}
        asked.append(model)
        for row in rows:
            blind = model == "a" and row.get("strategy")
            text = "Yes." if blind else right(row, truth)
            yield {k: v for k, v in row.items() if k != "image"} | {"prediction": text}

    monkeypatch.setattr(study, "load_arm", lambda adapter: (adapter, None))
    monkeypatch.setattr(evaluate_instruction, "generate_answers", generated)
    command = ["--arm", "neg0=a,a", "--arm", "neg50=b,b", "--split", "test"]
    command += ["--compare", "neg50-neg0", "--count", str(COUNT), "--work", str(tmp_path / "work")]
    for name in ("one.csv", "two.csv"):
        args = study.parse([*command, "--out", str(tmp_path / name)], "instructions")
        study.run(args, evaluate_instruction.answered, evaluate_instruction.DRAWN)
    assert asked == [None, "a", "a", "b", "b"]
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    drawn = (tmp_path / "two.svg").read_text()
    assert drawn.count(">neg50</text>") == 1 and "seed" not in drawn and "neg50 - neg0" not in drawn
    assert all(f">{metric}, test</text>" in drawn for metric in evaluate_instruction.DRAWN)
    with (tmp_path / "one.csv").open() as file:
        rows = {(r["arm"], r["metric"]): r for r in csv.DictReader(file)}
    assert float(rows["neg50 - neg0", "accuracy_absent"]["value"]) == 1.0
    assert float(rows["neg0", "pope_yes_ratio"]["value"]) == 1.0
    assert int(rows["neg0", "chair_i"]["n"]) == 2 * int(rows["neg0, seed 1", "chair_i"]["n"])
