"""Step time and peak memory of vision modeling, against SFT alone and a full-vocabulary VM loss.

All three run in this process, on one model and batch: a LLaVA with 576 image tokens and a
vocabulary of 32,000. "SFT" is the stock model's own loss; "full vocabulary" adds the cross-entropy
of the logits at all image positions to it, as the original does. Ours computes logits where a label
stands.

    python tests/benchmarks/vision_modeling.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from firsthand.modeling.families import image_mask
from firsthand.modeling.vision_modeling import combined_loss

IMAGE, VOCABULARY, WEIGHT = 31_999, 32_000, 0.1
Step = Callable[[], torch.Tensor]


def build(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """A random LLaVA: a narrow CLIP of 24 x 24 patches, and a decoder of the given size."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def batch(rows: int, question: int = 40, answer: int = 60, labelled: int = 120) -> dict:
    """Image, question and answer tokens in each row, with labels on `labelled` image tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, IMAGE, (rows, question + answer), generator=generator)
    ids = torch.cat([torch.full((rows, 576), IMAGE), text], 1)
    labels, vision_labels = torch.full_like(ids, -100), torch.full_like(ids, -100)
    labels[:, -answer:] = ids[:, -answer:]
    places = torch.rand(rows, 576, generator=generator).argsort(1)[:, :labelled]
    words = torch.randint(5, IMAGE, places.shape, generator=generator)
    vision_labels.scatter_(1, places, words)
    pixels = torch.randn(rows, 3, 336, 336, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {**inputs, "labels": labels, "vision_labels": vision_labels}


def steps_of(model: LlavaForConditionalGeneration, inputs: dict) -> dict[str, Step]:
    """The loss of each way."""
    plain = {key: value for key, value in inputs.items() if key != "vision_labels"}
    on_image = image_mask(model, inputs["input_ids"])

    def full_vocabulary() -> torch.Tensor:
        output = model(**plain)
        logits = output.logits[on_image].view(len(on_image), 576, -1).float()
        labels = inputs["vision_labels"][on_image]
        vision = F.cross_entropy(logits.flatten(0, 1), labels)
        return (1 - WEIGHT) * output.loss + WEIGHT * vision

    return {
        "sft": lambda: model(**plain).loss,
        "ours": lambda: combined_loss(model, inputs, WEIGHT).loss,
        "full vocabulary": full_vocabulary,
    }


def run(model: torch.nn.Module, step: Step) -> float:
    """Forward and backward of one step; its loss."""
    model.zero_grad(set_to_none=True)
    loss = step()
    loss.backward()
    return loss.item()


def fastest(model: torch.nn.Module, steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """The least seconds of each way over interleaved rounds."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            run(model, step)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak(model: torch.nn.Module, step: Step) -> int:
    """Most bytes of tensors alive at once during a step, with the model's own."""
    model.zero_grad(set_to_none=True)
    weights = sum(p.nbytes for p in model.parameters())
    with torch.profiler.profile(profile_memory=True) as profiler:
        run(model, step)
    events = profiler.profiler.kineto_results.events()
    changes = [e.nbytes() for e in events if e.name() == "[memory]"]
    alive = most = 0
    for change in changes:
        alive += change
        most = max(most, alive)
    return weights + most


def figure(name: str, ours: float, theirs: float, unit: str, agree: bool) -> None:
    line = {"name": name, "ratio": round(theirs / ours, 3), "ours": ours, "theirs": theirs}
    print(json.dumps({**line, "unit": unit, "agree": agree}))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller decoder, fewer rounds")
    quick = parser.parse_args().quick
    hidden, layers, rows, rounds = (256, 4, 1, 3) if quick else (768, 12, 2, 5)
    model, inputs = build(hidden, layers), batch(rows)
    threads = torch.get_num_threads()
    print(f"{hidden} wide, {layers} layers, {rows} rows of 676 tokens, {threads} threads, float32")
    steps = steps_of(model, inputs)
    losses = {name: run(model, step) for name, step in steps.items()}
    without = combined_loss(model, inputs, 0.0).loss.item()
    agree = abs(without - losses["sft"]) < 1e-4 and (
        abs(losses["ours"] - losses["full vocabulary"]) < 1e-4
    )
    seconds = fastest(model, steps, rounds)
    memory = {name: peak(model, step) for name, step in steps.items()}
    figure("step_time_full_vocabulary", seconds["ours"], seconds["full vocabulary"], "s", agree)
    figure("peak_memory_full_vocabulary", memory["ours"], memory["full vocabulary"], "bytes", agree)
    figure("step_time", seconds["ours"], seconds["sft"], "s", agree)
    figure("peak_memory", memory["ours"], memory["sft"], "bytes", agree)


if __name__ == "__main__":
    main()
