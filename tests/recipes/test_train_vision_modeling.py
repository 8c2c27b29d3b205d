"""The vision-modeling recipe on tiny models: what moves, what stays, and equal updates."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_models import tiny_image, tiny_internvl, tiny_llava, tiny_processor

from firsthand.processing.collator import VisionLabelCollator
from firsthand.processing.masks import encode
from firsthand.recipes import train_vision_modeling as recipe
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.trainers.vision_modeling import (
    VisionModelingConfig,
    VisionModelingTrainer,
    make_trainable,
)

ROOT = Path(recipe.__file__).parent
CONFIG = ROOT / "configs" / "vision_modeling.yaml"
MODELS = {"llava": tiny_llava, "internvl": tiny_internvl}


def samples(count: int = 8) -> list[dict]:
    """Grounded samples whose answers and label counts differ."""
    made = []
    for i in range(count):
        mask = np.zeros((60, 80), bool)
        mask[: 15 * (1 + i % 3), : 20 * (i % 3)] = True  # every third one labels nothing
        expression = {"text": "dog", "char_start": 2, "char_end": 5, "nouns": ["dog"]}
        expression |= {"boxes": [[0.0, 0.0, 9.0, 9.0]], "score": 1.0, "mask": encode(mask)}
        answer = "a dog top left" + ", a cup center" * (i % 4) + "."
        turn = {"question": "Describe the image.", "answer": answer, "expressions": [expression]}
        made.append({"id": str(i), "image": tiny_image(i), "source": "test", "turns": [turn]})
    return made


def features() -> Features:
    mask = {"size": List(Value("int32")), "counts": Value("string")}
    expression = {
        "text": Value("string"),
        "char_start": Value("int32"),
        "char_end": Value("int32"),
        "nouns": List(Value("string")),
        "boxes": List(List(Value("float32"))),
        "score": Value("float32"),
        "mask": mask,
    }
    turn = {"question": Value("string"), "answer": Value("string")}
    turn["expressions"] = List(expression)
    text = {"id": Value("string"), "source": Value("string")}
    return Features({**text, "image": Image(), "turns": List(turn)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_internvl().save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    Dataset.from_list(samples(), features=features()).to_parquet(path)
    return path


def settings(out: Path, **changes) -> VisionModelingConfig:
    fixed = dict(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        max_steps=1,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        vision_weight=0.5,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return VisionModelingConfig(**{**fixed, **changes})


def trained(family: str, out: Path, train: str = "full", **changes):
    """The model after training, its parameters before, and the trainer."""
    processor = tiny_processor(family)
    model = make_trainable(MODELS[family](), train, lora_rank=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = VisionModelingTrainer(
        model, settings(out, **changes), VisionLabelCollator(processor, MODELS[family]().config),
        samples(),
    )  # fmt: skip
    trainer.train()
    return model, before, trainer


MOVES = {
    "full": r"language_model|multi_modal_projector|lm_head",
    "lora": r"language_model.*lora_|multi_modal_projector\.modules_to_save",
    "projector": r"multi_modal_projector",
}


@pytest.mark.parametrize("train", sorted(MOVES))
@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_right_weights_move(family, train, tmp_path):
    changes = {"max_steps": 2, "learning_rate": 0.1}  # LoRA's A moves once its B has
    model, before, _ = trained(family, tmp_path, train, **changes)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n in before if re.search(MOVES[train], n)}
    assert moved == wanted and moved
    assert all(re.search("vision_tower", n) is None for n in moved)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_one_batch_of_eight_equals_eight_of_one(family, tmp_path):
    ways = {}
    for size in (8, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        model, before, trainer = trained(family, tmp_path, **sizes)
        ways[size] = dict(model.named_parameters()), trainer.state.log_history[0]
    for name, parameter in ways[8][0].items():
        assert torch.allclose(parameter, ways[1][0][name], atol=2e-6), name
    assert any(not torch.equal(p, before[n]) for n, p in ways[8][0].items())
    for key in ("loss", "language_loss", "vision_loss"):
        assert ways[8][1][key] == pytest.approx(ways[1][1][key], abs=2e-3)


def test_the_logged_loss_is_the_mix_and_falls(tmp_path):
    sizes = {"per_device_train_batch_size": 4, "max_steps": 8, "vision_weight": 0.25}
    _, _, trainer = trained("internvl", tmp_path, **sizes)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        mixed = 0.75 * entry["language_loss"] + 0.25 * entry["vision_loss"]
        assert entry["loss"] == pytest.approx(mixed, abs=2e-3)
    for key in ("language_loss", "vision_loss"):
        assert logs[-1][key] < logs[0][key]


def test_evaluation_gives_a_loss(tmp_path):
    _, _, trainer = trained("internvl", tmp_path)
    assert 0 < trainer.evaluate(samples(3))["eval_loss"] < 20


def test_scenes_become_samples():
    for row in load_scenes("validation", 20):
        (turn,) = recipe.scene_to_sample(row)["turns"]
        spans = [(e["char_start"], e["char_end"]) for e in turn["expressions"]]
        assert [turn["answer"][a:b] for a, b in spans] == [o["noun"] for o in row["objects"]]
        assert spans == sorted(set(spans)) and len(spans) == len(row["objects"])


def test_parquet_gives_the_same_batch(parquet):
    processor = tiny_processor("internvl")
    collator = VisionLabelCollator(processor, tiny_internvl().config)
    rows = recipe.load_samples(str(parquet), "train")
    assert recipe.load_samples(str(parquet.parent), "train")[0]["id"] == "0"
    stored, made = collator([rows[i] for i in range(8)]), collator(samples())
    assert all(torch.equal(stored[key], made[key]) for key in made)
    assert (made["vision_labels"] != -100).any()


def test_rows_without_turns_are_refused(tmp_path):
    Dataset.from_list([{"id": "1", "text": "x"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column image, turns"):
        recipe.load_samples(str(tmp_path / "x.parquet"), "train")


def test_every_option_of_the_config_is_explained():
    lines = CONFIG.read_text("utf-8").splitlines()
    for above, line in zip([""] + lines, lines, strict=False):
        assert not re.match(r"\w+:", line) or above.startswith("# "), line
    chosen, training = recipe.parse(["--config", str(CONFIG), "--learning_rate", "1e-4"])
    assert chosen.train == "lora" and chosen.model is None
    assert training.learning_rate == 1e-4 and training.per_device_train_batch_size == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs: 3", "unknown options: epochs"),
        ("train: all", "train is 'all'.*full, lora, projector"),
        ("frame: crop", "frame is 'crop'"),
        ("vision_weight: 2", "vision_weight is 2"),
    ],
)
def test_a_wrong_config_is_refused_at_once(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.parse(["--config", str(tmp_path / "c.yaml")])


def test_accelerate_launches_it(saved, parquet, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "configs" / "accelerate" / "cpu.yaml"), "-m", recipe.__name__]
    command += ["--config", str(CONFIG), "--model", str(saved), "--data", str(parquet)]
    command += ["--max_steps", "2", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_internvl(), tmp_path)
    lora = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert any(p.abs().sum() > 0 for p in lora)
