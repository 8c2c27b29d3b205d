"""Key expressions from a model behind an endpoint: asked once, parsed strictly, failures kept."""

import base64
import io
import json

import pyarrow.parquet as parquet
import pytest
from PIL import Image
from scripted_endpoint import Raw, ScriptedEndpoint

from firsthand.recipes import conversations
from firsthand.recipes.augment_fivl import AskExpressions, ReadRecord, run_steps

REPLIES = {  # by the question
    "one": ["red kite", "dragon", "None"],
    "two": ["dog"],
    "three": [],
}


class Server(ScriptedEndpoint):
    """Answers by REPLIES; a question about "four" is refused, and all are where `down` is set."""

    def __init__(self):
        self.down = False
        super().__init__(self.reply)

    def reply(self, payload, key):
        question = question_of(payload)
        if self.down or question not in REPLIES:
            return Raw('{"error": {"message": "no"}}', 400)
        return json.dumps({"key_expressions": REPLIES[question]})


def question_of(payload):
    image, text = payload["messages"][0]["content"]
    return text["text"].split("Question: ")[1].split("\n")[0]


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (64, 48), (200, 0, 0)).save(tmp_path / "a.png")
    said = [
        {"from": "human", "value": "<image>\none"},
        {"from": "gpt", "value": "A red kite."},
        {"from": "human", "value": "two"},
        {"from": "gpt", "value": "Yes"},
    ]
    text = [{"from": "human", "value": "three"}, {"from": "gpt", "value": "No image here."}]
    refused = [{"from": "human", "value": "four"}, {"from": "gpt", "value": "A cat."}]
    records = [
        {"id": "a", "image": "a.png", "conversations": said},
        {"id": "b", "conversations": text},
        {"id": "c", "image": "a.png", "conversations": text},
        {"id": "d", "image": "a.png", "conversations": refused},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "a.jsonl"


def ask(data, server):
    """The two steps; expressions come out before any mask is looked for."""
    out, images = data.parent / "out", str(data.parent)
    asking = AskExpressions(server.url, "m", str(out / "state" / "requests"))
    about = {"data": conversations.fingerprint(str(data), "train")}
    counts = run_steps(
        str(data), out, [ReadRecord(images), asking], about, images, "train", workers=1
    )
    rows = {
        folder: [
            row
            for file in sorted((out / folder).glob("*.parquet"))
            for row in parquet.read_table(file).to_pylist()
        ]
        for folder in ("data", "dropped")
    }
    return counts, rows["data"], rows["dropped"]


def test_expressions_are_asked_for_with_the_image(server, data):
    counts, rows, dropped = ask(data, server)
    assert counts == {"kept": 3, "dropped": 1}
    first, second = rows[0]["turns"]
    assert [e["text"] for e in first["expressions"]] == ["red kite"]
    (yes,) = second["expressions"]
    assert (yes["text"], yes["phrase"]) == ("Yes", "dog")
    reasons = {r["text"]: r["reason"].split(":")[0] for r in rows[0]["rejected"]}
    assert reasons == {"dragon": "not in the answer", "None": "a refusal"}
    assert rows[1]["image"] is None and rows[2]["turns"][0]["expressions"] == []
    assert dropped[0]["dropped"].startswith("AskExpressions: no reply: turn 1: HTTP 400")
    assert sorted(map(question_of, server.asked)) == ["four", "one", "three", "two"]
    url = server.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert image.size == (64, 48) and image.getpixel((5, 5))[0] > 190
    assert server.asked[0]["temperature"] == 0


def test_a_rerun_asks_only_what_was_not_answered(server, data):
    before = ask(data, server)
    (data.parent / "out" / "state" / "completions" / "00000").unlink()
    asked = len(server.asked)
    assert ask(data, server) == before
    assert list(map(question_of, server.asked[asked:])) == ["four"]


def test_a_server_that_is_down_stops_the_run(server, data):
    server.down = True
    with pytest.raises(ValueError, match="answered none of 4 requests"):
        ask(data, server)
    assert not (data.parent / "out" / "state" / "completions" / "00000").exists()
    server.down = False
    assert ask(data, server)[0] == {"kept": 3, "dropped": 1}
