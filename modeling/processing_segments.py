"""Processor of models whose images become a fixed number of tokens, wherever they stand in a text.

MiniGPT-4 (32), mPLUG-Owl and mPLUG-Owl2 (65) tokenise the text before, between and after images
apart, so that each piece starts as a text of its own (SentencePiece puts a space there). This is
that, with one image token id repeated. Not for models whose token count depends on the image.

    processor = SegmentsProcessor(image_processor, tokenizer, num_image_tokens=32)
    processor(images=[image], text=["What is in <image>?"], return_tensors="pt")
"""

from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images


class SegmentsProcessor(ProcessorMixin):
    """Images and texts with placeholders to input_ids, attention_mask and pixel_values.

    Args:
        image_processor: of the model's vision encoder.
        tokenizer: a tokenizer that knows `image_token`.
        num_image_tokens: how many tokens an image takes.
        image_token: the placeholder in texts, one for each image.
        chat_template: of the conversations the model was trained on.
    """

    _auto_class = "AutoProcessor"  # type: ignore[assignment]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 32,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer does not know {image_token!r}; add it as a special token first."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare a batch; left or right padding is the tokenizer's, or `padding_side`.

        Args:
            images: one image, a list of them, or a list of lists, in the order of the placeholders.
            text: one text or a list of them; each `image_token` in it is one image.
            kwargs: of the tokenizer (padding, return_tensors, ...) and of the image processor.

        Raises:
            ValueError: when images and placeholders do not match in number, or truncation is asked
                for, which would cut images.
        """
        settings = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        texts = [text] if isinstance(text, str) else list(text or [])
        flat: Any = [] if images is None else make_flat_list_of_images(images)
        wanted = sum(one.count(self.image_token) for one in texts)
        if texts and wanted != len(flat):
            raise ValueError(
                f"The texts hold {wanted} {self.image_token}, but there are {len(flat)} images; "
                "put one placeholder where each image belongs."
            )
        features = self._tokens(texts, **settings["text_kwargs"]) if texts else {}
        if flat:
            features |= self.image_processor(flat, **settings["images_kwargs"])
        return BatchFeature(features)

    def _tokens(self, texts: list[str], add_special_tokens: bool = True, **kwargs: Any) -> dict:
        if kwargs.get("truncation"):
            raise ValueError("truncation would cut images: use truncation=False, max_length=None.")
        rows = [self._encode(one, add_special_tokens) for one in texts]
        names = ("padding", "max_length", "padding_side", "pad_to_multiple_of", "return_tensors")
        chosen = {name: kwargs[name] for name in names if name in kwargs}
        return dict(self.tokenizer.pad({"input_ids": rows}, **{"padding": False, **chosen}))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        first, *rest = text.split(self.image_token)
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
        for segment in rest:
            ids += [self.image_token_id] * self.num_image_tokens
            ids += self.tokenizer(segment, add_special_tokens=False)["input_ids"]
        return ids
