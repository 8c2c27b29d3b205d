"""Responses and critique through a server: what is sent, what fails, and what is asked again."""

import json

import pyarrow.parquet as parquet
import pytest
from PIL import Image
from scripted_endpoint import Raw, ScriptedEndpoint
from tiny_models import tiny_llava, tiny_processor

from firsthand.datasets_scripts.sima import sima
from firsthand.recipes import cli


def rows_of(folder, kind: str = "data") -> list[dict]:
    files = sorted((folder / kind).glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), (9, 90, 200)).save(tmp_path / "images" / "a.png")
    records = [{"image": "a.png", "text": f"{word}?"} for word in ("one", "two", "bad")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    sima.build("prompts", tmp_path / "p.jsonl", tmp_path / "images", tmp_path / "prompts")
    return tmp_path / "prompts"


def answer(payload, key):
    image, text = payload["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    if "bad?" in text["text"]:
        return Raw('{"error": {"message": "too long"}}', status=400)
    if "Response 1: [" in text["text"]:
        first = text["text"].split("Your task")[1].split("Response 1: [")[1]
        return "So. Verdict: [[1]]" if first.startswith("drawn") else "So. Verdict: [[2]]"
    return "greedy" if payload["temperature"] == 0 else f"drawn with seed {payload['seed']}"


def test_a_server_answers_and_criticises(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ScriptedEndpoint(answer) as server:
        there = ["--endpoint", server.url, "--endpoint-model", "m"]
        responses = ["augment", "responses", "--data", str(data), "--out", str(tmp_path / "r")]
        assert cli.main([*responses, *there, "--candidates", "2", "--seed", "5"]) == 0
        assert len(server.asked) == 9 and server.keys == {"secret-key"}
        kept = rows_of(tmp_path / "r")
        assert [r["text"] for r in kept[0]["responses"]] == [
            "greedy",
            "drawn with seed 6",
            "drawn with seed 7",
        ]
        drawn = [p for p in server.asked if p["temperature"]]
        assert {(p["temperature"], p["top_p"], p["max_tokens"]) for p in drawn} == {
            (0.8, 0.9, 1024)
        }
        dropped = rows_of(tmp_path / "r", "dropped")[0]["dropped"]
        assert "HTTP 400" in dropped and "too long" in dropped
        critique = ["augment", "critique", "--data", str(tmp_path / "r"), *there, "--out"]
        assert cli.main([*critique, str(tmp_path / "c")]) == 0
        asked = len(server.asked)
        assert asked == 9 + 2 * 3 * 2  # two prompts, three pairs, both orders
        assert cli.main([*critique, str(tmp_path / "c")]) == 0 and len(server.asked) == asked
    judged = rows_of(tmp_path / "c")[0]
    assert judged["critic"] == "critic m" and judged["scores"] == [-2.0, 1.0, 1.0]
    assert "secret-key" not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))


def test_a_dead_server_loses_nothing(data, tmp_path, capsys):
    with ScriptedEndpoint(lambda payload, key: Raw("no", status=403)) as server:
        there = ["--endpoint", server.url, "--endpoint-model", "m"]
        responses = ["augment", "responses", "--data", str(data), "--out", str(tmp_path / "r")]
        assert cli.main([*responses, *there]) == 2
        told = capsys.readouterr().err
        assert "answered none of 6 requests" in told and not (tmp_path / "r" / "data").exists()


def test_gavie_marks_every_response(data, tmp_path, capsys):
    """The judge likes drawn answers, cannot be read on one prompt, and asks for regions."""

    def judge(payload, key):
        text = json.dumps(payload["messages"])
        if "Question" not in text and "temperature" in payload and "image_url" in text:
            return answer(payload, key)
        if "two?" in text:
            return "I like both."
        mark = 8 if "drawn" in text else 3
        return json.dumps(
            {"relevance_reason": "a", "relevance": 10, "accuracy_reason": "b", "accuracy": mark}
        )

    (tmp_path / "regions.json").write_text(
        json.dumps({"a": [{"caption": "a dog", "bbox": [1, 2, 20, 20]}]})
    )
    with ScriptedEndpoint(judge) as server:
        there = ["--endpoint", server.url, "--endpoint-model", "m"]
        responses = ["augment", "responses", "--data", str(data), "--out", str(tmp_path / "r")]
        assert cli.main([*responses, *there]) == 0
        command = ["augment", "critique", "--scorer", "gavie", "--data", str(tmp_path / "r")]
        command += [*there, "--out", str(tmp_path / "c")]
        assert cli.main(command) == 2 and "needs --regions" in capsys.readouterr().err
        assert cli.main([*command, "--regions", str(tmp_path / "regions.json")]) == 0
    row, dropped = rows_of(tmp_path / "c")[0], rows_of(tmp_path / "c", "dropped")[0]
    assert row["scores"] == [6.5, 9.0] and row["critic"] == "gavie m"
    assert (dropped["question"], dropped["dropped"]) == ("two?", "Gavie: unparsed")


def test_transformers_own_server_answers_and_criticises(data, tmp_path, serve, capsys):
    """A random model answers nonsense: its verdicts are unparsed, told and kept.

    The server draws only where the checkpoint's generation config does.
    """
    model, processor = tiny_llava(), tiny_processor()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=True)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    there = ["--endpoint", serve(tmp_path / "model"), "--endpoint-model", str(tmp_path / "model")]
    responses = ["augment", "responses", "--data", str(data), "--out", str(tmp_path / "r")]
    code = cli.main([*responses, *there, "--max-new-tokens", "6", "--temperature", "3"])
    assert code == 0, rows_of(tmp_path / "r", "dropped")[0]["dropped"]
    kept = rows_of(tmp_path / "r")
    assert len(kept) == 3 and all(r["text"] for row in kept for r in row["responses"])
    critique = ["augment", "critique", "--data", str(tmp_path / "r"), *there]
    assert cli.main([*critique, "--max-new-tokens", "4", "--out", str(tmp_path / "c")]) == 2
    assert "unparsed: 3" in capsys.readouterr().err
    comparisons = [row["comparisons"][0] for row in rows_of(tmp_path / "c", "dropped")]
    assert all(len(one["replies"]) == 2 and all(one["replies"]) for one in comparisons)
