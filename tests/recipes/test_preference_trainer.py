"""SharedImageDPOTrainer against TRL's own: the same losses, metrics, gradients and weights."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PARTIAL, TINY, tiny_image, tiny_processor

from firsthand.modeling.families import family_of, unwrap, vision_layers
from firsthand.recipes.trainers.shared_prefix import additive, pack, unpack

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from firsthand.recipes.trainers.preference import (  # noqa: E402
    SharedImageDPOConfig,
    SharedImageDPOTrainer,
    encoder_trains,
)

ANSWERS = ["a dog top left.", "a cup.", "a dog top left, a cup center, a tree.", "No."]
FEATURES = Features(
    {
        "images": List(Image()),
        **{
            name: List({"role": Value("string"), "content": Value("string")})
            for name in ("prompt", "chosen", "rejected")
        },
    }
)


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def pairs(images=(1, 1, 1, 1)) -> Dataset:
    """Pairs of unequal lengths; `images` says how many each row has."""
    rows = []
    for i, count in enumerate(images):
        question = "What is it?" if i % 2 else "Is there a dog in the image?"
        rows.append(
            {
                "images": [tiny_image(10 * i + k) for k in range(count)],
                "prompt": said("user", question),
                "chosen": said("assistant", ANSWERS[i % 4]),
                "rejected": said("assistant", ANSWERS[(i + 1) % 4]),
            }
        )
    return Dataset.from_list(rows, features=FEATURES)


def lora(target: str = "q_proj|v_proj|down_proj", **changes) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, target_modules=rf".*(language_model|text_model).*\.({target})", **changes
    )


def trainer_of(ours: bool, family: str, out, dataset, adapter=None, ref=False, **changes):
    model = (TINY | PARTIAL)[family]()
    model.requires_grad_(True)
    fixed = dict(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", max_steps=2,
        per_device_train_batch_size=2, learning_rate=0.02, logging_steps=1, seed=1,
        optim="sgd", lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    names = ("share_prefix", "precompute_reference")
    own = {key: changes.pop(key) for key in names if key in changes}
    given = {**fixed, **changes, **(own if ours else {})}
    args = (SharedImageDPOConfig if ours else trl.DPOConfig)(**given)
    cls = SharedImageDPOTrainer if ours else trl.DPOTrainer
    reference = TINY[family]() if ref else None
    processor = tiny_processor(family)
    return cls(
        model, reference, args, train_dataset=dataset, processing_class=processor,
        peft_config=adapter,
    )  # fmt: skip


def trained(*args, **kwargs):
    """The logs, the trained weights and the gradients of the first step."""
    trainer = trainer_of(*args, **kwargs)
    first: dict = {}

    def keep(optimizer, *_):
        if not first:
            names = {id(p): n for n, p in trainer.model.named_parameters()}
            found = [p for group in optimizer.param_groups for p in group["params"]]
            first.update({names[id(p)]: p.grad.clone() for p in found if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return logs, weights, first


SAME = ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected", "entropy",
        "mean_token_accuracy", "logits/chosen")  # fmt: skip


def assert_equal(ours, stock):
    for mine, theirs in zip(ours[0], stock[0], strict=True):
        for key in SAME:
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-5), key
    norm = torch.sqrt(sum((g**2).sum() for g in stock[2].values()))
    assert set(ours[2]) == set(stock[2]) and norm > 0
    apart = torch.sqrt(sum(((ours[2][n] - g) ** 2).sum() for n, g in stock[2].items()))
    assert apart <= 1e-5 * norm
    for name, weight in stock[1].items():
        assert torch.allclose(ours[1][name], weight, atol=1e-5), name


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3", "smolvlm"])
def test_lora_equals_trl(family, tmp_path):
    data = pairs()
    stock = trained(False, family, tmp_path, data, lora())
    assert_equal(trained(True, family, tmp_path, data, lora()), stock)


@pytest.mark.parametrize(
    "changes",
    [
        {"share_prefix": False},
        {"precompute_reference": False},
        {"gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["ipo"]},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ],
    ids=lambda c: "-".join(c),
)
def test_options_equal_trl(changes, tmp_path):
    data = pairs()
    stock = trained(False, "llava", tmp_path, data, lora(), **changes)
    assert_equal(trained(True, "llava", tmp_path, data, lora(), **changes), stock)


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_full_fine_tuning_equals_trl_through_the_encoder(family, precompute, tmp_path):
    """Projector and vision encoder are trained too: the shared encoding keeps its graph."""
    data = pairs()
    stock = trained(False, family, tmp_path, data, ref=True)
    tower = family_of(TINY[family]().config).vision_tower
    assert any(tower in name for name in stock[2])
    ours = trained(True, family, tmp_path, data, ref=True, precompute_reference=precompute)
    assert_equal(ours, stock)


def test_full_fine_tuning_needs_no_reference_model(tmp_path):
    data = pairs()
    stock = trained(False, "llava", tmp_path, data, ref=True)
    assert_equal(trained(True, "llava", tmp_path, data), stock)


def test_several_images_and_rows_without_one(tmp_path):
    for images in ((2, 1, 0, 3), (1, 0, 0, 2)):
        data = pairs(images)
        stock = trained(False, "llava", tmp_path, data, lora())
        assert_equal(trained(True, "llava", tmp_path, data, lora()), stock)


def test_a_projector_that_is_saved_keeps_its_own_reference(tmp_path):
    data = pairs()
    adapter = {"modules_to_save": ["multi_modal_projector"]}
    stock = trained(False, "llava", tmp_path, data, lora(**adapter))
    for precompute in (True, False):
        own = {"precompute_reference": precompute}
        assert_equal(trained(True, "llava", tmp_path, data, lora(**adapter), **own), stock)
    assert any("multi_modal_projector" in name for name in stock[2])


def test_eager_attention_too(tmp_path, monkeypatch):
    def eager(family, build=TINY["llava"]):
        model = build()
        model.set_attn_implementation("eager")
        return model

    monkeypatch.setitem(TINY, "llava", lambda: eager("llava"))
    data = pairs()
    stock = trained(False, "llava", tmp_path, data, lora())
    assert_equal(trained(True, "llava", tmp_path, data, lora()), stock)


def counted(ours: bool, out) -> tuple[int, int]:
    """Images that the vision encoder saw in two steps, and how often a gradient came back to it."""
    trainer = trainer_of(ours, "llava", out, pairs(), lora(), gradient_checkpointing=True)
    tower, seen, backward = unwrap(trainer.model).model.vision_tower, [], []

    def see(module, args, kwargs):
        seen.append(len(args[0] if args else kwargs["pixel_values"]))

    tower.register_forward_pre_hook(see, with_kwargs=True)
    vision_layers(trainer.model)[0].register_full_backward_hook(lambda *_: backward.append(1))
    trainer.train()
    return sum(seen), len(backward)


def test_every_image_is_encoded_once_in_a_step(tmp_path):
    """TRL encodes it four times, and sends gradients back through the frozen encoder."""
    assert counted(True, tmp_path) == (2 * 2, 0)  # 2 pairs a step, 2 steps
    images, backward = counted(False, tmp_path)
    assert images == 4 * 2 * 2 and backward > 0


def test_evaluation_and_the_columns_of_the_reference(tmp_path):
    trainer = trainer_of(True, "internvl", tmp_path, pairs(), lora())
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
    trainer.eval_dataset = trainer.train_dataset
    assert 0 < trainer.evaluate()["eval_loss"] < 5
    assert not encoder_trains(trainer.model)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_5_vl", "mRoPE"),
        ("qwen2_vl", "mRoPE"),
        ("qwen3_vl", "mRoPE"),
        ("gemma3", "window|both directions"),
        ("paligemma", "both directions"),
        ("blip-2", "Q-Former"),
        ("instructblip", "Q-Former"),
    ],
)
def test_families_that_cannot_share_are_refused_before_training(family, reason, tmp_path):
    with pytest.raises(ValueError, match=f"'{family}'.*{reason}.*trl.DPOTrainer"):
        trainer_of(True, family, tmp_path, pairs(), lora())


def test_windows_are_refused(tmp_path, monkeypatch):
    def windowed():
        from tiny_models import tiny_llava

        model = tiny_llava()
        model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
        return model

    monkeypatch.setitem(TINY, "llava", windowed)
    with pytest.raises(ValueError, match="'llava'.*see a window"):
        trainer_of(True, "llava", tmp_path, pairs(), lora())


def test_missing_columns_and_adapters_on_the_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no column prompt"):
        trainer_of(True, "llava", tmp_path, pairs().remove_columns("prompt"), lora())
    with pytest.raises(ValueError, match="lm_head"):
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
        trainer_of(True, "llava", tmp_path, pairs(), adapter)


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        ("lm_head", None, "adapter to `lm_head`"),
        ("q_proj", lora(), "together with a `peft_config`"),
    ],
)
def test_models_with_an_adapter_of_their_own(target, config, message, tmp_path, monkeypatch):
    model = peft.get_peft_model(TINY["llava"](), peft.LoraConfig(r=2, target_modules=[target]))
    model.requires_grad_(True)
    monkeypatch.setitem(TINY, "llava", lambda: model)
    with pytest.raises(ValueError, match=message):
        trainer_of(True, "llava", tmp_path, pairs(), config)


row = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 5), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(row, min_size=1, max_size=4), st.booleans())
def test_packing_round_trips_and_sees_the_right_tokens(shapes, left):
    """Every packed position sees exactly the tokens that it saw in a row of its own."""
    length = max(p + max(c, r) for p, c, r, _ in shapes) + 3
    ids = torch.zeros(2 * len(shapes), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (p, c, r, pad) in enumerate(shapes):
        for where, own, base in ((i, c, 100), (len(shapes) + i, r, 200)):
            start = min(pad, length - p - own) if left else 0
            tokens = torch.tensor([*range(1, p + 1), *range(base, base + own)])
            ids[where, start : start + p + own] = tokens
            mask[where, start : start + p + own] = 1
            labels[where, start + p : start + p + own] = tokens[p:]
    packed = pack(ids, mask, labels, 0)
    for i, (p, c, r, _) in enumerate(shapes):
        if not c and not r:
            continue
        for own, start, base in ((c, p, 100), (r, p + c + 1, 200)):
            for t in range(own):
                seen = packed.input_ids[i][packed.mask[i, 0, start + t]].tolist()
                assert sorted(seen) == [*range(1, p + 1), *range(base, base + t + 1)]
                assert packed.position_ids[i, start + t] == p + t
    values = packed.shift_labels.float()
    flat = unpack(values, packed, length)
    answers = [(c, 100) for _, c, _, _ in shapes] + [(r, 200) for _, _, r, _ in shapes]
    for where, (own, base) in enumerate(answers):
        found = flat[where][flat[where] > 0].tolist()
        assert found == [float(x) for x in range(base, base + own)]


def test_a_pair_with_two_prompts_is_refused():
    ids = torch.tensor([[1, 2, 9], [1, 3, 8]])
    labels = torch.tensor([[-100, -100, 9], [-100, -100, 8]])
    with pytest.raises(ValueError, match="do not start with the same prompt"):
        pack(ids, torch.ones_like(ids), labels, 0)


def test_additive_masks():
    mask = additive(torch.tensor([[True, False]]), torch.float32)
    assert mask[0, 0] == 0 and mask[0, 1] == torch.finfo(torch.float32).min
    assert np.isfinite(mask.numpy()).all()
