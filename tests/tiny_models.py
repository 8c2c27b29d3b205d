"""Tiny random models of every family, with their processors, made in code: nothing is downloaded.

Both run in milliseconds and answer nonsense; they are for identities and shapes, not for quality.

    from tiny_models import tiny_internvl, tiny_llava, tiny_processor
    model, processor = tiny_llava(), tiny_processor("llava")

LLaVA: CLIP (56 px, 14 px patches) -> 4 x 4 image tokens. InternVL: its own encoder (same sizes, the
architecture of DINOv2) -> pixel shuffle 0.5 -> 2 x 2 image tokens of 2 x 2 patches. (InternVLConfig
reads any other vision config back as its own, so that is the only one whose checkpoints reload.)
The Qwen-VLs keep the image's shape: 80 x 60 pixels are 2 x 3 tokens. Idefics3 and SmolVLM squash
it to 2 x 2 tokens, Gemma 3 pools it to as many. Text: 2 layers, hidden size 32, 4 query and 2 key
heads. The tokenizer is a byte-level BPE, so any text round-trips.
"""

from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Blip2Processor,
    CLIPVisionConfig,
    Gemma3Processor,
    Idefics3Processor,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

IMAGE_SIZE, PATCH_SIZE = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112]]  # sizes of images in tiles, of LLaVA-NeXT's kind
SPECIAL_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
FAKE_TOKENS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]  # of Idefics3
GEMMA_TOKENS = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
CORPUS = [
    "a dog top left, a cup center.",
    "a cat top right, a car bottom left, a tree bottom right.",
    "Is there a dog in the image? Yes. No. What is in the image? Describe the image.",
    "user assistant system",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SPLITTING = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL_TOKENS + FAKE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 360 tokens with chat markers; left padding.

    `tokens` are its named special ones, image_token="<image>" unless given.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=tokens or {"image_token": "<image>"},
        padding_side="left",
    )


class _ImagesOnly(Qwen2_5_VLProcessor):
    """Without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def tiny_processor(family: str = "llava"):
    """The stock processor of a family, as far as it goes without torchvision.

    LLaVA and InternVL: LlavaProcessor that squashes images. Qwen: its own without videos. Idefics3
    and SmolVLM: Idefics3Processor without image splitting.
    """
    if family.startswith("qwen"):
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 84
        )
        return _ImagesOnly(image_processor, tiny_tokenizer(), chat_template=CHAT_TEMPLATE)
    if family in ("idefics3", "smolvlm"):
        image_processor = SPLITTING[family](
            size={"longest_edge": 2 * IMAGE_SIZE},
            max_image_size={"longest_edge": IMAGE_SIZE},
            do_image_splitting=False,
        )
        return Idefics3Processor(
            image_processor, tiny_tokenizer(), image_seq_len=4, chat_template=CHAT_TEMPLATE
        )
    if family == "gemma3":
        image_processor = Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        template = CHAT_TEMPLATE.replace("<image>", "<boi>")
        return Gemma3Processor(
            image_processor, tiny_tokenizer(**GEMMA_TOKENS), template, image_seq_length=4
        )
    if family.startswith("paligemma"):
        image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        image_processor.image_seq_length = 16
        return PaliGemmaProcessor(image_processor, tiny_tokenizer(), chat_template=CHAT_TEMPLATE)
    if family in ("llava_next", "llava_onevision"):
        return _tiling_processor(family)
    if family in ("blip-2", "instructblip"):
        return _blip_processor(family)
    merged = {"llava": 1, "internvl": 2}[family]
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE * merged,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


class _StillsOnly(LlavaOnevisionProcessor):
    """Without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def _tiling_processor(family: str):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family == "llava_next":
        image_processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextProcessor(
            image_processor, tiny_tokenizer(), patch_size=PATCH_SIZE, num_additional_image_tokens=1,
            vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
    image_processor = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
    return _StillsOnly(
        image_processor, tiny_tokenizer(), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _blip_processor(family: str):
    """It puts the queries' tokens before the prompt itself, and has no chat template of its own."""
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    plain = partial(tiny_tokenizer, query_token="<image>")  # its token is not called image_token
    if family == "blip-2":
        processor = Blip2Processor(image_processor, plain(), num_query_tokens=6)
    else:
        processor = InstructBlipProcessor(image_processor, plain(), plain(), num_query_tokens=6)
    processor.chat_template = CHAT_TEMPLATE.replace("<image>\n", "")
    return processor


def _text_config(model_type: str, layers: int, tie: bool) -> AutoConfig:
    tokenizer = tiny_tokenizer()
    return AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_llava_config(text: str = "llama", layers: int = 2, **kwargs) -> LlavaConfig:
    """Config of `tiny_llava`; `text` is the text model's type, extra fields go to LlavaConfig."""
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=24,
        initializer_range=0.2,
        initializer_factor=5.0,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=_text_config(text, layers, tie=False),
        image_token_index=tiny_tokenizer().image_token_id,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **kwargs,
    )


def tiny_internvl_config(text: str = "llama", layers: int = 2, **kwargs) -> InternVLConfig:
    """Config of `tiny_internvl` (tied embeddings); extra fields go to InternVLConfig."""
    vision = InternVLVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_bias=True,
        use_mean_pooling=False,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        layer_scale_init_value=1.0,
        initializer_range=0.2,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=_text_config(text, layers, tie=True),
        image_token_id=tiny_tokenizer().image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **kwargs,
    )


