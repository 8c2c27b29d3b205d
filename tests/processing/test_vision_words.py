"""Words of image tokens: spellings merged, areas exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from firsthand.processing.collator import word_token
from firsthand.processing.vision_words import best_iou, read_words, region_iou, spellings_of

TOKENIZER = tiny_tokenizer()


def logits_of(*tokens: int) -> torch.Tensor:
    logits = torch.full((len(tokens), len(TOKENIZER)), -5.0)
    for place, token in enumerate(tokens):
        logits[place, token] = 5.0
    return logits


def token(text: str) -> int:
    (found,) = TOKENIZER(text, add_special_tokens=False).input_ids
    return found


def test_spellings_of_one_word_count_together():
    spaced, bare = token(" dog"), word_token(TOKENIZER, "cup")
    full_stop, special = token("."), TOKENIZER.eos_token_id
    reading = read_words(
        TOKENIZER, logits_of(spaced, bare, full_stop, special, spaced, bare), (2, 3)
    )
    assert reading.labels == [["dog", "cup", None], [None, "dog", "cup"]]
    assert reading.words == ["dog", "cup"] and reading.share("dog") == pytest.approx(1 / 3)
    assert reading.region("cup").tolist() == [[False, True, False], [False, False, True]]
    soft = reading.soft("dog")
    spelled = sorted(spellings_of(TOKENIZER, "dog"))
    expected = reading.logits.softmax(-1)[:, spelled].sum(-1).view(2, 3)
    assert np.allclose(soft, expected, atol=1e-6) and soft[0, 0] > 0.9 > soft[0, 1]


def test_a_piece_stands_for_the_word_that_is_asked_for():
    piece = word_token(TOKENIZER, "dogma")
    assert str(TOKENIZER.decode([piece])).strip() == "dog"
    assert read_words(TOKENIZER, logits_of(piece), (1, 1), words=["dogma"]).labels == [["dogma"]]
    assert read_words(TOKENIZER, logits_of(piece), (1, 1), words=["cup"]).labels == [["dog"]]
    both = read_words(TOKENIZER, logits_of(piece), (1, 1), words=["dogma", "dog"])
    assert both.labels == [["dog"]]  # what is said whole stays whole


masks = st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=1, max_size=6)


@given(masks, st.integers(0, 63))
def test_the_best_iou_is_the_best_of_all_choices(coverage, bits):
    cover = np.array([coverage])
    ious = []
    for choice in range(1, 2 ** len(coverage)):
        region = np.array([[bool(choice >> i & 1) for i in range(len(coverage))]])
        ious.append(region_iou(region, cover))
    assert best_iou(cover) == pytest.approx(np.nanmax(ious) if cover.any() else 0.0)


def test_iou_is_that_of_pixels():
    region = np.array([[True, False], [False, True]])
    coverage = np.array([[0.5, 0.25], [0.0, 1.0]])
    assert region_iou(region, coverage) == pytest.approx(1.5 / (2 + 1.75 - 1.5))
    assert np.isnan(region_iou(np.zeros((1, 1), bool), np.zeros((1, 1))))
