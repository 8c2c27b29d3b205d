"""`firsthand train convert`: published checkpoints of the originals as Hub-native ones.

What it is: `llava_llama` files of LLaVA-1.5 and SIMA, a bare LLaVA projector, ConvLLaVA, MiniGPT-4,
mPLUG-Owl, mPLUG-Owl2, and LRV V2's LoRA, read strictly: a key that is unknown, missing or of
another shape is an error that names it. What it is not: a download, or training.

    firsthand train convert --kind llava --weights llava-v1.5-7b --vision clip-vit-l-336 --out hf
    firsthand train convert --kind minigpt4 --weights pretrained_minigpt4_7b.pth \
        --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --language vicuna-7b \
        --out hf
    python -m firsthand.recipes.convert_checkpoint --kind mplug-owl --weights folder --out hf
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from firsthand.modeling.modeling_conv_llava import ConvLlavaForConditionalGeneration
from firsthand.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from firsthand.modeling.modeling_mplug_owl import MPlugOwlForConditionalGeneration
from firsthand.modeling.modeling_mplug_owl2 import MPlugOwl2ForConditionalGeneration
from firsthand.recipes import checkpoint_configs as configs
from firsthand.recipes import checkpoint_keys as keys
from firsthand.recipes.checkpoint_keys import Layout, Tensors

# kind: {argument: layout of what it names}; of a weight that two files hold, --weights' counts
KINDS: dict[str, dict[str, Layout]] = {
    "llava": {"vision": keys.CLIP, "weights": keys.LLAVA},
    "llava-projector": {
        "vision": keys.CLIP,
        "language": keys.LLAMA,
        "weights": keys.PROJECTOR,
    },
    "conv-llava": {"vision": keys.CONVNEXT, "weights": keys.LLAVA},
    "minigpt4": {
        "vision": keys.EVA_VIT,
        "qformer": keys.QFORMER,
        "language": keys.VICUNA,
        "weights": keys.MINIGPT4,
    },
    "mplug-owl": {"weights": keys.MPLUG_OWL},
    "mplug-owl2": {"weights": keys.MPLUG_OWL2},
}
CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava-projector": LlavaForConditionalGeneration,
    "conv-llava": ConvLlavaForConditionalGeneration,
    "minigpt4": MiniGPT4ForConditionalGeneration,
    "mplug-owl": MPlugOwlForConditionalGeneration,
    "mplug-owl2": MPlugOwl2ForConditionalGeneration,
}
LORA = "lrv-lora"
LORA_CONFIG = {
    "peft_type": "LORA",
    "task_type": None,
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": r".*language_model.*\.(q_proj|v_proj)",
    "inference_mode": True,
}
IMAGE_TOKEN = "<image>"


def convert(kind: str, parts: Mapping[str, Tensors], raws: dict[str, Any]) -> tuple[Any, Tensors]:
    """Config and weights, under the names of the class in `CLASSES`.

    Args:
        kind: a key of `KINDS`.
        parts: argument -> tensors of its files, under their published names.
        raws: argument -> its published config.json, where it has one.

    Raises:
        ValueError: for keys that are unknown, missing or of another shape, all of them named.
    """
    state: dict[str, torch.Tensor] = {}
    for argument, layout in KINDS[kind].items():
        tensors = parts.get(argument, {})
        if kind == "minigpt4":
            tensors = keys.join_biases(tensors)
        if kind.startswith("mplug-owl"):
            tensors = keys.split_interleaved(tensors, _owl_heads(kind, raws["weights"]))
        state |= keys.rename(tensors, layout, f"--{argument}")
    if kind.startswith("mplug-owl"):
        state = keys.flatten_embeddings(state)
    config = _config(kind, raws, state)
    keys.check(state, expected_shapes(kind, config))
    return config, state


def _owl_heads(kind: str, raw: dict[str, Any]) -> int:
    vision = raw["vision_config"] if kind == "mplug-owl" else raw["visual_config"]["visual_model"]
    return vision["num_attention_heads"]


def _config(kind: str, raws: dict[str, Any], state: Tensors) -> Any:
    if kind == "llava":
        return configs.llava_config(raws["weights"], raws.get("vision"))
    if kind == "llava-projector":
        return configs.llava_config(raws["language"], raws.get("vision"))
    if kind == "conv-llava":
        return configs.conv_llava_config(raws["weights"], raws.get("vision"))
    if kind == "minigpt4":
        return configs.minigpt4_config(raws["language"], state)
    if kind == "mplug-owl":
        return configs.mplug_owl_config(raws["weights"], state)
    return configs.mplug_owl2_config(raws["weights"], state)


def _on_meta(kind: str, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return CLASSES[kind](config)


def expected_shapes(kind: str, config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Every weight that a model of this config has; nothing is allocated."""
    return {name: t.shape for name, t in _on_meta(kind, config).state_dict().items()}


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, or of a folder's safetensors, or else its pytorch_model*.bin.

    Raises:
        FileNotFoundError: where there is no such file, or none in the folder.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("model*.safetensors"))
    files = files or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{path}: no such file, and no folder with weights")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            tensors |= found.get("model", found)
    return tensors


