"""The judge's three questions through a real HTTP server on loopback that looks at the images."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from scripted_endpoint import ScriptedEndpoint

from firsthand.processing.messages import json_object, render
from firsthand.recipes import cli
from firsthand.recipes import measure_key_expressions as recipe
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.inputs import read_rows
from firsthand.recipes.train_vision_modeling import scene_to_sample


class Judge(ScriptedEndpoint):
    """Answers by what it is sent, and every `broken`th request with no JSON."""

    def __init__(self, broken: int = 0):
        self.broken = broken
        super().__init__(self.reply)

    def reply(self, payload, key):
        image, text = payload["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].split(",")[1])
        pixels = np.array(Image.open(io.BytesIO(data)).convert("L"))
        black = (pixels < 12).mean()
        if "degree" in text["text"]:
            reply = {"reason": "r", "degree": 7.5, "important": bool(black < 0.5)}
        elif "covers" in text["text"]:
            reply = {"reason": "r", "covers": bool(0.5 < black < 1)}
        else:
            reply = {"reason": "r", "visible": bool(black == 0)}
        if self.broken and len(self.asked) % self.broken == 0:
            return "Well, yes."
        return json.dumps(reply)


@pytest.fixture
def judge():
    with Judge() as server:
        yield server


def ask(judge: Judge, folder, *more: str) -> int:
    command = ["measure", "key-expressions", "--data", "scenes", "--split", "validation"]
    command += ["--count", "3", "--endpoint", judge.url, "--judge", "scripted"]
    command += ["--out", str(folder / "r.json"), "--details", str(folder / "d.jsonl")]
    return cli.main([*command, *more])


def test_every_expression_gets_three_answers(judge, tmp_path, capsys):
    assert ask(judge, tmp_path) == 0
    objects = sum(len(row["objects"]) for row in load_scenes("validation", 3))
    assert len(judge.asked) == 3 * objects
    found = {r["metric"]: r for r in json.loads((tmp_path / "r.json").read_text())}
    assert {m: (r["value"], r["n"]) for m, r in found.items()} == {
        "importance": (7.5, objects),
        "important": (1.0, objects),
        "segment_covers": (1.0, objects),
        "segment_exhausts": (1.0, objects),
    }
    assert found["importance"]["protocol"]["variant"] == "judge scripted"
    details = read_rows(tmp_path / "d.jsonl")
    assert len(details) == objects and details[0]["covers"] == {"reason": "r", "covers": True}
    printed = capsys.readouterr().out
    assert f"covers: {objects} of {objects} answers could be read" in printed
    assert ask(judge, tmp_path) == 0  # from the cache: nothing is asked twice
    assert len(judge.asked) == 3 * objects


def test_the_segment_and_what_is_left_are_what_is_sent():
    sample = scene_to_sample(load_scenes("validation", 1)[0])
    item = next(recipe.items([sample], None, []))
    sent = {}
    for name, (request, _) in recipe.QUESTIONS.items():
        (message,) = request(item)
        url = message["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        sent[name] = np.asarray(image.convert("RGB"), dtype=int)
    original, mask = np.asarray(item["image"], dtype=int), item["mask"]
    inner, outer = eroded(mask), eroded(~mask)
    assert sent["covers"][outer].max() < 40  # JPEG's ripples
    assert abs(sent["covers"][inner] - original[inner]).mean() < 12
    assert sent["gone"][inner].max() < 60
    assert abs(sent["gone"][outer] - original[outer]).mean() < 12
    assert abs(sent["importance"] - original).mean() < 6


def eroded(mask: np.ndarray, by: int = 8) -> np.ndarray:
    for _ in range(by):
        inner = mask.copy()
        inner[1:] &= mask[:-1]
        inner[:-1] &= mask[1:]
        inner[:, 1:] &= mask[:, :-1]
        inner[:, :-1] &= mask[:, 1:]
        mask = inner
    return mask


def test_a_later_turn_is_judged_with_its_own_question():
    first, second = (scene_to_sample(row) for row in load_scenes("validation", 2))
    turns = [
        {"question": "First?", "answer": "No.", "expressions": []},
        {**first["turns"][0], "question": "Second?"},
    ]
    for item in recipe.items([{**first, "turns": turns}], None, []):
        text = recipe.importance_request(item)[0]["content"][1]["text"]
        assert "Question: Second?" in text and "First?" not in text


def test_answers_that_cannot_be_read_are_counted_and_never_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        recipe, "Endpoint", lambda *a, **k: Endpoint(*a, **k, max_retries=0, concurrency=1)
    )
    from firsthand.processing.endpoint import Endpoint

    with Judge(broken=2) as server:
        assert ask(server, tmp_path) == 0
    found = {r["metric"]: r for r in json.loads((tmp_path / "r.json").read_text())}
    objects = sum(len(row["objects"]) for row in load_scenes("validation", 3))
    assert found["importance"]["value"] == 7.5 and 0 < found["importance"]["n"] < objects
    failed = [d for d in read_rows(tmp_path / "d.jsonl") if "error" in d["covers"]]
    assert failed and "not JSON" in failed[0]["covers"]["error"]
    assert f"of {objects} answers could be read" in capsys.readouterr().out


def test_a_dead_server_is_an_error(tmp_path, capsys, monkeypatch):
    from firsthand.processing.endpoint import Endpoint

    monkeypatch.setattr(recipe, "Endpoint", lambda *a, **k: Endpoint(*a, **k, max_retries=0))
    command = ["measure", "key-expressions", "--data", "scenes", "--split", "validation"]
    command += ["--count", "1", "--endpoint", "http://127.0.0.1:9/v1", "--judge", "x"]
    assert cli.main([*command, "--out", str(tmp_path / "r.json")]) == 2
    assert "answered none of the questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (recipe.parse_importance, "important, 7", "not JSON"),
        (recipe.parse_importance, '{"reason": "", "degree": 11, "important": true}', "outside"),
        (recipe.parse_importance, '{"reason": "", "degree": "7", "important": true}', "degree is"),
        (recipe.parse_importance, '{"reason": "", "degree": true, "important": true}', "degree"),
        (recipe.parse_covers, '{"covers": true}', "keys reason, covers"),
        (recipe.parse_covers, '{"reason": "", "covers": "yes"}', "'yes', not bool"),
        (recipe.parse_gone, '{"reason": "", "visible": true, "x": 1}', "keys reason, visible"),
    ],
)
def test_replies_are_read_strictly(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_code_fence_is_allowed():
    text = '```json\n{"reason": "", "visible": false}\n```'
    assert recipe.parse_gone(text) == {"reason": "", "visible": False}
    assert json_object('{"degree": 3}', {"degree": float}) == {"degree": 3}


def test_prompts_need_their_fields():
    assert "the dog" in render("judge_gone", phrase="the dog")
    with pytest.raises(Exception, match="phrase"):
        render("judge_gone")
