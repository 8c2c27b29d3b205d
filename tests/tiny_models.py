"""Tiny random LLaVA and InternVL models with their processors, made in code: nothing is downloaded.

Both run in milliseconds and answer nonsense; they are for identities and shapes, not for quality.

    from tiny_models import tiny_internvl, tiny_llava, tiny_processor
    model, processor = tiny_llava(), tiny_processor("llava")

LLaVA: CLIP (56 px, 14 px patches) -> 4 x 4 image tokens. InternVL: its own encoder (same sizes, the
architecture of DINOv2) -> pixel shuffle 0.5 -> 2 x 2 image tokens of 2 x 2 patches. (InternVLConfig
reads any other vision config back as its own, so that is the only one whose checkpoints reload.)
Text: 2 layers, hidden size 32, 4 query and 2 key heads. The tokenizer is a byte-level BPE, so any
text round-trips.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, PATCH_SIZE = 56, 14
SPECIAL_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
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


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 360 tokens with chat markers; left padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def tiny_processor(family: str = "llava") -> LlavaProcessor:
    """The stock LlavaProcessor for `tiny_llava` or `tiny_internvl`; it squashes images."""
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
            ("position_embeddings", "cls_token")
        ):  # zeros, as transformers starts them
            parameter.normal_(std=0.2, generator=generator)
    return model


def tiny_llava(cls=LlavaForConditionalGeneration, seed: int = 0, **config):
    """A random LLaVA of class `cls` in eval mode; `config` as in `tiny_llava_config`."""
    return _build(cls, tiny_llava_config(**config), seed)


def tiny_internvl(cls=InternVLForConditionalGeneration, seed: int = 0, **config):
    """A random InternVL of class `cls` in eval mode; `config` as in `tiny_internvl_config`."""
    return _build(cls, tiny_internvl_config(**config), seed)


def tiny_image(seed: int = 0, width: int = 80, height: int = 60) -> Image.Image:
    """An RGB image of coloured noise blocks, not square."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def tiny_prompt(processor: LlavaProcessor, question: str = "What is in the image?") -> str:
    """The chat prompt of one image and one question, ready for the processor."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def tiny_inputs(processor: LlavaProcessor, questions: list[str] | None = None) -> dict:
    """Processed inputs, one image and question a row: input_ids, attention_mask, pixel_values."""
    questions = questions or ["What is in the image?"]
    return processor(
        images=[tiny_image(seed) for seed in range(len(questions))],
        text=[tiny_prompt(processor, question) for question in questions],
        padding=True,
        return_tensors="pt",
    )
