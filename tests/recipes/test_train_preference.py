"""The preference recipe on a tiny model: bad pairs, what moves, going on after a stop, merging."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file
from tiny_models import tiny_image, tiny_internvl, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from firsthand.recipes import cli, train_preference
from firsthand.recipes.inputs import read_rows, usable_rows
from firsthand.recipes.launching import checkpoint_of

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


def arguments(saved, parquet, out, *more: str) -> list[str]:
    given = ["--config", str(CONFIG), "--model", str(saved), "--data", str(parquet)]
    given += ["--output_dir", str(out), "--use_cpu", "true", "--learning_rate", "0.01"]
    given += ["--num_train_epochs", "1", "--lora_rank", "4", "--lora_alpha", "8"]
    return [*given, "--disable_tqdm", "true", *more]


def settings(saved, parquet, out, *more: str):
    return train_preference.parse(arguments(saved, parquet, out, *more))


def test_pairs_that_cannot_be_trained_on_are_listed(saved, parquet, tmp_path):
    trainer = train_preference.run(*settings(saved, parquet, tmp_path))
    skipped = read_rows(tmp_path / "skipped.jsonl")
    assert [s["row"] for s in skipped] == [6, 7]
    assert [s["reason"] for s in skipped] == ["both answers are the same", "an answer is empty"]
    assert len(trainer.train_dataset) == 6 and trainer.state.global_step == 6
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all("language_model" in name for name in adapter)
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)


def test_training_that_was_killed_goes_on_to_the_same_weights(saved, parquet, tmp_path):
    """SIGKILL after a checkpoint was written, perhaps while the next one is."""
    options = ["--save_steps", "2", "--logging_steps", "1", "--num_train_epochs", "10"]
    command = arguments(saved, parquet, tmp_path / "b", *options)
    whole = train_preference.run(*settings(saved, parquet, tmp_path / "a", *options))
    with subprocess.Popen(
        [sys.executable, "-u", "-m", train_preference.__name__, *command],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ,
    ) as process:  # fmt: skip
        logged = 0
        while logged < 3:  # the third update follows the checkpoint of the second
            logged += "'loss'" in next(process.stdout)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "b" / "adapter_model.safetensors").exists()
    recipe, training = settings(
        saved, parquet, tmp_path / "b", *options, "--resume_from_checkpoint", "true"
    )
    found = checkpoint_of(training)
    assert 2 <= int(found.rsplit("-")[-1]) < whole.state.global_step == 60
    (tmp_path / "b" / "checkpoint-99").mkdir()  # cut short
    (tmp_path / "b" / "checkpoint-98").mkdir()
    (tmp_path / "b" / "checkpoint-98" / "trainer_state.json").write_text('{"best')
    assert checkpoint_of(training) == found
    again = train_preference.run(recipe, training)
    assert again.state.global_step == 60
    one, other = (dict(t.model.named_parameters()) for t in (whole, again))
    assert all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def test_a_merged_model_is_the_trained_one(saved, parquet, tmp_path):
    trainer = train_preference.run(*settings(saved, parquet, tmp_path / "out"))
    command = ["train", "merge", "--adapter", str(tmp_path / "out"), "--model", str(saved)]
    assert cli.main([*command, "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    expected = logits_of(trainer.model, saved)
    torch.testing.assert_close(
        logits_of(merged, tmp_path / "merged"), expected, atol=1e-5, rtol=1e-4
    )
    assert cli.main([*command, "--out", str(tmp_path / "merged")]) == 2  # not over another model
    assert cli.main([*command[:3], str(saved), "--out", str(tmp_path / "x")]) == 2


def logits_of(model, saved) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(saved)
    inputs = processor(images=[[tiny_image()]], text=["<image>\nWhat?"], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_rounds_start_from_the_merged_adapters_before(saved, parquet, tmp_path):
    """The second round's reference is the first round's model; a merge of both is the third's."""
    first, second = tmp_path / "1", tmp_path / "2"
    one = train_preference.run(*settings(saved, parquet, first))
    two = train_preference.run(*settings(saved, parquet, second, "--start", str(first)))
    after_one = logits_of(one.model, saved)
    with two.model.disable_adapter():
        torch.testing.assert_close(logits_of(two.model, saved), after_one, atol=1e-5, rtol=1e-4)
    plain = AutoModelForImageTextToText.from_pretrained(saved)
    assert (logits_of(plain, saved) - after_one).abs().max() > 1e-3
    command = ["train", "merge", "--adapter", str(first), "--adapter", str(second)]
    assert cli.main([*command, "--model", str(saved), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    after_two = logits_of(two.model, saved)
    torch.testing.assert_close(logits_of(merged, saved), after_two, atol=1e-5, rtol=1e-4)
    assert (after_two - after_one).abs().max() > 1e-3
    starts = ["--start", str(first), str(second), "--max_steps", "1"]
    three = train_preference.run(*settings(saved, parquet, tmp_path / "3", *starts))
    with three.model.disable_adapter():
        torch.testing.assert_close(logits_of(three.model, saved), after_two, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        train_preference.run(*settings(saved, parquet, tmp_path / "4", "--start", str(saved)))


def test_words_that_are_tokens_are_found(saved):
    check = train_preference.problems(tiny_processor("internvl"), 512)
    assert check(pair(0)) is None
    assert check(pair(0, "a <image> here")) == "chosen holds the special token <image> as text"
    assert check(pair(0, "a dog", "bye<|im_end|>")) == (
        "rejected holds the special token <|im_end|> as text"
    )
    row = pair(0) | {"prompt": said("user", "Say <|im_start|>user")}
    assert check(row) == "prompt holds the special token <|im_start|> as text"
    blocks = [{"type": "image", "text": None}, {"type": "text", "text": "What is <pad>?"}]
    assert check(row | {"prompt": [{"role": "user", "content": blocks}]}) == (
        "prompt holds the special token <pad> as text"
    )
    plain = {"images": [tiny_image()], "prompt": "<image>\nWhat?", "chosen": "a<|im_end|>"}
    assert check(plain | {"rejected": "b<|im_end|>"}) is None  # its own template
    for weight, reason in ((-1.0, "weight is -1.0"), (None, "None"), (float("nan"), "nan")):
        assert reason in check(pair(0) | {"weight": weight})


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3", "smolvlm"])
def test_rows_are_counted_as_the_trainers_collator_makes_them(family):
    from firsthand.recipes.trainers.preference_collator import SharedImageCollator

    processor, sizes = tiny_processor(family), {}
    rows = [pair(0), pair(3), pair(1) | {"images": []}]
    rows += [pair(2) | {"images": [tiny_image(0), tiny_image(1, 90, 30), tiny_image(2)]}]
    for row in rows:
        made = SharedImageCollator(processor)([row])
        assert train_preference.tokens(row, processor, sizes) == made["attention_mask"].sum(1).max()
    assert set(sizes) == {(80, 60), (90, 30)}


def test_rows_over_the_length_are_left_out(saved, tmp_path):
    rows = [pair(0), pair(1), pair(2, "a dog " * 40), pair(3) | {"images": [tiny_image()] * 9}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    limit = ["--max_length", "60", "--max_steps", "1"]
    trainer = train_preference.run(*settings(saved, path, tmp_path / "out", *limit))
    skipped = read_rows(tmp_path / "out" / "skipped.jsonl")
    assert [s["row"] for s in skipped] == [2, 3] and len(trainer.train_dataset) == 2
    assert all("over the 60 of max_length or context" in s["reason"] for s in skipped)
    long = [pair(0, "a dog " * 300)]  # the model's context is 512
    Dataset.from_list(long, features=FEATURES).to_parquet(path)
    with pytest.raises(ValueError, match="no row can be used.*over the 512"):
        train_preference.run(*settings(saved, path, tmp_path / "out2", "--max_length", "4096"))


def test_what_cannot_work_is_said_before_training(saved, parquet, tmp_path):
    Dataset.from_list([{"images": [], "prompt": "x"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column chosen, rejected"):
        train_preference.load_pairs(str(tmp_path / "x.parquet"), "train")
    with pytest.raises(ValueError, match="give --data"):
        train_preference.load_pairs(None, "train")
    with pytest.raises(SystemExit):
        settings(saved, parquet, tmp_path, "--train", "projector")
    with pytest.raises(ValueError, match="no row can be used.*an answer is empty"):
        usable_rows([pair(0, "")], train_preference.problems(tiny_processor("internvl"), 512))


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


def test_stock_trains_the_same_adapter(saved, parquet, tmp_path):
    for name in ("ours", "stock"):
        given = settings(saved, parquet, tmp_path / name, "--stock", str(name == "stock"))
        train_preference.run(*given)
    ours, stock = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")
    )
    assert ours.keys() == stock.keys()
    assert all(torch.allclose(ours[name], stock[name], atol=1e-5) for name in ours)
    given = settings(saved, parquet, tmp_path, "--stock", "true", "--anchor_weight", "1")
    with pytest.raises(ValueError, match="knows no anchor_weight"):
        train_preference.run(*given)
