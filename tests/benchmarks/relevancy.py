"""Time and peak memory of a token's relevancy, against the published procedure, in one process.

"Theirs" is the procedure of LVLM-Stethoscope as published, written anew: eager attention, every map
kept with its gradient, parameters that take gradients too, and the rule on full matrices; but with
gradients cleared between tokens, without which its maps are wrong. Ours is the streaming backend of
`modeling/relevancy.py`. Both explain the same answer tokens of a random LLaVA: 576 image tokens.

    python tests/benchmarks/relevancy.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from firsthand.modeling.relevancy_attention import Recorder, recording

IMAGE, LENGTH = 499, 700
Rows = list[torch.Tensor]  # a token each: [n]


def build(layers: int, heads: int, hidden: int) -> LlavaForConditionalGeneration:
    """A random LLaVA whose decoder is narrow but has the maps of a large one."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=500, hidden_size=hidden, intermediate_size=hidden * 2,
        num_hidden_layers=layers, num_attention_heads=heads,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, IMAGE, (1, LENGTH - 576), generator=generator)
    ids = torch.cat([torch.full((1, 576), IMAGE), text], 1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def theirs(model: LlavaForConditionalGeneration, inputs: dict, positions: list[int]) -> Rows:
    """The published procedure."""
    model.requires_grad_(True)
    model.set_attn_implementation("eager")
    maps: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: tuple) -> None:
        output[1].retain_grad()
        maps.append(output[1])

    layers = model.model.language_model.layers
    handles = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    logits = model(**inputs, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    rows = []
    for at in positions:
        model.zero_grad()
        for kept in maps:
            kept.grad = None
        logits[at, inputs["input_ids"][0, at + 1]].backward(retain_graph=True)
        bars = [(m.grad * m).clamp(min=0).mean((0, 1)).detach() for m in maps]
        rows.append(full_matrix(bars)[at] - torch.eye(LENGTH)[at])
    model.zero_grad()
    return rows


def ours(model: LlavaForConditionalGeneration, inputs: dict, positions: list[int]) -> Rows:
    """The streaming backend."""
    model.requires_grad_(False)
    pixels = inputs["pixel_values"].clone().requires_grad_()
    recorder, rows = Recorder(model, None, "streaming"), []
    with recording(model, recorder):
        given = {**inputs, "pixel_values": pixels, "logits_to_keep": torch.tensor(positions)}
        logits = model(**given, use_cache=False).logits[0]
        for index, at in enumerate(positions):
            recorder.begin(at, LENGTH)
            logit = logits[index, inputs["input_ids"][0, at + 1]]
            torch.autograd.grad(logit, pixels, retain_graph=True)
            rows.append(recorder.rows["text"][0] - torch.eye(LENGTH)[at])
    return rows


def full_matrix(bars: list[torch.Tensor]) -> torch.Tensor:
    """R = (I + A_L) ... (I + A_1), bottom up."""
    total = torch.eye(len(bars[0]))
    for bar in bars:
        total = total + bar @ total
    return total


def one_row(bars: list[torch.Tensor], at: int) -> torch.Tensor:
    """Row `at` of the same, top down."""
    row = torch.eye(len(bars[0]))[at]
    for bar in reversed(bars):
        row = row + row @ bar
    return row


def fastest(ways: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The least processor seconds of each over interleaved rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return best


def peak(way: Callable) -> int:
    """Most bytes of tensors alive at once, over the loaded model."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        way()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to the order of sums in float32."""
    return bool((ours - theirs).abs().max() < 1e-4 * theirs.abs().max())


def figure(name: str, ours: float, theirs: float, unit: str, agree: bool) -> None:
    line = {"name": name, "ratio": round(theirs / ours, 3), "ours": ours, "theirs": theirs}
    print(json.dumps({**line, "unit": unit, "agree": agree}))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 layers, one round, two tokens")
    quick = parser.parse_args().quick
    layers, heads, hidden, rounds, count = (8, 4, 128, 1, 2) if quick else (32, 8, 256, 2, 4)
    model, inputs = build(layers, heads, hidden), batch()
    positions = [LENGTH - 2 - index for index in range(count)]
    threads = torch.get_num_threads()
    print(
        f"{layers} layers, {heads} heads, {hidden} wide, {LENGTH} tokens, {count} explained", end=""
    )
    print(f", {threads} threads, float32")
    bars = [torch.rand(LENGTH, LENGTH).tril() / LENGTH for _ in range(layers)]
    rules = {"ours": lambda: one_row(bars, LENGTH - 1), "theirs": lambda: full_matrix(bars)}
    same = close(rules["ours"](), rules["theirs"]()[-1])
    seconds = fastest(rules, 1 if quick else 3)
    ways = {
        "ours": lambda: ours(model, inputs, positions),
        "theirs": lambda: theirs(model, inputs, positions),
    }
    agree = all(close(a, b) for a, b in zip(ways["ours"](), ways["theirs"](), strict=True))
    best = fastest(ways, rounds)
    memory = {name: peak(way) for name, way in ways.items()}
    figure("propagation", seconds["ours"], seconds["theirs"], "s", same)
    figure("per_token_time", best["ours"] / count, best["theirs"] / count, "s", agree)
    figure("peak_memory", memory["ours"], memory["theirs"], "bytes", agree)


if __name__ == "__main__":
    main()
