"""What speaks for a word of an answer: all the signals that a hallucination warning can read.

What it is: for each word the probability of its tokens, their likelihood ratio against a blank
image, what the model says when it is asked whether the thing is there, and, at the token that
decides the word (its first one), relevancy and attention over the image with their compactness. One
explanation and one more forward pass, and a backward and a forward pass a word.
What it is not: a verdict (warning.py), or a choice of words.

    found = evidence(model, processor, image, "Describe the image.", "a dog, a cup.", [(2, 5)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from firsthand.modeling import explain
from firsthand.modeling.explanation import Explanation, tokens_within
from firsthand.modeling.families import image_mask, unwrap
from firsthand.modeling.head_attention import head_attention
from firsthand.modeling.logit_lens import layer_states
from firsthand.processing.answered import forced
from firsthand.processing.compactness import TOP, consistency, dispersion, similarities
from firsthand.processing.generation import one_view
from firsthand.processing.self_check import yes_over_no

LEAST = 1e-30  # of a probability, before its logarithm
Span = tuple[int, int]
Evidence = dict[str, Any]


def evidence(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    answer: str,
    words: Sequence[Span],
    top: float = TOP,
) -> list[Evidence]:
    """The signals of each word, as plain numbers and lists that JSON holds.

    Args:
        model, processor: a supported model whose decoder sees the image as a grid of tokens.
        image: any PIL image.
        question, answer: what was asked, and the answer, without spaces around it.
        words: (first character, last + 1) in the answer of each word.
        top: share of the patches that `compactness` takes for foreground.

    Returns:
        A dict a word, in order: `text`, `span`; `log_probability` of its tokens together, nats;
        `log_likelihood_ratio`, of them against a blank image, nats; `yes_over_no`, log-odds that
        the model says that the word is in the image when asked; `visual_contribution`, 0 to 1, and
        `contribution_max` (largest image relevancy over largest of text, >= 0); per decoder
        layer (L numbers) `attention_share` (of the mean head on the image, 0 to 1), `attention_ads`
        (its dispersion, 0 to 1), `cgc` (grounding consistency of the word's last token, -1 to 1),
        `relevancy_cgc` (its mean cosine, weighted by relevancy, -1 to 1); `relevancy_ads` (of the
        relevancy of image tokens and of patches); and the maps `attention_map` [R][C] (mean over
        layers and heads), `token_map` [R][C] and `map` [r][c] (relevancy), which sum to 1.

    Raises:
        ValueError: as `explain`, `forced`, `head_attention` and `yes_over_no`.
    """
    if not words:
        return []
    processor = one_view(processor)
    shown = [answer[slice(*span)] for span in words]
    explanation, first = _explained(model, processor, image, question, answer, words)
    rows, cosines = _looked(model, processor, image, question, answer, words)
    odds = yes_over_no(model, processor, image, shown)
    found = []
    for number, span in enumerate(words):
        row = explanation.selected.index(first[number])
        text = shown[number]
        said: Evidence = {"text": text, "span": list(span), "yes_over_no": odds[text]}
        said |= _likelihood(explanation, tokens_within(explanation.spans, *span))
        said |= _relevancy(explanation, row, cosines[number], top)
        found.append(said | _attention(rows[number], cosines[number], top))
    return found


def _explained(
    model: Any, processor: Any, image: Any, question: str, answer: str, words: Sequence[Span]
) -> tuple[Explanation, list[int]]:
    """The explanation of the tokens that decide the words, and their indices."""
    ids = processor.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    inside = [tokens_within(ids["offset_mapping"], *span) for span in words]
    if missing := [answer[slice(*w)] for w, found in zip(words, inside, strict=True) if not found]:
        raise ValueError(f"no token of the answer lies in {missing}")
    first = [tokens[0] for tokens in inside]
    wanted = sorted(set(first))
    explained = explain(model, processor, image, question, answer, tokens=wanted, baseline="blank")
    return explained, first


def _looked(
    model: Any, processor: Any, image: Any, question: str, answer: str, words: Sequence[Span]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A word each: the mean head's attention [L, R, C], and the cosines with the image [L, N]."""
    inner = unwrap(model)
    asked = forced(model, processor, image, question, answer)
    tokens = [asked.tokens(*span) for span in words]
    image_at = image_mask(inner, asked.inputs["input_ids"])[0].nonzero()[:, 0].cpu()
    read = torch.tensor([asked.first + inside[-1] for inside in tokens])
    with layer_states(inner, torch.cat([image_at, read])) as states:
        heads = head_attention(
            model, asked.inputs, asked.producers([inside[0] for inside in tokens])
        )
    after = torch.stack([state.float().cpu() for state in states[1:]]).numpy()
    seen, words_read = after[:, : len(image_at)], after[:, len(image_at) :]
    cosines = [similarities(words_read[:, i], seen) for i in range(len(words))]
    rows = heads.mean(1).numpy()
    return [rows[:, i] for i in range(len(words))], cosines


def _likelihood(explanation: Explanation, tokens: list[int]) -> Evidence:
    chance = explanation.probability[tokens].clamp_min(LEAST).log().sum()
    assert explanation.log_likelihood_ratio is not None
    ratio = explanation.log_likelihood_ratio[tokens].sum()
    return {"log_probability": float(chance), "log_likelihood_ratio": float(ratio)}


def _relevancy(explanation: Explanation, row: int, cosines: np.ndarray, top: float) -> Evidence:
    maps = {"token_map": explanation.image[row].numpy()}
    if explanation.patches is not None:
        maps["map"] = explanation.patches[row].numpy()
    share = _shares(maps["token_map"]).ravel()
    return {
        "visual_contribution": float(explanation.visual_contribution[row]),
        "contribution_max": float(explanation.contribution("max")[row].clamp(max=1e6)),
        "relevancy_ads": [float(dispersion(m, top)) for m in maps.values()],
        "relevancy_cgc": (cosines @ share).tolist(),
    } | {name: _shares(m).round(6).tolist() for name, m in maps.items()}


def _attention(rows: np.ndarray, cosines: np.ndarray, top: float) -> Evidence:
    return {
        "attention_share": rows.sum((-2, -1)).tolist(),
        "attention_ads": dispersion(rows, top).tolist(),
        "cgc": consistency(cosines, top).tolist(),
        "attention_map": _shares(rows.mean(0)).round(6).tolist(),
    }


def _shares(values: np.ndarray) -> np.ndarray:
    """The map divided by its sum; zeros stay zeros."""
    total = values.sum()
    return values / total if total > 0 else values
