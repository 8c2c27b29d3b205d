"""What successors add to DPO, against slow textbook forwards: the same loss and gradients."""

import ast
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, List, Value
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.processing.corruptions import corrupt, diffuse

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from trl.data_utils import apply_chat_template, prepare_multimodal_messages  # noqa: E402

from firsthand.modeling.families import unwrap, vision_layers  # noqa: E402
from firsthand.recipes.trainers import image_preference as terms  # noqa: E402
from firsthand.recipes.trainers.preference import (  # noqa: E402
    SharedImageDPOConfig,
    SharedImageDPOTrainer,
)

TURNS = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features({"images": List(Image()), "prompt": TURNS, "chosen": TURNS, "rejected": TURNS})
ANSWERS = ["a dog top left.", "a cup.", "a dog top left, a cup center, a tree.", "No."]
BETA = 0.3
LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def pairs(images=(1, 2, 0), weights=None) -> Dataset:
    rows = [
        {
            "images": [tiny_image(10 * i + k) for k in range(count)],
            "prompt": said("user", "What is it?" if i % 2 else "Is there a dog in the image?"),
            "chosen": said("assistant", ANSWERS[i % 4]),
            "rejected": said("assistant", ANSWERS[(i + 1) % 4]),
        }
        for i, count in enumerate(images)
    ]
    found = Dataset.from_list(rows, features=FEATURES)
    return found if weights is None else found.add_column("weight", list(weights))


def lora(targets=("q_proj", "v_proj", "down_proj")) -> peft.LoraConfig:
    """On the language model, and not at zero: the policy is not the reference."""
    pattern = rf".*(language_model|text_model).*\.({'|'.join(targets)})"
    return peft.LoraConfig(r=4, target_modules=pattern, init_lora_weights=False)


def trainer_of(out, dataset, family="llava", full=False, stock=False, **options):
    """A trainer whose policy is not its reference: LoRA at random, or another model."""
    fixed = dict(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, seed=1,
        gradient_checkpointing=False, max_length=None, beta=BETA, per_device_train_batch_size=3,
    )  # fmt: skip
    config, cls = (
        (trl.DPOConfig, trl.DPOTrainer) if stock else (SharedImageDPOConfig, SharedImageDPOTrainer)
    )
    model = TINY[family]().requires_grad_(True)
    return cls(
        model, TINY[family](seed=1) if full else None, config(**{**fixed, **options}),
        train_dataset=dataset, processing_class=tiny_processor(family),
        peft_config=None if full else lora(),
    )  # fmt: skip


def batch_of(trainer, numbers=None):
    numbers = range(len(trainer.train_dataset)) if numbers is None else numbers
    trainer._set_signature_columns_if_needed()
    keep = set(trainer._signature_columns)
    rows = [trainer.train_dataset[i] for i in numbers]
    return trainer.data_collator([{k: v for k, v in row.items() if k in keep} for row in rows])


