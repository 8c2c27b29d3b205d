"""The instruction recipe on tiny models: what moves, which tokens are learnt, ratios, resuming."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, tiny_image, tiny_internvl, tiny_processor
from transformers import Trainer

from firsthand.recipes import train_instruction as recipe
from firsthand.recipes.train_instruction import InstructionCollator, InstructionConfig, chosen

ROOT = Path(recipe.__file__).parent
CONFIG = ROOT / "configs" / "instruction.yaml"
TEXT = ("image_id", "question", "answer", "task", "polarity")
FEATURES = Features({"image": Image(), **{name: Value("string") for name in TEXT}})


def rows(count: int = 8) -> list[dict]:
    """Instruction rows whose answers differ in length; every third one is negative."""
    return [
        {
            "image_id": str(i),
            "image": tiny_image(i),
            "question": "Is there a dog in the image?",
            "answer": "No." if i % 3 == 0 else "a dog top left" + ", a cup center" * (i % 4) + ".",
            "task": "object existence",
            "polarity": "negative" if i % 3 == 0 else "positive",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_internvl().save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    Dataset.from_list(rows(12), features=FEATURES).to_parquet(path)
    return path


def settings(out: Path, **changes) -> InstructionConfig:
    fixed = dict(
        output_dir=str(out), use_cpu=True, report_to="none", max_steps=1, learning_rate=0.05,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return InstructionConfig(**{**fixed, **changes})


def trained(family: str, out: Path, train: str = "full", dropout: float = 0.0, **changes):
    """The model after training, its parameters before, and the trainer."""
    arguments = recipe.RecipeArguments(train=train, lora_rank=4, lora_dropout=dropout)
    model = recipe.trainable(TINY[family](), arguments)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    collator = InstructionCollator(tiny_processor(family))
    trainer = Trainer(model, settings(out, **changes), collator, rows())
    trainer.train()
    return model, before, trainer


MOVES = {
    "full": r"language_model|text_model|projector|merger|connector|lm_head",
    "lora": r"(language|text)_model.*\.[qv]_proj\.lora_",
    "projector": r"projector|merger|connector",
}
FROZEN = r"vision_tower|vision_model|visual\.(patch|blocks|merger\.ln_q$)"


@pytest.mark.parametrize("train", sorted(MOVES))
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_the_right_weights_move(family, train, tmp_path):
    changes = {"max_steps": 2, "learning_rate": 0.1}  # LoRA's A moves once its B has
    model, before, _ = trained(family, tmp_path, train, **changes)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n in before if re.search(MOVES[train], n) and not re.search(FROZEN, n)}
    assert moved == wanted and moved


def test_lora_is_that_of_the_paper():
    model = recipe.trainable(tiny_internvl(), recipe.RecipeArguments())
    (config,) = model.peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.05)
    layers = {n.split(".lora_")[0].split(".")[-1] for n in dict(model.named_parameters())
              if "lora_" in n}  # fmt: skip
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", sorted(TINY))
def test_only_the_answers_are_learnt(family):
    """Labels spell the answer and its end; the loss is their mean cross-entropy, by hand."""
    processor, model, given_rows = tiny_processor(family), TINY[family](), rows()
    batch = InstructionCollator(processor)(given_rows)
    for row, labels in zip(given_rows, batch["labels"], strict=True):
        said = processor.tokenizer.decode(labels[labels != -100])
        assert said == row["answer"] + "<|im_end|>"
    end, answers = processor.tokenizer.eos_token_id, []
    with torch.no_grad():
        loss = model(**batch).loss
        scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    for i, row in enumerate(given_rows):
        wanted = processor.tokenizer(row["answer"]).input_ids + [end]
        ids = batch["input_ids"][i].tolist()
        start = max(k for k in range(len(ids)) if ids[k : k + len(wanted)] == wanted)
        answers += [scores[i, start + k - 1, token] for k, token in enumerate(wanted)]
    assert float(loss) == pytest.approx(-float(torch.stack(answers).mean()), abs=1e-5)


@pytest.mark.parametrize("family, train", [("internvl", "full"), ("llava", "lora")])
def test_one_batch_of_eight_equals_eight_of_one(family, train, tmp_path):
    ways = {}
    for size in (8, 1):
        torch.manual_seed(0)  # LoRA's A is drawn
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        model, before, trainer = trained(family, tmp_path, train, **sizes)
        ways[size] = dict(model.named_parameters()), trainer.state.log_history[0]["loss"]
    for name, parameter in ways[8][0].items():
        assert torch.allclose(parameter, ways[1][0][name], atol=2e-6), name
    assert any(not torch.equal(p, before[n]) for n, p in ways[8][0].items())
    assert ways[8][1] == pytest.approx(ways[1][1], abs=2e-3)


@given(
    st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 0.1, 0.25, 0.5, 0.75, 1]),
    st.integers(1, 80), st.integers(0, 3),
)  # fmt: skip
def test_the_ratio_is_exact(positive, negative, share, count, seed):
    polarities = ["positive"] * positive + ["negative"] * negative
    negatives = int(share * count + 0.5)
    if negatives > negative or count - negatives > positive:
        with pytest.raises(ValueError, match=f"{count} rows need"):
            chosen(polarities, share, count, seed)
        return
    numbers = chosen(polarities, share, count, seed)
    assert len(set(numbers)) == count and numbers == sorted(numbers)
    assert sum(n >= positive for n in numbers) == negatives


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.25, 0.5, 0.75]))
def test_without_a_size_as_many_as_the_share_allows(positive, negative, share):
    polarities = ["positive"] * positive + ["negative"] * negative
    sizes = []
    for count in range(1, positive + negative + 1):
        need = int(share * count + 0.5)
        if need <= negative and count - need <= positive:
            sizes.append(count)
    if sizes:
        assert len(chosen(polarities, share, None, 0)) == max(sizes)


def test_ratios_share_their_rows():
    """The positives of a half are among those of no negatives, so that ratios compare."""
    polarities = ["positive", "negative"] * 50
    none, quarter, half = (set(chosen(polarities, s, 40, 3)) for s in (0, 0.25, 0.5))
    assert {n for n in half if n % 2 == 0} < {n for n in quarter if n % 2 == 0} < none
    assert {n for n in quarter if n % 2} < {n for n in half if n % 2}
    assert chosen(polarities, 0.5, 40, 4) != sorted(half)
    assert len(chosen(polarities, None, None, 0)) == 100
    with pytest.raises(ValueError, match="101 rows need"):
        chosen(polarities, None, 101, 0)


def launched(saved, parquet, out, **options):
    """The recipe in this process, with options of the command line."""
    fixed = dict(model=saved, data=parquet, output_dir=out, max_steps=4, save_steps=2,
                 save_total_limit=5, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                 use_cpu="true", disable_tqdm="true")  # fmt: skip
    listed = [f"--{k}={v}" for k, v in {**fixed, **options}.items()]
    return recipe.run(*recipe.parse(["--config", str(CONFIG), *listed]))


def test_resuming_ends_in_the_same_weights(saved, parquet, tmp_path, capsys):
    whole = launched(saved, parquet, tmp_path / "whole", negatives=0.5)
    assert "training on 8 rows, 4 of them negative" in capsys.readouterr().out
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = launched(
        saved, parquet, tmp_path / "again", negatives=0.5, resume_from_checkpoint=checkpoint
    )
    assert [e["step"] for e in resumed.state.log_history] == [
        e["step"] for e in whole.state.log_history
    ]
    after = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, after[name]), name
    other = launched(saved, parquet, tmp_path / "other", negatives=0.5, seed=1)
    assert any(not torch.equal(p, after[n]) for n, p in other.model.named_parameters())


def test_bad_rows_are_listed_before_training(saved, tmp_path, monkeypatch):
    table = rows(8)
    table[1] |= {"answer": " "}
    table[2] |= {"question": None}
    table[4] |= {"polarity": "maybe"}
    table[5] |= {"image": None}
    table[6] |= {"image": {"bytes": b"torn", "path": None}}
    Dataset.from_list(table, features=FEATURES).to_parquet(tmp_path / "bad.parquet")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load_model", stop)
    with pytest.raises(KeyboardInterrupt):
        launched(saved, tmp_path / "bad.parquet", tmp_path / "out")
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    found = {one["row"]: one["reason"] for one in map(json.loads, lines)}
    assert sorted(found) == [1, 2, 4, 5, 6]
    assert found[1] == "the answer is empty" and found[2] == "the question is empty"
    assert found[4].startswith("polarity is 'maybe'") and found[5] == "it has no image"
    assert found[6].startswith("the row cannot be read")


def test_rows_of_no_known_polarity_are_trained_on_without_a_share():
    """As those of LRV's charts."""
    polarities = ["positive", "", "negative", ""]
    assert recipe.problem({**rows(1)[0], "polarity": ""}) is None
    assert chosen(polarities, None, None, 0) == [0, 1, 2, 3]
    assert chosen(polarities, 0.5, None, 0) == [0, 2]


