"""Answers to many questions about images, in batches, each image encoded once.

What it is: deterministic generation for any supported model, native or grounded, steered or not:
greedy, or drawn where a row carries a seed. What it is not: a server (point an `Endpoint` at one).

    rows = [{"id": "1", "image_id": "a", "image": pil, "question": "Is there a dog in the image?"}]
    for answer in generate_answers(model, processor, rows): print(answer["prediction"])
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from inspect import signature
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from firsthand.modeling.families import FAMILIES, unwrap
from firsthand.modeling.placement import input_device
from firsthand.processing.sampling import RowDraws

CACHED_BYTES = 2**29  # of image features that are kept for further questions
WINDOW = 8  # batches that are read ahead and sorted by length; answers come after each window
PLAIN_INPUTS = {"input_ids", "attention_mask", "pixel_values"}
DRAWN = ("temperature", "top_p")
OURS = (*DRAWN, "prepare")  # settings that `generate` is not told

Row = dict[str, Any]


def build_prompt(processor: Any, question: str, with_image: bool = True) -> str:
    """The chat prompt for one image (or none) and a question, ending where the answer starts.

    Raises ValueError where the processor has no chat template.
    """
    if processor.chat_template is None:
        raise ValueError("the processor has no chat template: set processor.chat_template first")
    content = [{"type": "image"}] * with_image + [{"type": "text", "text": question}]
    message = [{"role": "user", "content": content}]
    return processor.apply_chat_template(message, add_generation_prompt=True)


def prepare_inputs(processor: Any, rows: list[Row], device: Any = "cpu") -> Any:
    """Left-padded model inputs of rows with `image` (PIL) and `question`, on a device.

    A row's `start`, if it has one, stands where its answer begins. Returns what the processor
    gives: input_ids and attention_mask [B, T], pixel_values [B, ...].
    """
    return processor(
        images=[[r["image"].convert("RGB")] for r in rows],
        text=[build_prompt(processor, r["question"]) + r.get("start", "") for r in rows],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(device)


def special_tokens(processor: Any) -> list[str]:
    """What a tokenizer reads as more than text, the image token among it."""
    tokenizer = processor.tokenizer
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def image_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Tokens that an image of a size (width, height) adds to a prompt with its placeholder."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    images = [[Image.new("RGB", size)]]
    whole = processor(images=images, text=[text], add_special_tokens=False)["input_ids"][0]
    return len(whole) - len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def one_view(processor: Any) -> Any:
    """The processor, showing each image once and whole: tiles of it are switched off."""
    settings = processor.image_processor.to_dict()
    for name in ("do_image_splitting", "crop_to_patches", "do_pan_and_scan"):
        if settings.get(name):
            setattr(processor.image_processor, name, False)
    return processor


class ImageFeatures:
    """The projected features of images by key, up to CACHED_BYTES of them; encodes the missing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self.bytes = 0
        self.stacked = True

    def outputs(self, keys: list[Any], pixels: torch.Tensor) -> dict[str, Any]:
        """`mm_encoder_outputs` of a batch: a key and a row of pixel values [B, ...] an image."""
        row_of = {key: i for i, key in reversed(list(enumerate(keys)))}
        missing = [key for key in row_of if key not in self.known]
        if missing:
            chosen = pixels[[row_of[key] for key in missing]]
            self._add(missing, self.model.get_image_features(pixel_values=chosen).pooler_output)
        for key in keys:
            self.known.move_to_end(key)
        features: Any = [self.known[key] for key in keys]
        self._forget()
        features = torch.stack(features) if self.stacked else features
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def _add(self, keys: list[Any], features: Any) -> None:
        self.stacked = isinstance(features, torch.Tensor)  # [B, N, D]; LLaVA: a list of [N, D]
        for key, feature in zip(keys, features, strict=True):
            self.known[key] = feature.clone()  # not a view that keeps its whole batch alive
            self.bytes += feature.nbytes

    def _forget(self) -> None:
        while self.bytes > CACHED_BYTES:
            _, feature = self.known.popitem(last=False)
            self.bytes -= feature.nbytes


def _problem(row: Row) -> str | None:
    """Why a row cannot be asked, None where it can."""
    if row.get("image_id") is None:
        return "the row has no image_id"
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        return "the question is empty"
    image = row.get("image")
    if not isinstance(image, Image.Image):
        return f"image is {type(image).__name__}, not a PIL image"
    try:
        image.load()
    except Exception as error:  # decoders raise nearly anything: OSError, struct.error, bombs ...
        return f"the image cannot be read: {type(error).__name__}: {error}"
    return None


def shared_inputs(
    model: Any,
    processor: Any,
    rows: list[Row],
    features: ImageFeatures | None,
    prepare: Callable[..., Any] = prepare_inputs,
) -> Any:
    """Prepared inputs of one batch where the model reads them, in its dtype.

    Rows have `image_id`; their images are encoded once where `features` can share them.
    """
    inner = unwrap(model)
    inputs = prepare(processor, rows, input_device(inner))
    inputs["pixel_values"] = inputs["pixel_values"].to(inner.dtype)
    plain = set(inputs) == PLAIN_INPUTS and len(inputs["pixel_values"]) == len(rows)
    if features is not None and plain:
        keys = [(r["image_id"], r.get("condition")) for r in rows]
        inputs["mm_encoder_outputs"] = features.outputs(keys, inputs.pop("pixel_values"))
    return inputs


