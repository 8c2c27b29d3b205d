"""Train the demo model's projector and LoRA on composed scenes.

What it is: the whole recipe behind `recipes/demo_adapter`: features of the frozen vision encoder
are computed once and cached, the projector starts from a closed-form solution, then projector and
LoRA learn short answers first and captions after. What it is not: instruction tuning on
photographs.

    accelerate launch recipes/train_demo_model.py --scenes scenes --out demo_adapter
    accelerate launch recipes/train_demo_model.py --scenes scenes --out demo_adapter --resume
    accelerate launch recipes/train_demo_model.py --scenes more_scenes --start demo_adapter \
        --out demo_adapter2 --yes_no_weight 1 --caption_weight 2 --lora_lr 6e-4 --steps 360

Every scene is one packed sequence: the image prefix once, then each question with its answer as a
branch that sees the prefix and itself only, at the positions that it would have alone. So each
answer is learnt as the first one of a conversation, and the image is paid for once.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from firsthand.datasets_scripts.scenes import scenes
from firsthand.recipes import demo_model

LIST_QUESTION = "List the objects."
COVERAGE = 0.12  # share of an image token's area from which an object names the token
RANK = 90  # of the closed-form map: the nouns' embeddings span fewer dimensions
RIDGE = 300.0
WARM_EPOCHS, WARM_LR, WARM_DROPOUT = 8, 3e-4, 0.2
SHORT_SHARE = 0.15  # of the steps, at the start, without captions
VALIDATION_SCENES = 96
IGNORE = -100


def cache_features(model: Any, processor: Any, rows: Any, file: Path, batch: int = 16) -> Any:
    """Projector inputs of every scene, float16 [n, 16, 6144], memory-mapped; made once."""
    shape = (len(rows), demo_model.IMAGE_TOKENS, 384 * 16)
    if not file.exists():
        aside = file.with_suffix(".aside")
        out = np.lib.format.open_memmap(aside, "w+", np.float16, shape)
        for i in tqdm(range(0, len(rows), batch), desc="encoding images", unit="batch"):
            images = [im.convert("RGB") for im in rows[i : i + batch]["image"]]
            pixels = processor.image_processor(images, return_tensors="pt").pixel_values
            with torch.inference_mode():
                out[i : i + batch] = demo_model.patch_features(model, pixels.bfloat16()).float()
        out.flush()
        aside.rename(file)
    return np.load(file, mmap_mode="r")


def token_nouns(objects: list[dict[str, Any]]) -> list[str | None]:
    """For each of the 16 image tokens the noun that covers most of it, None for background."""
    from pycocotools import mask as coco_mask

    best = np.full((4, 4), COVERAGE)
    nouns: list[list[str | None]] = [[None] * 4 for _ in range(4)]
    for o in objects:
        mask = coco_mask.decode({**o["mask"], "counts": o["mask"]["counts"].encode()})
        share = mask.reshape(4, 56, 4, 56).mean((1, 3))
        for r, c in zip(*np.nonzero(share > best), strict=True):
            best[r, c], nouns[r][c] = share[r, c], o["noun"]
    return [n for row in nouns for n in row]


def noun_embeddings(model: Any, tokenizer: Any) -> dict[str | None, Tensor]:
    """Mean input embedding of each noun's tokens; a line break's for background (key None)."""
    table = model.get_input_embeddings().weight.detach().float()

    def mean(text: str) -> Tensor:
        return table[tokenizer(text, add_special_tokens=False).input_ids].mean(0)

    return {**{n: mean(" " + n) for n in scenes.NOUNS}, None: mean("\n")}


def ridge(features: Any, targets: Tensor, penalty: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form map of normalised token features [n, 16, F] to targets [n, 16, D].

    Returns (weight [F, D], feature mean [F], target mean [D]); accumulates in chunks.
    """
    width, out = features.shape[-1], targets.shape[-1]
    gram, cross = torch.zeros(width, width), torch.zeros(width, out)
    total, mean_x, mean_y = 0, torch.zeros(width), targets.reshape(-1, out).mean(0)
    for i in tqdm(range(0, len(features), 256), desc="closed-form projector", unit="chunk"):
        x = normalised(features[i : i + 256])
        y = targets[i : i + 256].reshape(-1, out) - mean_y
        gram += x.T @ x
        cross += x.T @ y
        mean_x += x.sum(0)
        total += len(x)
    mean_x /= total
    gram -= total * torch.outer(mean_x, mean_x)
    return torch.linalg.solve(gram + penalty * torch.eye(width), cross), mean_x, mean_y


