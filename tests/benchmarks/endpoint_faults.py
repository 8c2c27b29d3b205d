"""The endpoint client against a server with faults, killed twice on the way: what came of it.

What it is: an acceptance run. A scripted server on loopback meets a fifth of the requests with a
fault; the client's process is ended by kill -9 twice and started again. Counted on both sides:
answers that were lost, requests asked again although their answer was kept, and whether the
client's report tells of every outcome. What it is not: a measurement of speed.

    python tests/benchmarks/endpoint_faults.py [--quick] [--requests 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from firsthand.processing.endpoint import Endpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripted_endpoint import COMPLETION_TOKENS, PROMPT_TOKENS, Raw, ScriptedEndpoint, completion

SHARE = 0.2  # of the requests that meet a fault
REFUSED = 100  # every so many questions one is refused for good
BARE = 10  # every so many questions one is answered without a count of tokens
CONCURRENCY = 32
TIMEOUT = 3.0  # seconds that the client waits for an answer
LATE = TIMEOUT + 2
NO = Raw('{"error": {"message": "no"}}', 400)
BILLED: dict[str, str | Raw] = {  # came whole, are not as asked for, and cost as much
    "text": "no JSON at all",
    "keys": '{"m": 1}',
    "no choices": Raw(json.dumps({**completion(""), "choices": []})),
}
FAULTS: dict[str, tuple[str | Raw, str]] = {  # what is sent, and what the client calls it
    "busy": (Raw("busy", 429, {"retry-after": "0.02"}), "HTTP 429"),
    "busy, no number": (Raw("busy", 429, {"retry-after": "soon"}), "HTTP 429"),
    "broken": (Raw("broken", 500), "HTTP 500"),
    "silent": (Raw("late", 500, after=LATE), "APITimeoutError"),
    "reset": (Raw(reset=True), "APIConnectionError"),
    "cut short": (Raw(json.dumps(completion("1")), short=9), "APIConnectionError"),
    "truncated": (Raw('{"choices": [{"mess'), "not as asked for"),
    "a page": (Raw("<html>", headers={"content-type": "text/html"}), "not as asked for"),
    "no object": (Raw("null"), "not as asked for"),
    "refused": (NO, "HTTP 400"),
    **{name: (sent, "not as asked for") for name, sent in BILLED.items()},
}
MET = sorted(FAULTS.keys() - {"refused"})  # by any question


class Faulty:
    """Answers question n by `{"n": n}`; which tries meet a fault hangs on n and the try alone.

    `answered` and `faults` count per client, which its API key tells. A client is killed when its
    answers reach the number in `kill_at`.
    """

    def __init__(self, kill_at: dict[str, int]) -> None:
        self.kill_at, self.pids = kill_at, dict[str, int]()
        self.tries: Counter[int] = Counter()
        self.answered: dict[str, Counter[int]] = {}
        self.faults: dict[str, Counter[str]] = {}
        self.closed = threading.Event()

    def __call__(self, payload: dict[str, Any], key: str) -> str | Raw:
        if self.closed.is_set():
            return NO
        number = int(payload["messages"][-1]["content"])
        self.tries[number] += 1
        if number % REFUSED == 0:
            self.faults.setdefault(key, Counter())["refused"] += 1
            return NO
        rng = random.Random(f"{number}/{self.tries[number]}")
        if rng.random() < SHARE:
            fault = rng.choice(MET)
            self.faults.setdefault(key, Counter())[fault] += 1
            return FAULTS[fault][0]
        answered = self.answered.setdefault(key, Counter())
        answered[number] += 1
        if answered.total() == self.kill_at.get(key):
            os.kill(self.pids[key], signal.SIGKILL)
        text = json.dumps({"n": number})
        bare = Raw(json.dumps({**completion(text), "usage": {"tokens": "many"}}))
        return bare if number % BARE == 1 else text


def number_of(text: str) -> int:
    """The n of `{"n": n}`; ValueError for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict) or set(value) != {"n"}:
        raise ValueError("expected the key n alone")
    return value["n"]


def questions(count: int) -> list[list[dict[str, str]]]:
    """Requests 0..count-1."""
    return [[{"role": "user", "content": str(n)}] for n in range(count)]


def ask(url: str, cache: str, count: int, key: str) -> None:
    """The client's process: ask everything, print the values and the report."""
    endpoint = Endpoint(
        url,
        "scripted",
        key,
        cache,
        concurrency=CONCURRENCY,
        max_retries=12,
        timeout=TIMEOUT,
        backoff=0.01,
        price=(1.0, 2.0),
    )
    replies = endpoint.ask_many(questions(count), number_of, progress=False)
    values = [r.value if r.error is None else r.error.split(":")[0] for r in replies]
    print(json.dumps({"values": values, "report": endpoint.report()}))