def shared_features(model: Any) -> ImageFeatures | None:
    """A store of encoded images for a model that takes them; None where it does not.

    A model with a Q-Former has the argument, but its `generate` wants pixels.
    """
    inner = unwrap(model)
    family = FAMILIES.get(inner.config.model_type)
    shares = "mm_encoder_outputs" in signature(inner.forward).parameters
    return ImageFeatures(inner) if shares and not (family and family.qformer) else None


@torch.inference_mode()
def _answer(
    model: Any, processor: Any, rows: list[Row], features: ImageFeatures | None, settings: Row
) -> list[str]:
    """The answers to one batch of rows."""
    prepare = settings.get("prepare", prepare_inputs)
    inputs = shared_inputs(model, processor, rows, features, prepare)
    drawn = {name: settings[name] for name in DRAWN if name in settings}
    draws = RowDraws([row.get("seed") for row in rows], **drawn)
    rest = {name: value for name, value in settings.items() if name not in OURS}
    said = model.generate(
        **inputs, do_sample=False, logits_processor=LogitsProcessorList([draws]), **rest
    )
    new = said[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def generate_answers(
    model: nn.Module,
    processor: Any,
    rows: Iterable[Row],
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = True,
    done: Callable[[Row, str], None] | None = None,
    total: int | None = None,
    **settings: Any,
) -> Iterator[Row]:
    """Prediction rows, in the order of the input; WINDOW * batch_size rows are held at a time.

    Args:
        model: a supported vision-language model; in eval mode while the answers are made.
        processor: its processor, with a chat template.
        rows: `id, image_id, image (PIL), question`; other keys are carried through. Rows with the
            same `image_id` and `condition` must hold the same image: it is encoded once. A row with
            `seed` (a text) is drawn with it, by `temperature` and `top_p`; others are greedy.
        max_new_tokens: bound on each answer.
        batch_size: rows in one call of `generate`; questions of like length share one.
        progress: show a progress bar.
        done: told each row and its answer as soon as there is one.
        total: how many rows there are, where `rows` has no length.
        settings: further arguments of `generate`, or `prepare`: what makes inputs of a batch
            instead of `prepare_inputs` (contrastive decoding makes two branches).

    Yields:
        The row without its image and with `prediction`; a row that cannot be asked comes back with
        `error` (the reason) and no `prediction`, and the others go on.
    """
    features, training = shared_features(model), model.training
    settings = {"max_new_tokens": max_new_tokens, **settings}
    source, total = iter(rows), len(rows) if isinstance(rows, Sized) else total
    with tqdm(total=total, desc="answering", unit="row", disable=not progress) as bar:
        while window := list(islice(source, WINDOW * batch_size)):
            model.eval()
            try:
                outcomes = _window(
                    model, processor, window, features, batch_size, settings, bar, done
                )
            finally:
                model.train(training)
            for row, outcome in zip(window, outcomes, strict=True):
                yield {**{k: v for k, v in row.items() if k != "image"}, **outcome}


def _window(
    model: nn.Module,
    processor: Any,
    rows: list[Row],
    features: ImageFeatures | None,
    batch_size: int,
    settings: Row,
    bar: tqdm,
    done: Callable[[Row, str], None] | None,
) -> list[Row]:
    """One `{"prediction"}` or `{"error"}` a row, in the rows' order."""
    problems = [_problem(row) for row in rows]
    outcomes: list[Row] = [{"error": problem} for problem in problems]
    asked = [i for i, problem in enumerate(problems) if problem is None]
    asked.sort(key=lambda i: (len(rows[i]["question"]), str(rows[i]["image_id"]), i))
    bar.update(len(rows) - len(asked))
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        said = _answer(model, processor, [rows[i] for i in batch], features, settings)
        for i, text in zip(batch, said, strict=True):
            outcomes[i] = {"prediction": text}
            if done is not None:
                done(rows[i], text)
        bar.update(len(batch))
    return outcomes


@torch.inference_mode()
def next_token_log_probabilities(
    model: Any,
    processor: Any,
    rows: Iterable[Row],
    options: Sequence[str],
    batch_size: int = 8,
    total: int | None = None,
) -> Iterator[list[float]]:
    """How probable each option is as the next token after a row's prompt and its `start`.

    Args:
        model, processor: as in `generate_answers`; the model should be in eval mode.
        rows: `image_id, image (PIL), question, start`; one batch of them is held at a time.
        options: texts that are one token each after the rows' `start`.
        batch_size: rows in one forward pass.
        total: how many rows there are, for the progress bar.

    Yields:
        The natural logarithms of the options' probabilities, for each row in order.

    Raises:
        ValueError: where the tokenizer does not make one token of an option.
    """
    features, source = shared_features(model), iter(rows)
    with tqdm(total=total, desc="choosing", unit="row") as bar:
        while batch := list(islice(source, batch_size)):
            wanted = [[_token_after(processor, r["start"], o) for o in options] for r in batch]
            inputs = shared_inputs(model, processor, batch, features)
            logits = model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
            bar.update(len(batch))
            yield from logits.gather(-1, torch.tensor(wanted, device=logits.device)).tolist()


def _token_after(processor: Any, start: str, option: str) -> int:
    before, after = (processor.tokenizer(t).input_ids for t in (start, start + option))
    if after[:-1] != before:
        raise ValueError(f"the tokenizer does not make one token of {option!r} after {start!r}")
    return after[-1]