@torch.no_grad()
def _build(cls, config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(
            ("position_embeddings", "cls_token", "query_tokens", "mm_input_projection_weight")
        ):  # zeros, as transformers starts them
            parameter.normal_(std=0.2, generator=generator)
    return model


def tiny_llava(cls=LlavaForConditionalGeneration, seed: int = 0, **config):
    """A random LLaVA of class `cls` in eval mode; `config` as in `tiny_llava_config`."""
    return _build(cls, tiny_llava_config(**config), seed)


def tiny_internvl(cls=InternVLForConditionalGeneration, seed: int = 0, **config):
    """A random InternVL of class `cls` in eval mode; `config` as in `tiny_internvl_config`."""
    return _build(cls, tiny_internvl_config(**config), seed)


def tiny_qwen(family: str = "qwen2_5_vl", seed: int = 0, layers: int = 2):
    """A random Qwen2-VL, Qwen2.5-VL or Qwen3-VL in eval mode, 14 px patches merged 2 x 2."""
    text = _text_config(family.split("_")[0], layers, tie=False).to_dict()
    text.pop("model_type"), text.pop("layer_types", None)
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]
    }  # fmt: skip
    sizes = dict(depth=3, num_heads=4, patch_size=PATCH_SIZE, spatial_merge_size=2)
    if family == "qwen2_vl":
        vision = dict(embed_dim=32, hidden_size=32, mlp_ratio=2, **sizes)
    else:
        vision = dict(hidden_size=32, out_hidden_size=32, intermediate_size=48, **sizes)
        own = {
            "qwen2_5_vl": dict(window_size=56, fullatt_block_indexes=[2]),
            "qwen3_vl": dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
        }
        vision |= own[family]
    image, start = (tiny_tokenizer().convert_tokens_to_ids(t) for t in ("<image>", "<|im_start|>"))
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, image_token_id=image,
        video_token_id=len(tiny_tokenizer()) - 1, vision_start_token_id=start,
    )  # fmt: skip
    return _build(AutoModelForImageTextToText.from_config, config, seed)