def normalised(features: Any) -> Tensor:
    """The projector's layer norm without its affine part, flattened to [n * 16, F] in fp32."""
    x = torch.from_numpy(np.array(features, dtype=np.float32)).flatten(0, 1)
    return nn.functional.layer_norm(x, x.shape[-1:])


@torch.no_grad()
def start_projector(projector: Any, weight: Tensor, mean_x: Tensor, mean_y: Tensor) -> None:
    """Put a linear map into linear -> GELU -> linear exactly: gelu(a) - gelu(-a) = a.

    The map's rank (RANK) takes 2 * RANK hidden units in opposite pairs; the other units start
    random with no effect on the output, free to learn.
    """
    u, s, v = torch.svd_lowrank(weight, RANK + 10, niter=4)
    down, up = (u * s.sqrt())[:, :RANK], (v * s.sqrt())[:, :RANK]
    first, second = projector.linear_1, projector.linear_2
    nn.init.normal_(first.weight, std=first.in_features**-0.5)
    nn.init.zeros_(first.bias)
    nn.init.zeros_(second.weight)
    scale = 4.0  # keeps the pairs where GELU bends, so that they stay trainable
    pair = torch.cat([down.T, -down.T]) * scale
    first.weight[: 2 * RANK] = pair
    first.bias[: 2 * RANK] = -(pair @ mean_x)
    second.weight[:, : 2 * RANK] = torch.cat([up, -up], 1) / scale
    second.bias.copy_(mean_y)


def warm_up(
    projector: Any, features: Any, labels: Tensor, table: Tensor, seed: int, epochs: int
) -> None:
    """Teach the projector alone which noun each image token shows, without the language model.

    Cross-entropy of the projected token against the nouns' input embeddings (`table` [K, D]; logits
    are -squared distance / 2, doubled), plus the squared distance to the right one. `labels` [n,
    16] index the table.
    """
    optimizer = torch.optim.AdamW(projector.parameters(), lr=WARM_LR, weight_decay=0.05)
    batch, steps = 32, epochs * (len(features) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, WARM_LR, total_steps=steps + 1)
    rng = np.random.default_rng(seed)
    bar = tqdm(total=steps, desc="projector warm-up", unit="step")
    for _ in range(epochs):
        order = rng.permutation(len(features))
        for i in range(0, len(order) - batch + 1, batch):
            chosen = np.sort(order[i : i + batch])
            x = torch.from_numpy(features[chosen].astype(np.float32))
            out = projector(nn.functional.dropout(x, WARM_DROPOUT))
            wanted = labels[torch.from_numpy(chosen)]
            logits = 2 * (out @ table.T - table.square().sum(1) / 2)
            distance = (out - table[wanted]).square().sum(-1).mean()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            (loss + distance / 14).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
    bar.close()


def turns(row: dict[str, Any], rng: random.Random, captions: bool) -> list[tuple[str, str]]:
    """The questions and answers of one scene for one step; every answer stands alone."""
    objects = row["objects"]
    listed = ", ".join(o["noun"] for o in objects) + "."
    asked = [(LIST_QUESTION, listed)]
    by_task: dict[str, list[tuple[str, str]]] = {}
    for q in row["questions"]:
        by_task.setdefault(q["task"], []).append((q["question"], q["answer"]))
    yes = [t for t in by_task["existence"] if t[1] == "Yes."]
    no = [t for t in by_task["existence"] if t[1] == "No."]
    count = min(3, len(yes), len(no))
    asked += rng.sample(yes, count) + rng.sample(no, count)
    asked += rng.sample(by_task["position"], 1) + rng.sample(by_task["counting"], 1)
    if "attribute" in by_task:
        asked += rng.sample(by_task["attribute"], 1)
    if captions:
        asked += [(scenes.CAPTION_QUESTION, row["caption"])]
    return asked


