"""An OpenAI-compatible chat server on loopback that answers by a script, faults included.

What it is: raw HTTP in a thread, so that a script can also keep silent, cut an answer short or
reset the connection. What it is not: a model.

    with ScriptedEndpoint(lambda payload, key: "Yes.") as server:
        Endpoint(server.url, "scripted").ask([{"role": "user", "content": "Is it?"}])
        server.asked, server.keys
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PROMPT_TOKENS, COMPLETION_TOKENS = 10, 5  # that every answer is said to have taken


@dataclass(frozen=True)
class Raw:
    """Sent as it is, in place of a chat completion that holds a text.

    after: seconds of silence first. short: bytes of the announced body that are never sent, before
    the connection ends. reset: the connection is reset instead of answered.
    """

    body: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    short: int = 0
    reset: bool = False


def completion(text: str) -> dict[str, Any]:
    """The body of a chat completion that holds a text."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


class ScriptedEndpoint:
    """A running server. `answer`: (the request's payload, its API key) -> a text, or `Raw`."""

    def __init__(self, answer: Callable[[dict[str, Any], str], str | Raw]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def __enter__(self) -> ScriptedEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every connection and the thread."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(5)

    def _run(self, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        server = await asyncio.start_server(self._connection, sock=self._socket, backlog=512)
        started.set()
        await self._stopped.wait()
        server.close()

    async def _connection(self, reader: Any, writer: Any) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, between two requests or within one; or the server ends
        finally:
            writer.close()

    async def _one(self, reader: Any, writer: Any) -> bool:
        """Read a request and answer it; whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        payload = json.loads(await reader.readexactly(int(headers["content-length"])))
        key = headers["authorization"].removeprefix("bearer ")
        self.asked.append(payload)
        self.keys.add(key)
        said = self.answer(payload, key)
        raw = said if isinstance(said, Raw) else Raw(json.dumps(completion(said)))
        await asyncio.sleep(raw.after)
        if raw.reset:
            linger = struct.pack("ii", 1, 0)
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        body = raw.body.encode()
        lines = {"content-type": "application/json", "content-length": len(body)} | raw.headers
        told = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {raw.status} said\r\n{told}\r\n".encode())
        writer.write(body[: len(body) - raw.short])
        await writer.drain()
        return raw.short == 0
