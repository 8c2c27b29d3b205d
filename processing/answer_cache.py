"""Answers on disk, keyed by the whole request: what was answered once is never asked again.

What it is: one JSON file an answer, written aside and renamed, so it may be shared by processes and
survives kill -9. What it is not: a client; `Endpoint` and models of this process keep theirs here.

    cache = AnswerCache("cache")
    key = cache.key({"model": "org/model", "question": "What is it?"})
    if cache.get(key) is None:
        cache.put(key, "a dog")
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class AnswerCache:
    """Texts by key in a folder; None keeps nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder else None

    @staticmethod
    def key(request: Any) -> str:
        """64 hex digits of whatever JSON can hold."""
        text = json.dumps(request, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The kept text, None where there is none."""
        if self.folder is None or not self._file(key).exists():
            return None
        return json.loads(self._file(key).read_text(encoding="utf-8"))["text"]

    def put(self, key: str, text: str, **about: Any) -> None:
        """Keep a text; `about` is for people who look into the file."""
        if self.folder is None:
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({**about, "text": text}, out, ensure_ascii=False)
        os.replace(aside, file)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
