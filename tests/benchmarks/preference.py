"""CPU time, FLOPs and peak memory of a preference step: SharedImageDPOTrainer against TRL's own.

Both train LoRA on the same LLaVA and pairs in this process; losses are compared. Ours encodes an
image once a pair, runs prompt and image once for both answers, and has the reference's
log-probabilities from before training; `amortised` adds that pass, shared by three epochs.

    python tests/benchmarks/preference.py [--quick] [--answer 100] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from firsthand.modeling.families import unwrap
from firsthand.recipes.trainers.preference import (
    REFERENCE,
    SharedImageDPOConfig,
    SharedImageDPOTrainer,
)

IMAGE, EPOCHS, QUESTION = 499, 3, 24


def build(hidden: int, layers: int, wide: int) -> LlavaForConditionalGeneration:
    """A random LLaVA with 576 image tokens whose encoder takes a few per cent of the time."""
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=2 * wide, num_hidden_layers=4, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=500, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def batch(pairs: int, answer: int, device: str) -> dict[str, torch.Tensor]:
    """A collated batch of TRL's: 2B rows of image, question and answer, and B images."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, IMAGE, (pairs, QUESTION), generator=generator)
    prompt = torch.cat([torch.full((pairs, 576), IMAGE), prompt], 1).repeat(2, 1)
    said = torch.randint(1, IMAGE, (2 * pairs, answer), generator=generator)
    ids = torch.cat([prompt, said], 1)
    completion = torch.cat([torch.zeros_like(prompt), torch.ones_like(said)], 1)
    pixels = torch.randn(pairs, 3, 336, 336, generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {k: v.to(device) for k, v in {**found, "completion_mask": completion}.items()}


def trainer_of(ours: bool, sizes: tuple[int, int, int], settings: dict, folder: str) -> Any:
    from datasets import Dataset
    from transformers import LlavaProcessor

    rows = [{"images": [], "prompt": "", "chosen": "", "rejected": ""}]
    common = dict(
        output_dir=folder, report_to="none", gradient_checkpointing=False, max_length=None,
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    args: Any = (
        SharedImageDPOConfig(precompute_reference=False, **common) if ours else DPOConfig(**common)
    )
    cls = SharedImageDPOTrainer if ours else DPOTrainer
    return cls(
        build(*sizes),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=_processor(LlavaProcessor),
        peft_config=LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
    )


def _processor(cls: Any) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<image>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
    )
    return cls(CLIPImageProcessorPil(), tokenizer, chat_template="")


def step(trainer: Any, inputs: dict) -> float:
    """Forward and backward of one batch; its loss."""
    trainer.model.zero_grad(set_to_none=True)
    if isinstance(trainer, SharedImageDPOTrainer):
        trainer.images.pixels = None  # a new batch: nothing is known of its images
    loss = trainer._compute_loss(trainer.model, dict(inputs), False)
    loss.backward()
    return loss.item()


def seconds(device: str) -> float:
    """Processor time of all threads; on a GPU the clock, after its work is done."""
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def fastest(steps: dict[str, Any], rounds: int, device: str) -> dict[str, float]:
    """The least seconds of each over interleaved rounds."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, run in steps.items():
            start = seconds(device)
            run()
            best[name] = min(best[name], seconds(device) - start)
    return best


def peak(run: Any, model: Any, device: str) -> int:
    """Most bytes of tensors alive at once, the model's own included."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most + sum(p.nbytes for p in model.parameters())


def flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def figure(name: str, ours: float, theirs: float, unit: str, agree: bool) -> None:
    line = {"name": name, "ratio": round(theirs / ours, 3), "ours": ours, "theirs": theirs}
    print(json.dumps({**line, "unit": unit, "agree": agree}))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, one pair")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    sizes = (128, 4, 64) if options.quick else (512, 6, 128)
    count, rounds = (1, 3) if options.quick else (2, 5)
    settings = {"use_cpu": options.device == "cpu", "bf16": False}
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = (trainer_of(which, sizes, settings, folder) for which in (False, True))
    one = batch(count, options.answer, options.device)
    twice = {**one, "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)}
    losses = step(theirs, twice), step(ours, one)
    reference = dict(zip(REFERENCE, ours.compute_ref_log_probs(ours.model, one), strict=True))
    ours.precompute_ref_logps = True
    ready = {**one, **reference}
    agree = abs(losses[0] - losses[1]) < 1e-5 and abs(losses[0] - step(ours, ready)) < 1e-5
    steps = {
        "theirs": lambda: step(theirs, twice),
        "ours": lambda: step(ours, ready),
        "reference": lambda: ours.compute_ref_log_probs(ours.model, one),
    }
    print(f"{sizes} (width, layers, encoder), {count} pairs, {options.answer} tokens an answer")
    best = fastest(steps, rounds, options.device)
    work = {name: flops(run) for name, run in steps.items()}
    memory = {
        "theirs": peak(steps["theirs"], unwrap(theirs.model), options.device),
        "ours": peak(steps["ours"], unwrap(ours.model), options.device),
    }
    amortised = {k: v["ours"] + v["reference"] / EPOCHS for k, v in (("s", best), ("f", work))}
    figure("step_cpu_time_amortised", amortised["s"], best["theirs"], "s", agree)
    figure("flops_amortised", amortised["f"], work["theirs"], "FLOP", agree)
    figure("flops", work["ours"], work["theirs"], "FLOP", agree)
    figure("peak_memory", memory["ours"], memory["theirs"], "bytes", agree)
    figure("step_cpu_time", best["ours"], best["theirs"], "s", agree)


if __name__ == "__main__":
    main()
