"""The demo's whole job on a tiny random model and two scenes a split: resumable, reported."""

import argparse
import json

import pytest
from PIL import Image
from tiny_models import tiny_internvl, tiny_processor

from firsthand.recipes import demo, demo_data, demo_explain, demo_rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_internvl().save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(checkpoint, tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (90, 70), "red").save(images / "mine.png")
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(demo_explain, "CALIBRATION_SCENES", 3)
    return argparse.Namespace(
        out=str(tmp_path / "out"),
        model=str(checkpoint),
        images=str(images),
        question="What is this?",
        scenes=2,
        seed=0,
    )


def test_the_whole_job_and_its_rerun(arguments, monkeypatch, capsys):
    assert demo.run(arguments) == 0
    out = demo.Path(arguments.out)
    rows = json.loads((out / "results.json").read_text())
    assert {r["arm"] for r in rows} == {"plain", "shuffled", "steered"}
    assert {r["split"] for r in rows} == set(demo.SPLITS)
    assert {"chair_i", "recall", "pope_accuracy", "visual_reliance"} <= {r["metric"] for r in rows}
    assert all(r["n"] >= 2 and r["protocol"]["fingerprint"] for r in rows)
    page = (out / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and "http" not in page.split("<body>")[0]
    assert "| metric |" in capsys.readouterr().out
    monkeypatch.setattr(demo.Demo, "answer", _finished(demo.Demo.answer))
    assert demo.run(arguments) == 0
    assert json.loads((out / "results.json").read_text()) == rows


def _finished(answer):
    def only_from_file(self, name, rows):
        assert (self.work.stages / f"{name}.jsonl").exists(), f"{name} was made again"
        return answer(self, name, rows)

    return only_from_file


def test_an_interrupted_run_goes_on(arguments, monkeypatch):
    measure = demo.Demo.measure

    def stop(self, arm):
        if arm == "shuffled":
            raise KeyboardInterrupt
        return measure(self, arm)

    monkeypatch.setattr(demo.Demo, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(arguments)
    stages = demo.Path(arguments.out) / "stages"
    kept = {p: p.stat().st_mtime_ns for p in stages.glob("answers-plain-*.jsonl")}
    assert len(kept) == 3 and not list(stages.glob("*.aside"))
    monkeypatch.setattr(demo.Demo, "measure", measure)
    assert demo.run(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_other_settings_start_afresh(tmp_path):
    first = demo.Work(tmp_path, {"seed": 0})
    assert first.rows("a", lambda: [{"x": 1}]) == [{"x": 1}]
    assert first.rows("a", lambda: [{"x": 2}]) == [{"x": 1}]
    assert demo.Work(tmp_path, {"seed": 1}).rows("a", lambda: [{"x": 3}]) == [{"x": 3}]


def test_reliance_rows_remove_what_they_say():
    row = demo_data.load_scenes("test", 1)[0]
    found = {r["condition"]: r for r in demo_rows.reliance_rows([row])}
    assert set(found) == {"plain", "masked", "control", "blank"}
    assert len({r["question"] for r in found.values()}) == 1
    assert len(set(found["blank"]["image"].getdata())) == 1
    asked = found["plain"]["question"]
    chosen = next(o for o in row["objects"] if o["noun"] in asked)
    left, top, right, bottom = (int(v) for v in chosen["box"])
    inside = found["masked"]["image"].crop((left, top, right, bottom))
    assert len(set(inside.getdata())) == 1
    plain, masked = (list(found[c]["image"].getdata()) for c in ("plain", "masked"))
    changed = sum(a != b for a, b in zip(plain, masked, strict=True))
    assert 0 < changed <= (right - left) * (bottom - top)


def test_shuffling_moves_every_image():
    rows = demo_data.load_scenes("test", 3)
    asked = demo_rows.caption_rows(rows)
    moved = demo_rows.shuffled(asked)
    assert [r["id"] for r in moved] == [r["id"] for r in asked]
    assert all(a["image"] is not b["image"] for a, b in zip(asked, moved, strict=True))


def test_threshold_and_auroc():
    words = [{"support": s, "true": t} for s, t in ((3, True), (2, True), (-1, False), (0, False))]
    assert demo_explain.best_threshold(words) == 1.0
    assert demo_explain.auroc(words) == 1.0
    assert demo_explain.auroc([*words, {"support": 5, "true": False}]) == pytest.approx(4 / 6)
