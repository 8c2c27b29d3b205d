"""A judge out of an endpoint: replies in order, failures as None, and MMHal through it."""

import json

from firsthand.metrics import mmhal
from firsthand.processing.endpoint import Endpoint, Reply
from firsthand.recipes.judge import judge_of


class Scripted(Endpoint):
    """An endpoint without a server: it rates 6 what is red, and stammers at what is blue."""

    def __init__(self):
        self.settings = []

    def ask_many(self, requests, parse=None, progress=True, **settings):
        self.settings.append(settings)
        return [self.reply(messages, parse) for messages in requests]

    def reply(self, messages, parse):
        text = json.dumps({"reason": "red", "rating": 6})
        if "blue" in messages[-1]["content"]:
            text = "Well, blue"
        try:
            return Reply(text=text, value=parse(text) if parse else text)
        except ValueError as error:
            return Reply(error=f"gave up after 6 tries: not as asked for: {error}")


ROWS = [
    {"id": i, "question": "Which colour?", "answer": "It is red.", "prediction": said}
    for i, said in enumerate(["red", "blue", "Red!"])
]


def test_replies_come_in_order_and_failures_are_none():
    requests = mmhal.build_requests(ROWS)
    texts = judge_of(Scripted())(requests)
    assert [text[:4] for text in texts] == ['{"re', "Well", '{"re']
    parsed = judge_of(Scripted(), mmhal.parse)(requests)
    assert parsed == [texts[0], None, texts[2]]
    assert judge_of(Scripted())([]) == []


def test_mmhal_is_judged_through_it():
    endpoint = Scripted()
    rated = mmhal.rate(ROWS, judge_of(endpoint, mmhal.parse, **mmhal.SETTINGS))
    result = mmhal.score(rated)
    assert (result["mmhal_score"], result["n"], result["n_unparsed"]) == (6.0, 2, 1)
    assert rated[1]["unparsed"] == "the request failed"
    assert endpoint.settings == [mmhal.SETTINGS]
