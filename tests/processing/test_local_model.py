"""A language model of this process, asked as an endpoint is."""

import pytest
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from firsthand.processing.local_model import LocalModel

REQUESTS = [[{"role": "user", "content": text}] for text in ("Hello", "Is there a dog?", "Hello")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def said(replies):
    return [reply.text for reply in replies]


def test_each_request_is_answered_once_and_kept(saved, tmp_path):
    model = LocalModel(saved, tmp_path)
    settings = {"temperature": 0.0, "max_tokens": 6, "response_format": {"type": "json_object"}}
    first = model.ask_many(REQUESTS, progress=False, **settings)
    assert first[0] == first[2] and len(set(said(first))) == 2
    tokens = model.report()["completion_tokens"]
    assert model.report()["answered"] == 2 and 2 <= tokens <= 12
    again = LocalModel("gone", tmp_path)
    again.model = saved  # nothing is loaded: all is in the cache
    assert said(again.ask_many(REQUESTS, progress=False, **settings)) == said(first)
    assert again.report() == {"cached": 2, "dollars": 0.0} and "_loaded" not in vars(again)


def test_drawn_replies_belong_to_their_seed(saved):
    model = LocalModel(saved)
    one, other, same = (
        said(model.ask_many(REQUESTS[:1], progress=False, max_tokens=12, temperature=1.0, seed=s))
        for s in (0, 1, 0)
    )
    assert one == same != other


def test_a_reply_that_cannot_be_read_is_a_failure(saved, tmp_path):
    def parse(text):
        raise ValueError(f"no JSON in {text!r}")

    model = LocalModel(saved, tmp_path)
    replies = model.ask_many(REQUESTS, parse, progress=False, temperature=0.0, max_tokens=4)
    assert all(reply.error.startswith("not as asked for: no JSON") for reply in replies)
    assert model.report()["failed"] == 2


def test_what_cannot_judge_is_told(tmp_path, saved):
    with pytest.raises(ValueError, match="cannot load the language model"):
        LocalModel(str(tmp_path / "nothing")).ask_many(REQUESTS, progress=False)
