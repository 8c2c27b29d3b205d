"""The endpoint client against a scripted server that injects faults."""

import json
import random
from collections import Counter

import pytest
from scripted_endpoint import Raw, ScriptedEndpoint

from firsthand.processing.endpoint import Endpoint

KEY = "sk-secret-of-the-test"
FAULTS = {
    "429": Raw("busy", 429, {"retry-after": "0.01"}),
    "500": Raw("broken", 500),
    "timeout": Raw("late", 500, after=4),
    "truncated": Raw('{"choices": [{"mess'),
    "invalid": "no JSON at all",
    "schema": '{"m": 1}',
}


class Scripted(ScriptedEndpoint):
    """Answers `{"n": <the question's number>}`; a share of the requests meets a fault first."""

    def __init__(self, share=0.0):
        self.rng, self.share = random.Random(0), share
        self.answered, self.faults = Counter(), Counter()
        super().__init__(self.reply)

    def reply(self, payload, key):
        number = payload["messages"][-1]["content"]
        if number == "forbidden":
            return Raw(json.dumps({"error": {"message": f"bad key {KEY}"}}), 401)
        fault = self.rng.choice(list(FAULTS)) if self.rng.random() < self.share else None
        self.faults[fault] += 1
        if fault:
            return FAULTS[fault]
        self.answered[number] += 1
        return json.dumps({"n": int(number)})


@pytest.fixture
def serve():
    running = []

    def start(**settings):
        running.append(Scripted(**settings))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def question(number):
    return [{"role": "user", "content": str(number)}]


def number_of(text):
    value = json.loads(text)
    if set(value) != {"n"}:
        raise ValueError("expected the key n alone")
    return value["n"]


def test_faults_lose_nothing_and_ask_nothing_twice(serve, tmp_path):
    server = serve(share=0.2)
    endpoint = Endpoint(
        server.url, "m", KEY, tmp_path, concurrency=16, max_retries=12, timeout=2.0, backoff=0.01
    )
    replies = endpoint.ask_many([question(i) for i in range(300)], number_of, progress=False)
    assert [r.value for r in replies] == list(range(300))
    assert set(server.answered.values()) == {1}
    assert all(server.faults[f] for f in FAULTS), server.faults
    report = endpoint.report()
    assert report["answered"] == 300
    # a fault that the server counts while its client has gone is the timeout's
    assert report["retried"] == sum(server.faults[f] for f in FAULTS)
    again = Endpoint(server.url, "m", KEY, tmp_path)
    asked = sum(server.faults.values())
    replies = again.ask_many([question(i) for i in range(300)], number_of, progress=False)
    assert all(r.cached for r in replies) and sum(server.faults.values()) == asked


def test_equal_requests_are_asked_once(serve):
    server = serve()
    replies = Endpoint(server.url, "m").ask_many([question(7)] * 5, progress=False)
    assert len({r.text for r in replies}) == 1 and server.answered["7"] == 1


def test_settings_are_part_of_the_key(serve, tmp_path):
    server = serve()
    endpoint = Endpoint(server.url, "m", cache_dir=tmp_path)
    for seed in (0, 1, 0):
        endpoint.ask(question(3), seed=seed)
    assert server.answered["3"] == 2


def test_a_failure_is_a_reply_with_its_reason(serve, tmp_path):
    server = serve(share=1.0)
    endpoint = Endpoint(server.url, "m", KEY, tmp_path, max_retries=1, timeout=0.2, backoff=0.01)
    reply = endpoint.ask(question(1), number_of)
    assert reply.value is None and "2 tries" in reply.error
    assert not list(tmp_path.rglob("*.json"))


def test_a_refusal_is_final_and_the_key_stays_secret(serve, tmp_path, caplog):
    server = serve()
    endpoint = Endpoint(server.url, "m", KEY, tmp_path)
    reply = endpoint.ask(question("forbidden"))
    assert reply.error.startswith("HTTP 401")
    assert endpoint.report() == {"failed": 1, "fault: HTTP 401": 1, "dollars": 0.0}
    endpoint.ask(question(2))
    kept = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    for text in (reply.error, repr(endpoint), kept, caplog.text, str(endpoint.report())):
        assert KEY not in text
    assert server.keys == {KEY}


def test_an_unreachable_server_is_a_failure(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", max_retries=1, backoff=0.01)
    assert "2 tries" in endpoint.ask(question(1)).error


def test_tokens_of_refused_answers_are_paid_for_and_unsaid_ones_are_not(serve):
    """An answer that `parse` refuses costs as much; a server may not say what it took."""
    endpoint = Endpoint(serve().url, "m", max_retries=1, backoff=0.01)
    assert "asked for" in endpoint.ask(question(1), json_list).error
    assert endpoint.report()["prompt_tokens"] == 20
    bare = json.dumps({"choices": [{"message": {"content": "yes"}}], "usage": {"tokens": 3}})
    with ScriptedEndpoint(lambda payload, key: Raw(bare)) as server:
        endpoint = Endpoint(server.url, "m")
        assert endpoint.ask(question(1)).text == "yes"
    assert endpoint.report() == {"answered": 1, "dollars": 0.0}


def json_list(text):
    if not isinstance(json.loads(text), list):
        raise ValueError("expected a list")


def test_price(serve):
    endpoint = Endpoint(serve().url, "m", price=(1.0, 2.0))
    endpoint.ask_many([question(i) for i in range(10)], progress=False)
    assert endpoint.report()["dollars"] == pytest.approx((100 * 1.0 + 50 * 2.0) / 1e6)
