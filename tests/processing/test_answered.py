"""Answers are found token by token, in every family's own template."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PARTIAL, TINY, tiny_image, tiny_processor

from firsthand.processing.answered import forced, generated

ANSWER = "a dog top left, a cup & 3 träger."


@pytest.mark.parametrize("family", sorted(TINY))
def test_tokens_are_found_by_their_characters(family):
    model, processor = TINY[family](), tiny_processor(family)
    asked = forced(model, processor, tiny_image(), "What is it?", ANSWER)
    ids, tokenizer = asked.inputs["input_ids"][0], processor.tokenizer
    assert tokenizer.decode(ids[asked.first : asked.first + len(asked.spans)]) == ANSWER
    for word in ("dog", "cup", "träger"):
        start = ANSWER.index(word)
        tokens = asked.tokens(start, start + len(word))
        text = tokenizer.decode([ids[asked.first + t] for t in tokens])
        assert word in text and len(text) <= len(word) + 1
    assert asked.producers([0]) == [asked.first - 1]
    with torch.no_grad():
        assert model(**asked.inputs).logits.shape[1] == len(ids)


def test_a_prompt_that_is_read_in_both_directions_is_refused():
    model, processor = PARTIAL["paligemma"](), tiny_processor("paligemma")
    with pytest.raises(ValueError, match="'paligemma'.*both directions"):
        forced(model, processor, tiny_image(), "What is it?", ANSWER)
    with pytest.raises(ValueError, match="'paligemma'.*both directions"):
        generated(model, processor, tiny_image(), "What is it?")


@settings(deadline=None)
@given(st.text(alphabet="adogcup ,.", min_size=1, max_size=30).filter(str.strip))
def test_any_answer_round_trips(answer):
    model, processor = TINY["internvl"](), tiny_processor("internvl")
    asked = forced(model, processor, tiny_image(), "What?", answer)
    covered = "".join(answer[a:b] for a, b in asked.spans)
    assert covered.strip() == answer.strip()


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_models_own_answer_can_be_read_again(family):
    model, processor = TINY[family](), tiny_processor(family)
    asked = generated(model, processor, tiny_image(), "What is it?", max_new_tokens=6)
    ids = asked.inputs["input_ids"]
    assert len(asked.spans) == ids.shape[1] - asked.first <= 6
    with torch.no_grad():
        said = model(**asked.inputs).logits[0, asked.first - 1 : -1].argmax(-1)
    assert said.tolist() == ids[0, asked.first :].tolist()  # greedy, and the cache agrees


def test_empty_answers_and_templates_that_drop_them_are_refused():
    model, processor = TINY["llava"](), tiny_processor("llava")
    with pytest.raises(ValueError, match="the answer is empty"):
        forced(model, processor, tiny_image(), "What?", "  ")
    processor.chat_template = processor.chat_template.replace("part['text']", "'x'")
    with pytest.raises(ValueError, match="does not keep the answer"):
        forced(model, processor, tiny_image(), "What?", "a dog")