def loss_of(trainer, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A batch's loss and its gradients by name."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def logp(model, processor, row, images, answer, noise=None) -> torch.Tensor:
    """The textbook: one row through the stock forward, the answer's log-probabilities summed."""
    example = {"prompt": row["prompt"], "chosen": row[answer], "rejected": row[answer]}
    example = {name: prepare_multimodal_messages(turns) for name, turns in example.items()}
    example["prompt"] = prepare_multimodal_messages(row["prompt"], images=images)
    text = apply_chat_template(example, processor)
    plain = dict(return_tensors="pt", add_special_tokens=False)
    inputs = processor(images=[images] if images else None, text=[text["prompt"]], **plain)
    ids = processor.tokenizer(text["chosen"], **plain)["input_ids"]
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if noise is not None and images:
        inputs["pixel_values"] = diffuse(inputs["pixel_values"], noise)
    logits = model(**inputs).logits[0, start - 1 : -1]
    return F.log_softmax(logits, -1).gather(1, ids[0][:, None]).sum()


class Textbook:
    """Policy and reference as stock models, asked one answer at a time."""

    def __init__(self, trainer, family, full):
        self.rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        self.trainer, self.full, self.processor = trainer, full, tiny_processor(family)
        model = TINY[family]().requires_grad_(True)
        self.policy = model if full else peft.get_peft_model(model, lora())
        self.policy.load_state_dict(trainer.model.state_dict())
        self.reference = TINY[family](seed=1) if full else None

    def delta(self, row, answer, images, noise=None):
        asked = (self.processor, row, images, answer, noise)
        return logp(self.policy, *asked) - self.said(row, answer, images, noise)

    @torch.no_grad()
    def said(self, row, answer, images, noise=None):
        """What the reference says."""
        if self.full:
            return logp(self.reference, self.processor, row, images, answer, noise)
        with self.policy.disable_adapter():
            return logp(self.policy, self.processor, row, images, answer, noise)

    def gradients(self, loss):
        self.policy.zero_grad()
        loss.backward()
        named = self.policy.named_parameters()
        return {n: p.grad for n, p in named if p.grad is not None}


def assert_same(found, expected, gradients, expected_gradients):
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    norm = torch.sqrt(sum((g**2).sum() for g in expected_gradients.values()))
    assert set(gradients) == set(expected_gradients) and norm > 0
    apart = sum(((gradients[n] - g) ** 2).sum() for n, g in expected_gradients.items())
    assert torch.sqrt(apart) <= 1e-5 * norm


def expected_loss(book, options, weights=None):
    """Sigmoid DPO and the terms, written down once more."""
    image, anchor = options.get("image_preference_weight", 0), options.get("anchor_weight", 0)
    gamma, shift = options.get("image_reference_weight", 1), options.get("anchor_delta", 0)
    total, parts = 0, {"image_preference": 0, "anchor": 0}
    for i, row in enumerate(book.rows):
        chosen, rejected = (book.delta(row, a, row["images"]) for a in ("chosen", "rejected"))
        owed = 0
        if gamma != 1:
            owed = sum(
                sign * (book.said(row, a, row["images"]) - book.said(row, a, []))
                for a, sign in (("chosen", 1), ("rejected", -1))
            )
        loss = -F.logsigmoid(BETA * (chosen - rejected + (gamma - 1) * owed))
        if anchor:
            one = -F.logsigmoid(BETA * chosen - shift)
            if options.get("anchor_rejected"):
                one = one - F.logsigmoid(shift - BETA * rejected)
            loss, parts["anchor"] = loss + anchor * one, parts["anchor"] + one.item()
        if image and row["images"]:
            pictures = book.trainer.data_collator.corrupted(row)
            noise = 0 if options["corruption"] == "diffusion" else None
            one = -F.logsigmoid(BETA * (chosen - book.delta(row, "chosen", pictures, noise)))
            loss = loss + image * one
            parts["image_preference"] += one.item()
        total = total + (1 if weights is None else weights[i]) * loss
    count = len(book.rows)
    return total / count, {name: value / count for name, value in parts.items()}


def assert_textbook(out, options, family="llava", full=False, weights=None, images=(1, 2, 0)):
    trainer = trainer_of(out, pairs(images, weights), family, full, **options)
    book = Textbook(trainer, family, full)
    expected, parts = expected_loss(book, options, weights)
    found, gradients = loss_of(trainer, batch_of(trainer))
    assert_same(found, expected, gradients, book.gradients(expected))
    for name, value in parts.items():
        if options.get(f"{name}_weight"):
            assert trainer._metrics["train"][name] == [pytest.approx(value, rel=1e-5)]
        else:
            assert name not in trainer._metrics["train"]
    return trainer


@pytest.mark.parametrize("corruption", ["crop", "diffusion", "mask", "other", "blank"])
def test_image_preference_is_the_textbooks(corruption, tmp_path):
    options = {"image_preference_weight": 0.7, "corruption": corruption}
    trainer = assert_textbook(tmp_path, options)
    assert "ref_corrupted_logps" in trainer.train_dataset.column_names


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_image_preference_in_other_families(family, tmp_path):
    for corruption in ("crop", "diffusion"):
        options = {"image_preference_weight": 1.0, "corruption": corruption}
        assert_textbook(tmp_path, options, family)


ALL = {
    "image_preference_weight": 0.5, "corruption": "mask", "anchor_weight": 0.3,
    "anchor_delta": 0.4, "anchor_rejected": True,
}  # fmt: skip


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_all_terms_with_both_references(full, precompute, tmp_path):
    trainer = assert_textbook(tmp_path, ALL | {"precompute_reference": precompute}, full=full)
    assert ("ref_corrupted_logps" in trainer.train_dataset.column_names) == precompute


def test_terms_without_a_shared_prefix_and_with_recomputed_activations(tmp_path):
    assert_textbook(tmp_path, ALL | {"share_prefix": False})
    assert_textbook(tmp_path, ALL | {"gradient_checkpointing": True})


def test_the_anchor_alone_asks_for_no_corrupted_image(tmp_path):
    trainer = assert_textbook(tmp_path, {"anchor_weight": 1.0})
    assert trainer.data_collator.images == "shown"


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("gamma", [0.0, 0.75])
def test_the_image_weighted_reference_is_the_textbooks(gamma, full, tmp_path):
    trainer = assert_textbook(tmp_path, {"image_reference_weight": gamma}, full=full)
    text = trainer.train_dataset[2]  # no image: nothing to weigh
    assert text["ref_bare_chosen_logps"] == pytest.approx(text["ref_chosen_logps"], abs=1e-5)


def test_an_answer_that_owes_more_to_the_image_has_a_more_likely_reference():
    with_image, without = torch.tensor([-2.0]), torch.tensor([-5.0])
    assert terms.image_weighted(with_image, without, 0.75).item() == pytest.approx(-1.25)
    assert torch.equal(terms.image_weighted(with_image, without, 1), with_image)


def test_everything_at_once(tmp_path):
    assert_textbook(tmp_path, ALL | {"image_reference_weight": 0.5}, weights=[0.5, 2.0, 0.0])


def test_text_alone_has_no_image_term(tmp_path):
    assert_textbook(tmp_path, ALL, images=(0, 0))


def test_prompts_of_content_blocks_lose_their_images_too(tmp_path):
    blocks = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    row = pairs((1,))[0] | {"prompt": [{"role": "user", "content": blocks}]}
    trainer = trainer_of(tmp_path, pairs((1, 1)), image_reference_weight=0.5)
    plain = pairs((1, 1))[1] | {"images": []}
    bare = replace(trainer.data_collator, images="none")
    plain |= {"chosen": row["chosen"], "rejected": row["rejected"]}
    assert torch.equal(bare([row])["input_ids"], bare([plain])["input_ids"])


def test_off_is_bit_identical_to_the_loss_without_options(tmp_path):
    """A weight of one, and options at their defaults, change no bit."""
    plain = trainer_of(tmp_path, pairs())
    off = trainer_of(
        tmp_path, pairs(), image_preference_weight=0.0, corruption="blank", anchor_weight=0.0,
        anchor_delta=3.0, anchor_rejected=True, image_reference_weight=1.0,
    )  # fmt: skip
    ones = trainer_of(tmp_path, pairs(weights=[1.0, 1.0, 1.0]))
    found = [loss_of(one, batch_of(one)) for one in (plain, off, ones)]
    assert set(batch_of(off)) == set(batch_of(plain))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(gradients[n], g) for n, g in found[0][1].items())


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and TRL's trainer of one policy; losses are switched in them."""
    out = tmp_path_factory.mktemp("both")
    return [
        trainer_of(out, pairs((1, 2, 0, 1)), stock=stock, label_smoothing=0.1)
        for stock in (False, True)
    ]