def kept(server: ScriptedEndpoint, faulty: Faulty, cache: str, count: int) -> set[int]:
    """The questions that are answered from disk, for the server is closed meanwhile."""
    faulty.closed.set()
    endpoint = Endpoint(server.url, "scripted", "look", cache, CONCURRENCY, max_retries=0)
    replies = endpoint.ask_many(questions(count), number_of, progress=False)
    faulty.closed.clear()
    return {n for n, reply in enumerate(replies) if reply.cached}


def fault_run(count: int, cache: str) -> dict[str, Any]:
    """Three clients, two of them killed at a quarter and a half of the answers; what was counted.

    Returns:
        `lost`: questions without their right answer, or refusal, in the end. `asked_again`:
        requests that came although the answer was kept. `answered_twice`: answers that a killed
        client had not yet kept. `unreported`: outcomes of the last client that its report counts
        otherwise than the server, as (report, server).
    """
    faulty = Faulty({"run-0": count // 4, "run-1": count // 4})
    on_disk: list[set[int]] = [set()]
    asked_again, ends, told = 0, [], ""
    with ScriptedEndpoint(faulty) as server:
        for key in ("run-0", "run-1", "run-2"):
            before = faulty.tries.copy()
            command = [sys.executable, __file__, "--client", server.url, cache, str(count), key]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                faulty.pids[key] = process.pid
                told, _ = process.communicate()
            ends.append(process.returncode)
            asked_again += sum(faulty.tries[n] - before[n] for n in on_disk[-1])
            on_disk.append(kept(server, faulty, cache, count))
    if ends != [-signal.SIGKILL, -signal.SIGKILL, 0]:
        raise RuntimeError(f"the clients ended with {ends}, not killed, killed and done")
    found = json.loads(told)
    right = [n if n % REFUSED else "HTTP 400" for n in range(count)]
    answers = sum(faulty.answered.values(), Counter())
    return {
        "requests": count,
        "tries": faulty.tries.total(),
        "faults": sum(faulty.faults.values(), Counter()),
        "kept_after_each_run": [len(numbers) for numbers in on_disk[1:]],
        "lost": sum(a != b for a, b in zip(found["values"], right, strict=True)),
        "asked_again": asked_again,
        "answered_twice": sum(times - 1 for times in answers.values()),
        "unreported": unreported(found["report"], faulty, "run-2", len(on_disk[2])),
        "report": found["report"],
    }


def unreported(
    report: dict[str, Any], faulty: Faulty, key: str, cached: int
) -> dict[str, tuple[Any, Any]]:
    """Where a client's report and the server's counts differ: name -> (report, server)."""
    faults, answered = faulty.faults[key], faulty.answered[key]
    refused = faults["refused"]
    expected = Counter({"answered": answered.total(), "cached": cached, "failed": refused})
    expected["retried"] = faults.total() - refused
    for name, times in faults.items():
        expected[f"fault: {FAULTS[name][1]}"] += times
    counted = sum(times for number, times in answered.items() if number % BARE != 1)
    counted += sum(faults[name] for name in BILLED)
    expected["prompt_tokens"] = counted * PROMPT_TOKENS
    expected["completion_tokens"] = counted * COMPLETION_TOKENS
    dollars = (expected["prompt_tokens"] + 2 * expected["completion_tokens"]) / 1e6
    server = {**expected, "dollars": round(dollars, 6)}
    names = report.keys() | server.keys()
    both = {name: (report.get(name, 0), server.get(name, 0)) for name in sorted(names)}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="The endpoint client under faults and kill -9.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="400 requests")
    parser.add_argument("--client", nargs=4, metavar=("URL", "CACHE", "COUNT", "KEY"))
    args = parser.parse_args()
    if args.client:
        url, cache, count, key = args.client
        return ask(url, cache, int(count), key)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        found = fault_run(400 if args.quick else args.requests, cache)
    for name, value in found.items():
        print(f"{name}: {dict(value) if isinstance(value, Counter) else value}")
    print(f"seconds: {time.perf_counter() - start:.0f}")
    agree = not (found["lost"] or found["asked_again"] or found["unreported"])
    agree = agree and found["answered_twice"] <= 2 * CONCURRENCY  # under way when killed
    rate = sum(found["faults"].values()) / found["tries"]
    line = {"name": "endpoint_faults", "ratio": None, "ours": found["lost"], "theirs": None}
    print(json.dumps({**line, "unit": f"lost at {rate:.0%} faults", "agree": agree}))


if __name__ == "__main__":
    main()
