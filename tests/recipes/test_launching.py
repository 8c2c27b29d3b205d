"""What training recipes share: which checkpoint they go on from, and how errors are told."""

import sys

import pytest
from transformers import TrainingArguments

from firsthand.recipes import launching, train_instruction, train_vision_modeling


def goes_on(out, wanted):
    settings = TrainingArguments(str(out), use_cpu=True, resume_from_checkpoint=wanted)
    return launching.checkpoint_of(settings)


def test_true_goes_on_from_the_last_whole_checkpoint(tmp_path):
    for wanted in ("true", True, "false", False, None):
        assert goes_on(tmp_path, wanted) is None
    for step, state in (
        (2, "{}"),
        (10, "{}"),
        (98, '{"best'),
        (99, None),
    ):  # the last were cut short
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    for wanted in ("true", "True", True):
        assert goes_on(tmp_path, wanted) == str(tmp_path / "checkpoint-10")
    assert goes_on(tmp_path, "there/checkpoint-2") == "there/checkpoint-2"
    assert goes_on(tmp_path, "false") is None


@pytest.mark.parametrize("recipe", [train_instruction, train_vision_modeling])
def test_a_config_may_say_true_and_errors_are_one_line(recipe, tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text(f"resume_from_checkpoint: true\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    settings = recipe.parse(["--config", str(file)])[1]
    assert launching.checkpoint_of(settings) is None
    file.write_text("epochs: 3")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(file)])
    with pytest.raises(SystemExit, match=r"^error: .* unknown options: epochs$"):
        recipe.main()
