"""Speed of steered and of contrastive decoding, against plain decoding of the same model.

All run in this process, on one random model of the demo model's size (a DINOv2-small and a decoder
of 135M parameters, 16 image tokens) and one batch: plain, an additive vector in every layer, a
norm-preserving one, and VCD with both branches in one batch. Processor time, prefill included, the
least of interleaved rounds.

    python tests/benchmarks/steering.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LogitsProcessorList,
)

from firsthand.modeling.contrastive import CONTRASTS, ContrastiveLogitsProcessor
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.processing.contrast_inputs import diffused

IMAGE, VOCABULARY, IMAGE_TOKENS, QUESTION = 49_151, 49_152, 16, 32
LAYERS, WIDTH = 30, 576


def build(layers: int) -> InternVLForConditionalGeneration:
    """A random model of the demo model's width, with `layers` decoder layers."""
    vision = InternVLVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
        image_size=224, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_ratio=0.25,
        image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config).eval()
    # a trained model's next tokens: few are plausible, where a random one's are all alike
    torch.nn.init.constant_(model.model.language_model.norm.weight, 8.0)
    return model


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Image and question tokens in each row."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, IMAGE, (rows, QUESTION), generator=generator)
    ids = torch.cat([torch.full((rows, IMAGE_TOKENS), IMAGE), words], 1)
    pixels = torch.randn(rows, 3, 224, 224, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def decoders(
    model: Any, inputs: dict[str, torch.Tensor], tokens: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Each way to decode; it gives the new tokens [B, tokens]."""
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    layers = range(model.config.text_config.num_hidden_layers)
    generator = torch.Generator().manual_seed(1)
    vector = SteeringVector({i: 0.1 * torch.randn(WIDTH, generator=generator) for i in layers})
    noised = {**inputs, "pixel_values": diffused(inputs["pixel_values"])}
    both = {name: torch.cat([value, noised[name]]) for name, value in inputs.items()}

    def plain(**more: Any) -> torch.Tensor:
        return model.generate(**inputs, **length, **more)[:, -tokens:]

    def steered(strength: float = 1.0, mode: str = "add") -> torch.Tensor:
        with attach_steering(model, replace(vector, mode=mode), strength):
            return plain()

    def two_passes() -> torch.Tensor:
        mix = ContrastiveLogitsProcessor(model, noised, CONTRASTS["vcd"])
        return plain(logits_processor=LogitsProcessorList([mix]))

    return {
        "plain": plain,
        "steered": steered,
        "norm": lambda: steered(mode="norm"),
        "vcd": lambda: model.generate(**both, custom_generate=CONTRASTS["vcd"], **length)[
            :, -tokens:
        ],
        "strength 0": lambda: steered(0.0),
        "two passes": two_passes,
    }


def fastest(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The least processor seconds of each over interleaved rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def figure(name: str, ours: float, theirs: float, agree: bool) -> None:
    line = {"name": name, "ratio": round(ours / theirs, 3), "ours": ours, "theirs": theirs}
    print(json.dumps({**line, "unit": "tokens/s", "agree": agree}))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a shallower decoder, fewer tokens")
    parser.add_argument("--rows", type=int, default=1, help="answers decoded together")
    options = parser.parse_args()
    layers, tokens = (8, 16) if options.quick else (LAYERS, 48)
    model, inputs = build(layers), batch(options.rows)
    threads = torch.get_num_threads()
    print(f"{layers} layers of {WIDTH}, {options.rows} rows, {tokens} tokens, {threads} threads")
    ways = decoders(model, inputs, tokens)
    said = {name: run() for name, run in ways.items()}
    same = torch.equal(said["strength 0"], said["plain"])
    changed = not torch.equal(said["steered"], said["plain"])
    mixed = torch.equal(said["two passes"], said["vcd"])
    timed = {name: ways[name] for name in ("plain", "steered", "norm", "vcd")}
    best = fastest(timed, 5)
    speed = {name: options.rows * tokens / seconds for name, seconds in best.items()}
    figure("norm_tokens_per_second", speed["norm"], speed["plain"], same)
    figure("steered_tokens_per_second", speed["steered"], speed["plain"], same and changed)
    figure("vcd_tokens_per_second", speed["vcd"], speed["plain"], mixed)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
