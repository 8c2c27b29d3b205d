"""The endpoint client against a scripted server that injects faults."""

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from firsthand.processing.endpoint import Endpoint

KEY = "sk-secret-of-the-test"
FAULTS = ("429", "500", "timeout", "truncated", "invalid", "schema")


class Scripted:
    """Answers `{"n": <the question's number>}`; a share of the requests meets a fault first."""

    def __init__(self, share=0.0, seed=0):
        self.rng, self.share = random.Random(seed), share
        self.answered, self.faults, self.keys = Counter(), Counter(), set()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        run = {"sockets": [listener]}
        self.thread = threading.Thread(target=self.server.run, kwargs=run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self):
        self.server.should_exit = True
        self.server.force_exit = True
        self.thread.join(5)

    async def chat(self, request):
        self.keys.add(request.headers["authorization"])
        asked = await request.json()
        number = asked["messages"][-1]["content"]
        if number == "forbidden":
            return JSONResponse({"error": {"message": f"bad key {KEY}"}}, 401)
        text = json.dumps({"n": int(number)})
        fault = self.rng.choice(FAULTS) if self.rng.random() < self.share else None
        self.faults[fault] += 1
        if fault == "429":
            return Response("busy", 429, {"Retry-After": "0.01"})
        if fault == "500":
            return Response("broken", 500)
        if fault == "timeout":
            await asyncio.sleep(4)
            return Response("late", 500)
        if fault == "truncated":
            return Response('{"choices": [{"mess', 200, media_type="application/json")
        if fault == "invalid":
            text = "no JSON at all"
        if fault == "schema":
            text = json.dumps({"m": 1})
        if fault is None:
            self.answered[number] += 1
        return JSONResponse(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": text},
                    }
                ],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            }
        )


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
    assert "retried" not in endpoint.report()
    endpoint.ask(question(2))
    kept = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    for text in (reply.error, repr(endpoint), kept, caplog.text, str(endpoint.report())):
        assert KEY not in text
    assert server.keys == {f"Bearer {KEY}"}


def test_an_unreachable_server_is_a_failure(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", max_retries=1, backoff=0.01)
    assert "2 tries" in endpoint.ask(question(1)).error


def test_price(serve):
    endpoint = Endpoint(serve().url, "m", price=(1.0, 2.0))
    endpoint.ask_many([question(i) for i in range(10)], progress=False)
    assert endpoint.report()["dollars"] == pytest.approx((100 * 1.0 + 50 * 2.0) / 1e6)
