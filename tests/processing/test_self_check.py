"""The yes/no question about a noun, against the model's own next-token probabilities."""

import pytest
import torch
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.processing.generation import build_prompt
from firsthand.processing.self_check import NO, YES, existence_question, yes_over_no


def test_questions_have_the_article_that_the_noun_takes():
    asked = {n: existence_question(n) for n in ("dog", "apple", "grapes", "bus", "glass", "corn")}
    assert asked["dog"] == "Is there a dog in the image?"
    assert asked["apple"] == "Is there an apple in the image?"
    assert asked["grapes"] == "Is there grapes in the image?"
    assert asked["bus"] == "Is there a bus in the image?"
    assert asked["glass"] == "Is there a glass in the image?"
    assert asked["corn"] == "Is there corn in the image?"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_odds_are_those_of_the_next_token(family):
    model, processor = TINY[family](), tiny_processor(family)
    found = yes_over_no(model, processor, tiny_image(), ["Dog", "cup", "Dog"])
    assert list(found) == ["Dog", "cup"]
    prompt = build_prompt(processor, "Is there a dog in the image?")
    inputs = processor(images=[[tiny_image()]], text=[prompt], return_tensors="pt")
    chances = model(**inputs).logits[0, -1].softmax(-1)
    first = [{processor.tokenizer(t).input_ids[0] for t in texts} for texts in (YES, NO)]
    yes, no = first[0] - first[1], first[1] - first[0]
    odds = chances[list(yes)].sum().log() - chances[list(no)].sum().log()
    assert found["Dog"] == pytest.approx(float(odds), abs=1e-4)


def test_a_tokenizer_that_begins_both_alike_is_refused():
    class Alike:
        def tokenizer(self, text, add_special_tokens):
            return {"input_ids": [0]}

    with pytest.raises(ValueError, match="the same token"):
        yes_over_no(None, Alike(), tiny_image(), ["dog"])