def test_the_losses_are_all_that_trl_has(both):
    both[1].loss_types, both[1].loss_weights = ["nope"], [1.0]
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        loss_of(both[1], batch_of(both[1]))
    text = str(caught.value)
    assert ast.literal_eval(text[text.index("[") : text.index("]") + 1]) == LOSSES


@pytest.mark.parametrize("losses", [*([one] for one in LOSSES), ["sigmoid", "sft"]], ids="+".join)
def test_every_loss_of_trl_is_the_same_with_shared_images(losses, both):
    found = []
    for trainer in both:
        trainer.loss_types, trainer.loss_weights = losses, [0.8, 0.3][: len(losses)]
        found.append(loss_of(trainer, batch_of(trainer)))
    (loss, gradients), (expected, expected_gradients) = found
    assert_same(loss, expected, gradients, expected_gradients)


@pytest.mark.parametrize("losses", [*([one] for one in LOSSES), ["sigmoid", "ipo"]], ids="+".join)
def test_weights_of_pairs_multiply_their_loss_or_are_refused(losses, both, tmp_path):
    """sum(w l) / B, with every l from TRL's trainer on that pair alone."""
    weights = [0.3, 2.0, 0.0, 1.5]
    options = dict(loss_type=losses, loss_weights=[0.8, 0.3][: len(losses)], label_smoothing=0.1)
    if set(losses) & set(terms.NOT_BY_PAIR):
        with pytest.raises(ValueError, match=f"`weight`.*{losses[0]!r} is no mean over pairs"):
            trainer_of(tmp_path, pairs((1, 2, 0, 1), weights), **options)
        return
    ours = trainer_of(tmp_path, pairs((1, 2, 0, 1), weights), **options)
    stock = both[1]
    stock.loss_types, stock.loss_weights = losses, options["loss_weights"]
    singles = [loss_of(stock, batch_of(stock, [i])) for i in range(4)]
    expected = sum(w * loss for w, (loss, _) in zip(weights, singles, strict=True)) / 4
    wanted = {
        n: sum(w * g[n] for w, (_, g) in zip(weights, singles, strict=True)) / 4
        for n in singles[0][1]
    }
    found, gradients = loss_of(ours, batch_of(ours))
    assert_same(found, expected, gradients, wanted)