class Packer:
    """Scenes -> packed batches (see the module's docstring)."""

    def __init__(
        self,
        processor: Any,
        seed: int = 0,
        yes_no_weight: float = 3.0,
        caption_weight: float = 1.0,
    ) -> None:
        self.tokenizer, self.seed = processor.tokenizer, seed
        self.yes_no_weight, self.caption_weight = yes_no_weight, caption_weight
        self.prefix = self._ids(
            "<|im_start|>user\n" + demo_model.IMAGE_TOKEN * demo_model.IMAGE_TOKENS + "\n"
        )
        self.decisive = {self._ids("Yes")[0], self._ids("No")[0]}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pack(self, asked: list[tuple[str, str]]) -> dict[str, list]:
        """ids, positions, labels, weights and branch numbers (0 = prefix) of one scene."""
        start = len(self.prefix)
        row: dict[str, list] = {
            "ids": list(self.prefix),
            "positions": list(range(start)),
            "labels": [IGNORE] * start,
            "weights": [0.0] * start,
            "branches": [0] * start,
        }
        for branch, (question, answer) in enumerate(asked, 1):
            ask = self._ids(question + "<|im_end|>\n<|im_start|>assistant\n")
            say = self._ids(answer + "<|im_end|>")
            decisive = say[0] in self.decisive and len(say) <= 3
            weight = self.caption_weight if question == scenes.CAPTION_QUESTION else 1.0
            weights = [self.yes_no_weight if decisive else weight] + [weight] * (len(say) - 1)
            row["ids"] += ask + say
            row["positions"] += range(start, start + len(ask) + len(say))
            row["labels"] += [IGNORE] * len(ask) + say
            row["weights"] += [0.0] * len(ask) + weights
            row["branches"] += [branch] * (len(ask) + len(say))
        return row

    def batch(self, rows: list[dict[str, list]]) -> dict[str, Tensor]:
        """Pad on the right; the mask [B, 1, T, T] is True where a token may look."""
        longest = max(len(r["ids"]) for r in rows)
        pads = {"ids": 2, "positions": 0, "labels": IGNORE, "weights": 0.0, "branches": -1}
        out = {
            name: torch.tensor([r[name] + [pad] * (longest - len(r[name])) for r in rows])
            for name, pad in pads.items()
        }
        branch = out.pop("branches")
        same = branch[:, :, None] == branch[:, None, :]
        prefix = (branch == 0)[:, None, :] & (branch >= 0)[:, :, None]
        order = torch.ones(longest, longest, dtype=torch.bool).tril()
        out["mask"] = ((same | prefix) & order)[:, None]
        return out


class PackedScenes(torch.utils.data.Dataset):
    """The run's visits in order: visit i packs one scene with a draw of questions of its own.

    The first `short` visits have no captions.
    """

    def __init__(
        self, rows: list[dict], features: Any, packer: Packer, visits: int, short: float
    ) -> None:
        self.rows, self.features, self.packer = rows, features, packer
        self.visits, self.short = visits, short
        generator = np.random.default_rng(packer.seed)
        epochs = [generator.permutation(len(rows)) for _ in range(visits // len(rows) + 1)]
        self.order = np.concatenate(epochs)[:visits]

    def __len__(self) -> int:
        return self.visits

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = int(self.order[number])
        rng = random.Random(f"{self.packer.seed}/{number}")
        asked = turns(self.rows[index], rng, captions=number >= self.short)
        return {**self.packer.pack(asked), "features": np.array(self.features[index])}


def collate(packer: Packer, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A packed batch with the scenes' features, fp32 [B, 16, 6144]."""
    features = torch.from_numpy(np.stack([r["features"] for r in rows])).float()
    return {**packer.batch(rows), "features": features}


def packed_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] in fp32, labels [N] and weights [N] of a packed batch's N answer tokens."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    whole = model.get_base_model()
    image = whole.model.multi_modal_projector(batch["features"])
    hidden = whole.model(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image)},
        use_cache=False,
    ).last_hidden_state[:, :-1]
    wanted = batch["labels"][:, 1:] != IGNORE
    logits = nn.functional.linear(hidden[wanted], whole.lm_head.weight).float()
    return logits, batch["labels"][:, 1:][wanted], batch["weights"][:, 1:][wanted]


def trainable_model(model: Any, adapter_folder: Path | None = None) -> Any:
    """Frozen bf16 weights, LoRA on the decoder's attention and a projector in fp32."""
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    model = model.to(torch.bfloat16)
    wrapped: Any
    if adapter_folder is None:
        wrapped = get_peft_model(model, adapter)
    else:
        wrapped = PeftModel.from_pretrained(model, str(adapter_folder), is_trainable=True)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def make_trainer(
    model: Any, packer: Packer, train: Any, validation: Any, args: Any, settings: Any
) -> Any:
    """A transformers Trainer over packed scenes: resumable, logged, the visits in order."""
    from transformers import Trainer, TrainerCallback

    class PackedTrainer(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(train)

        def compute_loss(
            self,
            model: Any,
            inputs: dict,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            logits, labels, weights = packed_logits(model, inputs)
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return (losses * weights).sum() / weights.sum()

        def create_optimizer(self, *_: Any) -> Any:
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if "projector" in n], "lr": settings.projector_lr},
                {"params": [p for n, p in named if "projector" not in n], "lr": settings.lora_lr},
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            return self.optimizer

    class Validate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step % settings.validate_every == 0:
                scores = validate(kw["model"], packer, validation)
                trainer.log({f"validation_{k}": v for k, v in scores.items()})

    trainer = PackedTrainer(
        model=model,
        args=args,
        train_dataset=train,
        data_collator=lambda rows: collate(packer, rows),
        callbacks=[Validate()],
    )
    return trainer


