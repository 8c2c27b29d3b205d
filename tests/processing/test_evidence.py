"""The signals of a word, each against what the model says when it is asked directly."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_image, tiny_llava, tiny_processor

from firsthand.modeling import explain
from firsthand.modeling.head_attention import head_attention
from firsthand.processing.answered import forced
from firsthand.processing.compactness import consistency, dispersion
from firsthand.processing.evidence import evidence
from firsthand.processing.self_check import yes_over_no

QUESTION, ANSWER = "What is in the image?", "a dog, a cup."
WORDS = [(2, 5), (9, 12)]


@pytest.fixture(scope="module")
def tiny():
    return tiny_llava(), tiny_processor(), tiny_image()


@pytest.fixture(scope="module")
def found(tiny):
    return evidence(*tiny, QUESTION, ANSWER, WORDS)


def test_words_keep_their_place(found):
    assert [(w["text"], w["span"]) for w in found] == [("dog", [2, 5]), ("cup", [9, 12])]


def test_relevancy_and_likelihood_are_those_of_explain(tiny, found):
    whole = explain(*tiny, QUESTION, ANSWER, baseline="blank")
    for word in found:
        direct = whole.span(*word["span"])
        first = whole.image[direct.tokens[0]]
        assert word["log_probability"] == pytest.approx(np.log(direct.probability), rel=1e-4)
        assert word["log_likelihood_ratio"] == pytest.approx(direct.log_likelihood_ratio, rel=1e-4)
        assert np.allclose(word["token_map"], first / first.sum(), atol=1e-5)
        assert word["relevancy_ads"][0] == pytest.approx(float(dispersion(first.numpy())))
        share = whole.visual_contribution[direct.tokens[0]]
        assert word["visual_contribution"] == pytest.approx(float(share), rel=1e-4)
        odds = yes_over_no(*tiny, [word["text"]])
        assert word["yes_over_no"] == pytest.approx(odds[word["text"]])


@torch.no_grad()
def test_attention_and_states_are_the_models(tiny, found):
    model, processor, image = tiny
    asked = forced(model, processor, image, QUESTION, ANSWER)
    states = model(**asked.inputs, output_hidden_states=True).hidden_states
    on_image = asked.inputs["input_ids"][0] == model.config.image_token_id
    for word in found:
        tokens = asked.tokens(*word["span"])
        rows = head_attention(model, asked.inputs, asked.producers(tokens[:1])).mean(1)[:, 0]
        assert word["attention_share"] == pytest.approx(rows.sum((-2, -1)).tolist(), rel=1e-5)
        assert word["attention_ads"] == pytest.approx(dispersion(rows.numpy()).tolist())
        state = states[1][0]  # behind the first layer
        cosines = torch.cosine_similarity(state[asked.first + tokens[-1]], state[on_image], dim=-1)
        assert word["cgc"][0] == pytest.approx(float(consistency(cosines.numpy())), abs=1e-5)
        relevancy = torch.tensor(word["token_map"]).flatten()
        mean = float(cosines @ relevancy)
        assert word["relevancy_cgc"][0] == pytest.approx(mean, abs=1e-4)


def test_no_word_asks_nothing(tiny):
    assert evidence(None, None, None, QUESTION, ANSWER, []) == []
