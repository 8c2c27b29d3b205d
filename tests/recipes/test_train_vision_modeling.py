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
from tiny_models import TINY, tiny_image, tiny_internvl, tiny_processor

from firsthand.processing.collator import VisionLabelCollator
from firsthand.processing.masks import encode
from firsthand.recipes import train_vision_modeling as recipe
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.inputs import usable_rows
from firsthand.recipes.trainers.vision_modeling import (
    VisionModelingConfig,
    VisionModelingTrainer,
    make_trainable,
)

ROOT = Path(recipe.__file__).parent
CONFIG = ROOT / "configs" / "vision_modeling.yaml"


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


def trained(family: str, out: Path, train: str = "full", head: str = "shared", **changes):
    """The model after training, its parameters before, and the trainer."""
    processor = tiny_processor(family)
    model = make_trainable(recipe.with_head(TINY[family](), head), train, lora_rank=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = VisionModelingTrainer(
        model, settings(out, **changes), VisionLabelCollator(processor, model.config, max_area=0.5),
        samples(),
    )  # fmt: skip
    trainer.train()
    return model, before, trainer


MOVES = {
    "full": r"language_model|text_model|projector|merger|connector|lm_head|vision_head",
    "lora": r"(language|text)_model.*lora_|modules_to_save",
    "projector": r"projector|merger|connector|vision_head",
}
FROZEN = r"vision_tower|vision_model|visual\.(patch|blocks|deepstack|merger\.ln_q$)"


@pytest.mark.parametrize("train", sorted(MOVES))
@pytest.mark.parametrize("family", sorted(TINY))
def test_the_right_weights_move(family, train, tmp_path):
    changes = {"max_steps": 2, "learning_rate": 0.1}  # LoRA's A moves once its B has
    head = "separate" if family in ("llava", "internvl") else "shared"
    model, before, _ = trained(family, tmp_path, train, head, **changes)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n in before if re.search(MOVES[train], n) and not re.search(FROZEN, n)}
    wanted -= {n for n in wanted if "original_module" in n}
    assert moved == wanted and moved
    if head == "separate":
        assert any("vision_head" in n for n in moved)


def test_an_adapter_without_projector(tmp_path):
    model = make_trainable(tiny_internvl(), "lora", lora_projector=False)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_other_families_have_no_separate_head():
    with pytest.raises(ValueError, match="'qwen2_5_vl' has none.*vision_head: shared"):
        recipe.with_head(TINY["qwen2_5_vl"](), "separate")


@pytest.mark.parametrize("family", sorted(TINY))
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


TWO_RANKS = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train_vision_modeling import trained
model, _, trainer = trained("internvl", Path({out!r}), per_device_train_batch_size=4)
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), {out!r} + "/two.pt")
torch.distributed.barrier()  # a rank that leaves early aborts the other's connection
torch.distributed.destroy_process_group()
"""


def test_two_ranks_equal_one(tmp_path):
    model, before, _ = trained("internvl", tmp_path, per_device_train_batch_size=8)
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-2000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, two[name], atol=2e-6), name
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_rows_that_cannot_be_trained_on_are_left_out(saved, tmp_path):
    rows = samples(6)
    rows[1]["image"] = Broken()
    rows[2]["turns"] = []
    rows[3]["turns"][0]["expressions"][0]["mask"] = encode(np.ones((5, 5)))
    rows[4]["turns"][0]["answer"] = ""
    rows[5]["image"] = None
    kept, skipped = usable_rows(rows, recipe.problem)
    assert kept == [0, 5] and [s["row"] for s in skipped] == [1, 2, 3, 4]
    reasons = ["OSError: truncated", "no turns", r"mask of 'dog' is \[5, 5\]", "answer is empty"]
    for found, expected in zip(skipped, reasons, strict=True):
        assert re.search(expected, found["reason"])
    with pytest.raises(ValueError, match="no row can be used"):
        usable_rows(rows[1:5], recipe.problem)


class Broken:
    """An image whose pixels cannot be decoded."""

    size = (80, 60)

    def load(self):
        raise OSError("truncated")


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
        ("noun: all", "noun is 'all'.*last, first, random"),
        ("vision_head: both", "vision_head is 'both'"),
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