@torch.inference_mode()
def validate(model: Any, packer: Packer, scenes_: PackedScenes) -> dict[str, float]:
    """Teacher-forced accuracy 0..1 of all answer tokens, and of the deciding yes or no alone."""
    model.eval()
    right, decided = [], []
    for i in range(0, len(scenes_), 16):
        rows = [scenes_[j] for j in range(i, min(i + 16, len(scenes_)))]
        logits, labels, _ = packed_logits(model, collate(packer, rows))
        hit = (logits.argmax(-1) == labels).float()
        right.append(hit)
        decided.append(hit[decisive(packer, labels)])
    model.train()
    return {
        "token_accuracy": torch.cat(right).mean().item(),
        "existence_accuracy": torch.cat(decided).mean().item(),
    }


def decisive(packer: Packer, labels: Tensor) -> Tensor:
    """True at the tokens that are a yes or a no."""
    return torch.isin(labels, torch.tensor(sorted(packer.decisive), device=labels.device))


def start(model: Any, processor: Any, features: Any, rows: list[dict], seed: int) -> None:
    """The projector's closed-form solution and warm-up."""
    table = noun_embeddings(model, processor.tokenizer)
    names, embeddings = list(table), torch.stack(list(table.values()))
    labels = torch.tensor([[names.index(n) for n in token_nouns(r["objects"])] for r in rows])
    projector = model.model.multi_modal_projector
    start_projector(projector, *ridge(features, embeddings[labels]))
    warm_up(projector, features, labels, embeddings, seed, WARM_EPOCHS)


def prepare(args: argparse.Namespace) -> tuple[Any, Packer, PackedScenes, PackedScenes]:
    """The model with its closed-form start, and the packed train and validation scenes."""
    from datasets import load_dataset

    model, processor = demo_model.assemble()
    packer = Packer(processor, args.seed, args.yes_no_weight, args.caption_weight)
    loaded = {s: load_dataset(args.scenes, s, split=s) for s in ("train", "validation")}
    args.work.mkdir(parents=True, exist_ok=True)
    model.model.vision_tower.to(torch.bfloat16)
    features = {
        s: cache_features(model, processor, d, args.work / f"{s}.npy") for s, d in loaded.items()
    }
    rows = {s: d.remove_columns("image").to_list() for s, d in loaded.items()}
    if args.start is None:
        start(model, processor, features["train"], rows["train"], args.seed)
    visits = args.steps * args.batch
    short = 0 if args.start else SHORT_SHARE * visits
    train = PackedScenes(rows["train"], features["train"], packer, visits, short)
    held = PackedScenes(rows["validation"], features["validation"], packer, VALIDATION_SCENES, 0)
    return model, packer, train, held


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model's adapter.")
    parser.add_argument("--scenes", required=True, help="data set with train and validation")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument(
        "--work", type=Path, default=Path("demo-training"), help="features, checkpoints"
    )
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--batch", type=int, default=8, help="scenes a step and process")
    parser.add_argument("--start", type=Path, help="go on from this adapter, on new scenes")
    parser.add_argument("--yes_no_weight", type=float, default=3.0, help="of the deciding token")
    parser.add_argument("--caption_weight", type=float, default=1.0, help="of a caption's tokens")
    parser.add_argument("--lora_lr", type=float, default=1e-3)
    parser.add_argument("--projector_lr", type=float, default=1e-4)
    parser.add_argument("--validate_every", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    from transformers import TrainingArguments, set_seed

    args = parse(argv)
    set_seed(args.seed)
    model, packer, train, held = prepare(args)
    training = TrainingArguments(
        output_dir=str(args.work / "checkpoints"),
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=20,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=80,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
    )
    trainer = make_trainer(trainable_model(model, args.start), packer, train, held, training, args)
    trainer.train(resume_from_checkpoint=args.resume or None)
    wrapped = trainer.model
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    wrapped.save_pretrained(args.out)
    (args.out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