def read_config(path: str | Path) -> dict[str, Any] | None:
    """config.json of a folder; None beside a single file."""
    file = Path(path) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def add_image_token(
    config: Any, state: Tensors, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Let tokenizer, config and weights know `<image>`; its new rows are the mean of the others.

    The row of the embedding is never read, and the mean row of the head never wins over the rest.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = config.text_config
    grown = dict(state)
    for key in [k for k in state if k.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        weight = state[key]
        new = weight.float().mean(0, keepdim=True).to(weight.dtype)
        grown[key] = torch.cat([weight, new.expand(max(0, token + 1 - len(weight)), -1)])
    text.vocab_size = max(text.vocab_size, token + 1)
    config.image_token_index = token
    return grown


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"


def save(kind: str, config: Any, state: Tensors, tokenizer: Any, raw: Any, out: str) -> None:
    """Write model, processor and, with classes of ours, their code into `out`."""
    _pad_token(tokenizer)
    state = add_image_token(config, state, tokenizer)
    model = _on_meta(kind, config)
    model.load_state_dict(state, assign=True)
    head = next(t for k, t in state.items() if k.endswith("lm_head.weight"))
    model.config.dtype = head.dtype
    model.save_pretrained(out)
    configs.processor_for(kind, config, tokenizer, raw or {}).save_pretrained(out)


def convert_lora(weights: str, base: str | None, out: str) -> None:
    """LRV V2's file as a PEFT adapter of our mPLUG-Owl."""
    tensors = keys.lora_weights(read_weights(weights))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**LORA_CONFIG, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _given(args: argparse.Namespace) -> dict[str, str]:
    """Argument -> path, those that the kind reads.

    Raises:
        ValueError: where one is needed and absent, or given and not read.
    """
    paths = {name: getattr(args, name) for name in ("weights", "vision", "qformer", "language")}
    given = {name: path for name, path in paths.items() if path}
    known = KINDS.get(args.kind, {"weights": None, "language": None})
    spare = sorted(given.keys() - known.keys())
    if spare:
        raise ValueError(f"--kind {args.kind} does not read --{', --'.join(spare)}; leave it out.")
    if args.kind in ("llava-projector", "minigpt4") and "language" not in given:
        raise ValueError(f"--kind {args.kind} needs --language, a folder with a Llama.")
    return given


def run(args: argparse.Namespace) -> int:
    """The verb: read, rename, check, save."""
    given = _given(args)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} is not empty; choose another folder for the converted model.")
    if args.kind == LORA:
        convert_lora(given["weights"], given.get("language"), args.out)
        print(f"adapter: {args.out}")
        return 0
    raws = {name: raw for name, path in given.items() if (raw := read_config(path)) is not None}
    text = "language" if "language" in KINDS[args.kind] else "weights"
    if text not in raws:
        raise ValueError(f"--{text} {given[text]} holds no config.json; give the whole folder.")
    tokenizer = AutoTokenizer.from_pretrained(given[text])
    parts = {name: read_weights(path) for name, path in given.items()}
    config, state = convert(args.kind, parts, raws)
    save(args.kind, config, state, tokenizer, raws[text], args.out)
    print(f"model and processor: {args.out}")
    return 0


if __name__ == "__main__":
    from firsthand.recipes.cli import main

    sys.exit(main(["train", "convert", *sys.argv[1:]]))