def test_weights_go_with_trls_own(tmp_path):
    weights = [0.3, 2.0, 1.0]
    ours = trainer_of(tmp_path, pairs(weights=weights), use_weighting=True)
    stock = trainer_of(tmp_path, pairs(), stock=True, use_weighting=True)
    singles = [loss_of(stock, batch_of(stock, [i])) for i in range(3)]
    expected = sum(w * loss for w, (loss, _) in zip(weights, singles, strict=True)) / 3
    assert loss_of(ours, batch_of(ours))[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_corrupted_images_are_the_same_each_time_and_in_every_batch(tmp_path):
    for corruption in ("crop", "mask", "other", "diffusion"):
        options = {"image_preference_weight": 1.0, "corruption": corruption}
        trainer = trainer_of(tmp_path, pairs((1, 1, 1, 1)), **options)
        batch, alone = batch_of(trainer), batch_of(trainer, [2])
        seen = batch["corrupted_pixel_values"]
        assert torch.equal(seen, batch_of(trainer)["corrupted_pixel_values"])
        assert torch.equal(seen[2:3], alone["corrupted_pixel_values"])
        assert not torch.equal(seen, batch["pixel_values"])
        options |= {"corruption_seed": 1}
        again = batch_of(trainer_of(tmp_path, pairs((1, 1, 1, 1)), **options))
        assert not torch.equal(again["corrupted_pixel_values"], seen)


def test_another_image_is_another_rows(tmp_path):
    data = pairs((1, 1, 1))
    options = {"image_preference_weight": 1.0, "corruption": "other"}
    collator = trainer_of(tmp_path, data, **options).data_collator
    for row in data:
        own, shown = row["images"][0], collator.corrupted(row)[0]
        others = [r["images"][0] for r in data if r["images"][0].tobytes() != own.tobytes()]
        assert shown.tobytes() in [corrupt(own, "other", other=o).tobytes() for o in others]
    with pytest.raises(ValueError, match="needs rows with different images"):
        trainer_of(tmp_path, pairs((1,)), **options)


def test_the_corrupted_branch_sends_no_gradient_through_a_frozen_encoder(tmp_path):
    """And encodes every image, shown or corrupted, once, the reference's too."""
    options = ALL | {"gradient_checkpointing": True, "precompute_reference": False}
    trainer = trainer_of(tmp_path, pairs((1, 1, 1)), **options)
    tower, seen, backward = unwrap(trainer.model).model.vision_tower, [], []
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    vision_layers(trainer.model)[0].register_full_backward_hook(lambda *_: backward.append(1))
    loss_of(trainer, batch_of(trainer))
    assert sum(seen) == 6 and not backward


def test_training_and_evaluation_log_the_terms(tmp_path):
    options = ALL | {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    trainer = trainer_of(tmp_path, pairs(weights=[1.0, 2.0, 0.5]), **options)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["image_preference"] > 0 for entry in logs)
    assert logs[0]["anchor"] != logs[1]["anchor"]
    found = trainer.evaluate()
    assert found["eval_image_preference"] > 0 and found["eval_anchor"] > 0


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "terms"])
def test_rows_that_the_reference_did_not_see_before(options, tmp_path):
    """LoRA asks it then; in full fine-tuning it is gone, and that is said."""
    data = pairs((1, 1, 1))
    trainer = trainer_of(tmp_path, data, **options)
    expected, _ = loss_of(trainer, batch_of(trainer))
    trainer.model.eval()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    args = trainer.args
    given = dict(train_dataset=data, processing_class=tiny_processor("llava"))
    full = SharedImageDPOTrainer(TINY["llava"](), args=args, **given)
    with pytest.raises(ValueError, match="the reference was asked before training and is gone"):
        full.evaluate(data)
    weighted = trainer_of(tmp_path, data, image_reference_weight=0.5)
    with pytest.raises(ValueError, match="what the reference says without images"):
        weighted.evaluate(data)


