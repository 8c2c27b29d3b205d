"""The preference recipe on a tiny model: bad pairs, what moves, going on after a stop, merging."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file
from tiny_models import tiny_image, tiny_internvl, tiny_processor

from firsthand.recipes import cli, train_preference
from firsthand.recipes.inputs import read_rows, usable_rows

ROOT = Path(train_preference.__file__).parent
CONFIG = ROOT / "configs" / "preference.yaml"
TURNS = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features({"images": List(Image()), "prompt": TURNS, "chosen": TURNS, "rejected": TURNS})


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def pair(number: int, chosen: str = "a dog top left.", rejected: str = "a cup.") -> dict:
    return {
        "images": [tiny_image(number)],
        "prompt": said("user", "What is it?"),
        "chosen": said("assistant", chosen),
        "rejected": said("assistant", rejected + "." * number),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_internvl().save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    rows = [pair(i) for i in range(6)] + [pair(6, "same", "same"), pair(7, " ", "a cup.")]
    rows[6]["rejected"] = rows[6]["chosen"]
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    return path


def settings(saved, parquet, out, *more: str):
    given = ["--config", str(CONFIG), "--model", str(saved), "--data", str(parquet)]
    given += ["--output_dir", str(out), "--use_cpu", "true", "--learning_rate", "0.01"]
    given += ["--num_train_epochs", "1", "--lora_rank", "4", "--lora_alpha", "8"]
    return train_preference.parse([*given, "--disable_tqdm", "true", *more])


def test_pairs_that_cannot_be_trained_on_are_listed(saved, parquet, tmp_path):
    trainer = train_preference.run(*settings(saved, parquet, tmp_path))
    skipped = read_rows(tmp_path / "skipped.jsonl")
    assert [s["row"] for s in skipped] == [6, 7]
    assert [s["reason"] for s in skipped] == ["both answers are the same", "an answer is empty"]
    assert len(trainer.train_dataset) == 6 and trainer.state.global_step == 6
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all("language_model" in name for name in adapter)
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)


def test_training_that_goes_on_ends_in_the_same_weights(saved, parquet, tmp_path):
    whole = train_preference.run(*settings(saved, parquet, tmp_path / "a"))
    options = ["--save_steps", "2", "--save_strategy", "steps"]
    recipe, stopped = settings(saved, parquet, tmp_path / "b", *options)
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer_of = train_preference.SharedImageDPOTrainer

    def stopping(*args, **kwargs):
        return trainer_of(*args, **kwargs, callbacks=[Stop()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_preference, "SharedImageDPOTrainer", stopping)
        train_preference.run(recipe, stopped)
    assert (tmp_path / "b" / "checkpoint-2").is_dir()
    resume = ["--resume_from_checkpoint", str(tmp_path / "b" / "checkpoint-2")]
    again = train_preference.run(*settings(saved, parquet, tmp_path / "b", *options, *resume))
    assert again.state.global_step == whole.state.global_step
    one, other = (dict(t.model.named_parameters()) for t in (whole, again))
    assert all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def test_a_merged_model_is_the_trained_one(saved, parquet, tmp_path):
    trainer = train_preference.run(*settings(saved, parquet, tmp_path / "out"))
    command = ["train", "merge", "--adapter", str(tmp_path / "out"), "--model", str(saved)]
    assert cli.main([*command, "--out", str(tmp_path / "merged")]) == 0
    from transformers import AutoModelForImageTextToText, AutoProcessor

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    inputs = processor(
        images=[[tiny_image()]], text=["<image>\nWhat?"], return_tensors="pt"
    )  # fmt: skip
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert cli.main([*command, "--out", str(tmp_path / "merged")]) == 2  # not over another model
    assert cli.main([*command[:3], str(saved), "--out", str(tmp_path / "x")]) == 2


def test_what_cannot_work_is_said_before_training(saved, parquet, tmp_path):
    Dataset.from_list([{"images": [], "prompt": "x"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column chosen, rejected"):
        train_preference.load_pairs(str(tmp_path / "x.parquet"), "train")
    with pytest.raises(ValueError, match="give --data"):
        train_preference.load_pairs(None, "train")
    with pytest.raises(SystemExit):
        settings(saved, parquet, tmp_path, "--train", "projector")
    with pytest.raises(ValueError, match="no row can be used.*an answer is empty"):
        usable_rows([pair(0, "")], train_preference.problem)


def test_every_option_of_the_config_is_explained():
    lines = CONFIG.read_text("utf-8").splitlines()
    for above, line in zip([""] + lines, lines, strict=False):
        assert not re.match(r"\w+:", line) or above.startswith("# "), line
    recipe, training = train_preference.parse(["--config", str(CONFIG)])
    assert (recipe.lora_rank, recipe.lora_alpha, training.beta) == (128, 256, 0.1)
    assert training.learning_rate == 1e-7 and training.loss_type == ["sigmoid"]


def test_accelerate_launches_it(saved, parquet, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "configs" / "accelerate" / "cpu.yaml"), "-m", train_preference.__name__]
    command += ["--config", str(CONFIG), "--model", str(saved), "--data", str(parquet)]
    command += ["--max_steps", "2", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "adapter_model.safetensors").exists()