def test_of_a_built_folder_the_config_with_all_rows_is_read(tmp_path):
    for name, count in (("all", 6), ("1-1", 4)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Dataset.from_list(rows(count), features=FEATURES).to_parquet(
            tmp_path / "data" / name / "00000.parquet"
        )
    assert len(recipe.load_instructions(str(tmp_path), "train")) == 6
    assert len(recipe.load_instructions(str(tmp_path / "data" / "1-1"), "train")) == 4


def test_other_rows_are_refused(tmp_path):
    Dataset.from_list([{"image_id": "1", "question": "x"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column answer, image, polarity"):
        recipe.load_instructions(str(tmp_path / "x.parquet"), "train")
    with pytest.raises(ValueError, match="give --data"):
        recipe.load_instructions(None, "train")


def test_every_option_of_the_config_is_explained():
    lines = CONFIG.read_text("utf-8").splitlines()
    for above, line in zip([""] + lines, lines, strict=False):
        assert not re.match(r"\w+:", line) or above.startswith("# "), line
    options, training = recipe.parse(["--config", str(CONFIG), "--learning_rate", "1e-4"])
    assert options.train == "lora" and options.negatives is None
    assert training.learning_rate == 1e-4 and training.gradient_accumulation_steps == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs: 3", "unknown options: epochs"),
        ("train: all", "train is 'all'.*full, lora, projector"),
        ("negatives: 30", "negatives is 30"),
        ("rows: 0", "rows is 0"),
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