def test_the_references_columns_follow_the_options(tmp_path):
    """Columns that are cached for one corruption or length are not taken for another."""
    path = tmp_path / "rows.parquet"
    pairs((1, 1, 1)).to_parquet(path)

    def column(name="ref_corrupted_logps", **options):
        data = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        options = {"image_preference_weight": 1.0, "corruption": "crop"} | options
        return list(trainer_of(tmp_path, data, **options).train_dataset[name])

    assert column() == column()
    assert column() != column(corruption_seed=1) and column() != column(corruption="blank")
    assert column("ref_chosen_logps") != column("ref_chosen_logps", max_length=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_preference_weight": 1.0, "ld_alpha": 0.5}, "ld_alpha exclude each other"),
        ({"image_reference_weight": 0.5, "precompute_reference": False}, "set precompute_ref"),
        ({"sync_ref_model": True}, "unset precompute_reference"),
        ({"corruption": "swirl"}, "'swirl'.*crop, diffusion"),
        ({"anchor_weight": -1.0}, "anchor_weight is -1.0"),
    ],
)
def test_options_that_cannot_be_followed(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, pairs(), **options)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), None])
def test_weights_that_are_none_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="row 1 has the weight.*at least 0"):
        trainer_of(tmp_path, pairs(weights=[1.0, bad, 1.0]))


def test_arguments_of_the_wrong_kind(tmp_path):
    model, data = TINY["llava"](), pairs()
    given = dict(train_dataset=data, processing_class=tiny_processor("llava"))
    with pytest.raises(TypeError, match="args is a DPOConfig; it must be a SharedImageDPOConfig"):
        SharedImageDPOTrainer(model, args=trl.DPOConfig(str(tmp_path), use_cpu=True), **given)
    with pytest.raises(ValueError, match="the trainer's own data_collator"):
        SharedImageDPOTrainer(
            model, args=SharedImageDPOConfig(str(tmp_path), use_cpu=True), data_collator=list,
            **given,
        )  # fmt: skip


def test_model_and_processor_are_loaded_by_name(tmp_path):
    TINY["internvl"]().save_pretrained(tmp_path)
    tiny_processor("internvl").save_pretrained(tmp_path)
    args = SharedImageDPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None
    )
    trainer = SharedImageDPOTrainer(str(tmp_path), args=args, train_dataset=pairs((1,)))
    loss, _ = loss_of(trainer, batch_of(trainer))
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)


def test_text_only_data_has_no_place_for_them(tmp_path):
    data = pairs((0, 0)).remove_columns("images")
    with pytest.raises(ValueError, match="anchor_weight needs rows with a column image"):
        trainer_of(tmp_path, data, anchor_weight=1.0)