def tiny_idefics3(family: str = "idefics3", seed: int = 0, layers: int = 2):
    """A random Idefics3 or SmolVLM in eval mode: 4 x 4 patches, shuffled into 2 x 2 tokens."""
    vision = dict(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    config = AutoConfig.for_model(
        family,
        text_config=_text_config("llama", layers, tie=False).to_dict(),
        vision_config=vision,
        image_token_id=tiny_tokenizer().image_token_id,
        scale_factor=2,
        pad_token_id=tiny_tokenizer().pad_token_id,
        tie_word_embeddings=False,
    )
    return _build(AutoModelForImageTextToText.from_config, config, seed)


def tiny_gemma3(seed: int = 0, layers: int = 2, sliding_window: int = 512):
    """A random Gemma 3 in eval mode: 4 x 4 patches pooled to 2 x 2; every other layer slides."""
    text = _text_config("gemma3_text", layers, tie=False).to_dict()
    text |= dict(vocab_size=400, query_pre_attn_scalar=8, sliding_window=sliding_window)
    text["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    tokenizer = tiny_tokenizer(**GEMMA_TOKENS)
    image, start, end = tokenizer.convert_tokens_to_ids(list(GEMMA_TOKENS.values()))
    vision = dict(
        model_type="siglip_vision_model", hidden_size=24, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4,
        tie_word_embeddings=False,
        image_token_index=image, boi_token_index=start, eoi_token_index=end,
    )  # fmt: skip
    return _build(AutoModelForImageTextToText.from_config, config, seed)


def tiny_paligemma(seed: int = 0, layers: int = 2, text: str = "gemma", **fields):
    """A random PaliGemma (of Gemma 1, or 2) in eval mode; `fields` are of the text's config."""
    processor = tiny_processor("paligemma")
    fields = _text_config(text, layers, tie=False).to_dict() | fields
    fields["vocab_size"] = len(processor.tokenizer)
    vision = dict(
        model_type="siglip_vision_model", hidden_size=24, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    config = AutoConfig.for_model(
        "paligemma", text_config=fields, vision_config=vision, projection_dim=32,
        image_token_index=processor.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return _build(AutoModelForImageTextToText.from_config, config, seed)


TINY = {
    "llava": tiny_llava,
    "internvl": tiny_internvl,
    "qwen2_vl": partial(tiny_qwen, "qwen2_vl"),
    "qwen2_5_vl": partial(tiny_qwen, "qwen2_5_vl"),
    "qwen3_vl": partial(tiny_qwen, "qwen3_vl"),
    "gemma3": tiny_gemma3,
    "idefics3": partial(tiny_idefics3, "idefics3"),
    "smolvlm": partial(tiny_idefics3, "smolvlm"),
}


def tiny_blip(family: str = "blip-2", seed: int = 0, layers: int = 2):
    """A random BLIP-2 (of OPT) or InstructBLIP (of Llama) in eval mode: 6 queries of 4 x 4 patches.

    In its Q-Former's 3 layers the first and the last look at the image.
    """
    tokenizer = tiny_tokenizer()
    if family == "blip-2":
        text = dict(
            model_type="opt", vocab_size=len(tokenizer), hidden_size=32, ffn_dim=48, dropout=0.0,
            num_hidden_layers=layers, num_attention_heads=4, word_embed_proj_dim=32, init_std=0.2,
            max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    else:
        text = _text_config("llama", layers, tie=False).to_dict()
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    sizes["initializer_range"] = 0.2
    qformer = dict(vocab_size=len(tokenizer), max_position_embeddings=512)
    config = AutoConfig.for_model(
        family, text_config=text, num_query_tokens=6, initializer_range=0.2,
        vision_config=dict(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **sizes),
        qformer_config=dict(cross_attention_frequency=2, **sizes, **qformer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return _build(AutoModelForImageTextToText.from_config, config, seed)


def tiny_tiling(family: str = "llava_next", seed: int = 0, layers: int = 2):
    """A random LLaVA-NeXT (CLIP) or LLaVA-OneVision (SigLIP) in eval mode.

    80 x 60 pixels are a base view of 4 x 4 tokens, and 2 x 2 tiles cut back to 6 x 8.
    """
    config = tiny_llava_config(layers=layers).to_dict()
    config |= dict(model_type=family, image_grid_pinpoints=PINPOINTS)
    if family == "llava_onevision":
        vision = config["vision_config"]
        sizes = {k: v for k, v in vision.items() if k.endswith(("size", "layers", "heads"))}
        config["vision_config"] = {"model_type": "siglip_vision_model", **sizes}
        config |= dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
    config = AutoConfig.for_model(**config)
    return _build(AutoModelForImageTextToText.from_config, config, seed)


PALIGEMMA_2 = partial(
    tiny_paligemma, text="gemma2", attn_logit_softcapping=1.0, final_logit_softcapping=5.0,
    query_pre_attn_scalar=8, sliding_window=8,
)  # fmt: skip
PARTIAL = {  # explained and steered, but without vision modeling
    "paligemma": tiny_paligemma,
    "llava_next": partial(tiny_tiling, "llava_next"),
    "llava_onevision": partial(tiny_tiling, "llava_onevision"),
    "blip-2": partial(tiny_blip, "blip-2"),
    "instructblip": partial(tiny_blip, "instructblip"),
}


ATTENTION_OUTPUTS = (
    "out_proj", "projection_layer", "o_proj", "attention.output.dense", "attn.proj"
)  # fmt: skip


def cut_attention(layers) -> None:
    """Make each token of an encoder depend on its own patch alone."""
    for layer in layers:
        cut = [m for name, m in layer.named_modules() if name.endswith(ATTENTION_OUTPUTS)]
        assert cut
        for module in cut:
            torch.nn.init.zeros_(module.weight)


def tiny_image(seed: int = 0, width: int = 80, height: int = 60) -> Image.Image:
    """An RGB image of coloured noise blocks, not square."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def tiny_prompt(processor, question: str = "What is in the image?") -> str:
    """The chat prompt of one image and one question, ready for the processor."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def tiny_inputs(processor, questions: list[str] | None = None, images: list | None = None) -> dict:
    """Processed inputs, one image and question a row: input_ids, attention_mask, pixel_values."""
    questions = questions or ["What is in the image?"]
    images = images or [tiny_image(seed) for seed in range(len(questions))]
    return processor(
        images=[[image] for image in images],
        text=[tiny_prompt(processor, question) for question in questions],
        padding=True,
        return_tensors="pt",
    )
