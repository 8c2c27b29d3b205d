"""Instruction data, end to end: by rule exactly, by a scripted server strictly, and killed."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as parquet
import pytest
from datasets import load_dataset
from PIL import Image

from firsthand.datasets_scripts.scenes import scenes
from firsthand.processing.instructions import KINDS
from firsthand.recipes import cli, instruction_rules
from firsthand.recipes.augment_lrv import Wanted, augment
from firsthand.recipes.chart_rules import chart_instructions
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.inputs import stored_image
from firsthand.recipes.train_instruction import load_instructions

REGIONS = ["a red kite", "two men on a beach", "a brown dog"]
BOXES = [(8, 8, 8, 8), (40, 40, 20, 6), (5, 30, 10, 10), (1, 2, 3, 4)]


def vg(image_id, phrases=REGIONS):
    regions = [
        {"region_id": n, "phrase": phrase, "x": x, "y": y, "width": w, "height": h}
        for n, (phrase, (x, y, w, h)) in enumerate(zip(phrases, BOXES, strict=False))
    ]
    return {"id": image_id, "regions": regions}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "VG_100K_2").mkdir(parents=True)
    for number in range(6):
        place = folder / "VG_100K_2" if number == 5 else folder
        Image.new("RGB", (64, 48), (9 * number, 80, 40)).save(place / f"{number}.jpg")
    return folder


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def rows_of(out, folder="data"):
    files = sorted((out / folder).glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


class Server(ThreadingHTTPServer):
    """Answers with `script(kind, text)` and keeps what it answered in `asked`.

    Once it has answered `stop_at` requests it answers no more until `go` is set.
    """

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked = script, []
        self.stop_at, self.go = 10**9, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def kind_of(text):
    signs = ("is not in this one", "takes for granted", "wrong piece of knowledge")
    return next((k for k, s in zip(KINDS[1:], signs, strict=True) if s in text), KINDS[0])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = payload["messages"][0]["content"]
        if len(self.server.asked) >= self.server.stop_at:
            self.server.go.wait(120)
            return
        said = self.server.script(kind_of(text), text)
        if said is not None:
            self.server.asked.append(text)
        choice = {"index": 0, "message": {"role": "assistant", "content": said}}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        body |= {"choices": [{**choice, "finish_reason": "stop"}]}
        data = json.dumps(body if said is not None else {"error": {"message": "no"}}).encode()
        self.send_response(200 if said is not None else 400)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    running = Server(scripted)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


GOOD = {
    "positive": [("object attribute detection", "What color is the kite?", "It is red.")],
    "nonexistent object": [("zebra", "Where does the zebra stand?", "There is no zebra here.")],
    "existent object": [("the dog", "Why is the dog blue?", "The dog is brown.")],
    "knowledge": [("kite", "Is the kite a kind of fish?", "No, a kite is a toy that flies.")],
}


def reply(kind, entries):
    first = "task" if kind == "positive" else "object"
    listed = [{first: a, "instruction": q, "answer": said} for a, q, said in entries]
    return json.dumps({"instructions": listed})


def scripted(kind, text):
    return reply(kind, GOOD[kind])


def asked(data, out, images, server, **options):
    return augment(data, out, str(images), "endpoint", (server.url, "m"), wanted=Wanted(**options))


def test_what_a_model_writes_becomes_rows(images, server, tmp_path):
    data = write(tmp_path / "region_descriptions.json", [vg(0), vg(5, REGIONS[::-1])])
    counts = asked(data, tmp_path / "out", images, server)
    assert (counts["instructions"], counts["positive"], counts["negative"]) == (8, 2, 6)
    assert len(server.asked) == 8
    told = server.asked[0]
    assert "- a red kite [8, 8, 8, 8]" in told and "- two men on a beach [40, 40, 20, 6]" in told
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert rows.column_names == ["image_id", "image", "question", "answer", "task", "polarity"]
    assert [r["image_id"] for r in rows] == ["0"] * 4 + ["5"] * 4
    assert rows[0]["question"] == "What color is the kite?" and rows[7]["image"].size == (64, 48)
    assert [r["task"] for r in rows][:4] == ["object attribute detection", *KINDS[1:]]
    assert len(load_instructions(str(tmp_path / "out"), "train")) == 8


REFUSED = {  # kind -> entries and why each is refused
    "positive": [
        (("object attribute detection", "What?", "word " * 31), "answer too long: 31 words"),
        (("object attribute detection", "what COLOR is the kite", "Red."), "duplicate"),
        (("object attribute detection", "At X: 20, what is it?", "A kite."), "leaks the prompt"),
        (("object attribute detection", "Why?", "The description provided says so."), "leaks"),
        (("dancing", "Who dances?", "Nobody."), "unknown task: dancing"),
        (("object attribute detection", " ", "Red."), "empty"),
    ],
    "nonexistent object": [
        (("dogs", "How many dogs sleep?", "There are no dogs."), "named in the captions: 'dogs'"),
        (("person", "Who sings?", "There is no person."), "named in the captions: 'person'"),
        (("", "What is there?", "Nothing."), "named in the captions: ''"),
        (("zebra", "Is the zebra wet?", "Yes, it is wet."), "agrees"),
        (("zebra", "Is it old?", "There is no mention of a zebra."), "leaks the prompt"),
    ],
    "existent object": [
        (("cat", "Why is the cat red?", "It is not."), "not named in the captions")
    ],
    "knowledge": [(("car", "Is the car a fruit?", "No."), "not named in the captions: 'car'")],
}


def test_what_cleaning_refuses_is_kept_with_its_reason(images, server, tmp_path):
    server.script = lambda kind, text: reply(kind, GOOD[kind] + [e for e, _ in REFUSED[kind]])
    data = write(tmp_path / "a.json", [vg(0)])
    counts = asked(data, tmp_path / "out", images, server)
    assert counts["instructions"] == 4
    rejected = rows_of(tmp_path / "out", "rejected")
    expected = [(e, why) for kind in KINDS for e, why in REFUSED[kind]]
    assert len(rejected) == len(expected)
    for row, ((_, question, _), why) in zip(rejected, expected, strict=True):
        assert row["reason"].startswith(why) and row["question"] == " ".join(question.split())
        assert row["image_id"] == "0"
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| rejected: named in the captions | 3 |" in card and "| instructions | 4 |" in card


def test_replies_are_read_strictly(images, server, tmp_path, monkeypatch):
    """A wrong entry costs itself, a wrong reply its kind, no reply at all the image."""
    from firsthand.processing import endpoint

    monkeypatch.setattr(endpoint.Endpoint.__init__, "__defaults__",
                        (None, None, 8, 1, 60.0, 0.01, (0.0, 0.0)))  # fmt: skip

    def script(kind, text):
        if "silent" in text:
            return None
        if kind == "positive":
            entry = {"task": "object counting", "instruction": "How many men?", "answer": 2}
            good = {"task": "object counting", "instruction": "How many dogs?", "answer": "One."}
            return json.dumps({"instructions": [entry, "text", good]})
        replies = {"knowledge": '{"instructions": []}', "existent object": "Here you are: {}"}
        return replies.get(kind) or reply(kind, GOOD[kind])

    server.script = script
    data = write(tmp_path / "a.json", [vg(0), vg(1, ["silent night", "a dog"])])
    counts = asked(data, tmp_path / "out", images, server)
    assert counts["instructions"] == 2 and counts["dropped image: no reply"] == 1
    reasons = [row["reason"] for row in rows_of(tmp_path / "out", "rejected")]
    assert [reason.split(":")[0] for reason in reasons] == [
        "invalid entry", "invalid entry", "no reply", "no reply"
    ]  # fmt: skip
    assert "answer must be text" in reasons[0] and "the reply is not JSON" in reasons[2]


def test_a_server_that_is_down_stops_the_run(images, server, tmp_path):
    server.script = lambda kind, text: None
    data = write(tmp_path / "a.json", [vg(0)])
    with pytest.raises(ValueError, match="answered none of 4 requests"):
        asked(data, tmp_path / "out", images, server)
    server.script = scripted
    assert asked(data, tmp_path / "out", images, server)["instructions"] == 4


def test_bad_records_are_dropped_with_their_reason(images, tmp_path):
    (images / "torn.jpg").write_bytes(b"no image")
    lines = [
        vg(0),
        "not JSON",
        {"id": 1},
        {"id": 99, "regions": vg(0)["regions"]},
        {"id": "torn", "regions": vg(0)["regions"]},
        {"id": 2, "regions": [{"phrase": "x", "x": 1}]},
        {"id": 3, "regions": [{"phrase": " ", "bbox": [1, 2, 3, 4]}]},
        {"regions": vg(0)["regions"]},
        {"id": 4, "regions": [{"phrase": "x", "bbox": 7}]},
        {"id": "../secret", "regions": vg(0)["regions"]},
    ]
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(text))
    augment(str(tmp_path / "a.jsonl"), tmp_path / "out", str(images))
    dropped = rows_of(tmp_path / "out" / "images", "dropped")
    assert [row["record"] for row in dropped] == text[1:], "they are kept as they were given"
    kinds = ["invalid JSON", "no regions", "missing image", "corrupt image", "invalid region",
             "invalid region", "no image_id", "invalid record", "no image"]  # fmt: skip
    assert [row["dropped"].split(": ")[1] for row in dropped] == kinds
    assert {row["image_id"] for row in rows_of(tmp_path / "out")} == {"0"}


@pytest.fixture(scope="module")
def by_rule(tmp_path_factory):
    """The demo's scenes with instructions of the offline generator."""
    out = tmp_path_factory.mktemp("scenes") / "out"
    augment("scenes", out, wanted=Wanted(12, 6), split="validation")
    return out


def test_rules_say_only_what_the_scenes_hold(by_rule):
    """Every answer of the offline generator is checked against the scenes, by parsing it."""
    truth = {row["id"]: row["objects"] for row in load_scenes("validation")}
    rows = rows_of(by_rule)
    assert {row["image_id"] for row in rows} == set(truth)
    seen = Counter(row["polarity"] for row in rows)
    for row in rows:
        there = {o["noun"]: o for o in truth[row["image_id"]]}
        for noun, what in claims(row["question"], row["answer"]):
            assert (noun in there) == (what != "absent"), row
            if what in scenes.POSITIONS:
                assert there[noun]["position"] == what, row
            elif what not in ("there", "absent"):
                assert there[noun]["color"] == what, row
        if row["polarity"] == "negative":
            assert not row["answer"].startswith("Yes"), row
    checked = sum(bool(claims(r["question"], r["answer"])) for r in rows)
    assert checked > 0.9 * len(rows) and min(seen.values()) > 500


NOUN = "|".join(sorted(scenes.NOUNS, key=len, reverse=True))
THING = rf"(?:an? |the )?({NOUN})"


def claims(question, answer):
    """(noun, absent / there / colour / position) of what an answer says, by patterns of its own."""
    text = answer.lower()
    if found := re.search(rf"there (?:is|are) no ({NOUN}) in", text):
        return [(found[1], "absent")]
    found = re.findall(rf"{THING} (?:is|are) in the ({'|'.join(scenes.POSITIONS)})", text)
    found += re.findall(rf"{THING} ({'|'.join(scenes.POSITIONS)})[,.]", text)
    found += re.findall(rf"the ({NOUN}) (?:is|are) (\w+)(?:, not \w+)?\.", text)
    if letter := re.match(r"([a-d])\) (\w+)\.", text):
        color = re.search(rf"{letter[1].upper()}\) (\w+)", question)[1]
        assert color == letter[2]
        return [(re.search(rf"the ({NOUN})\?", question)[1], color)]
    if found:
        return found
    there = re.search(rf"(?:there (?:is|are)|the image shows) {THING}", text)
    there = there or re.match(rf"{THING} (?:is|are) there", text)
    place = re.search(rf"in the ({'|'.join(scenes.POSITIONS)}) of", question)
    return [(there[1], place[1] if place else "there")] if there else []


def test_a_place_is_told_of_what_has_one_and_never_denied_of_what_reaches_there():
    wall = {"caption": "a white wall", "bbox": [0, 0, 90, 60]}
    sign = {"caption": "a red sign", "bbox": [5, 5, 40, 10]}  # top left, and beyond
    record = {"image_id": "1", "regions": [wall, sign], "captions": [], "table": [], "title": ""}
    for seed in range(20):
        made = instruction_rules.generate(record, (90, 60), {}, 50, 50, seed)
        said = {one["question"]: one["answer"] for one in made}
        assert not any("wall" in q and " in the " in a for q, a in said.items() if "Where" in q)
        assert said["Where is the sign?"] == "The sign is in the top left."
        assert "Is the sign in the top left?" not in said
    assert instruction_rules.touched_places(sign["bbox"], (90, 60)) == {"top left", "top"}
    assert len(instruction_rules.touched_places(wall["bbox"], (90, 60))) == 9


def test_a_seed_draws_other_instructions_and_only_it(images, tmp_path):
    data, made = write(tmp_path / "a.json", [vg(n) for n in range(5)]), {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        augment(data, tmp_path / name, str(images), wanted=Wanted(3, 1, seed=seed))
        made[name] = [(r["image_id"], r["question"], r["answer"]) for r in rows_of(tmp_path / name)]
    assert made["a"] == made["b"] != made["c"]


def test_images_are_stored_once_and_unharmed(by_rule):
    rows = rows_of(by_rule)
    distinct = {row["image_id"]: row["image"]["bytes"] for row in rows}
    size = sum(file.stat().st_size for file in (by_rule / "data").glob("*.parquet"))
    assert size < 1.3 * sum(map(len, distinct.values()))
    first = load_scenes("validation", 1)[0]
    stored = next(r for r in rows if r["image_id"] == first["id"])["image"]
    assert stored_image(stored).tobytes() == first["image"].convert("RGB").tobytes()


def test_coco_knows_kinds_and_captions(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (90, 90)).save(tmp_path / "images" / "x7.jpg")
    things = [("dog", "animal", [0, 0, 30, 30]), ("car", "vehicle", [60, 60, 30, 30])]
    instances = {
        "images": [{"id": 7, "file_name": "x7.jpg"}],
        "categories": [{"id": n, "name": c, "supercategory": k} for n, (c, k, _) in
                       enumerate(things)],
        "annotations": [{"image_id": 7, "category_id": n, "bbox": b} for n, (_, _, b) in
                        enumerate(things)],
    }  # fmt: skip
    said = {"annotations": [{"image_id": 7, "caption": "A dog beside a car."}]}
    augment(
        write(tmp_path / "instances.json", instances), tmp_path / "out", str(tmp_path / "images"),
        captions=write(tmp_path / "captions.json", said), wanted=Wanted(40, 20),
    )  # fmt: skip
    rows = {row["question"]: row for row in rows_of(tmp_path / "out")}
    assert rows["Describe the image."]["answer"] == "A dog beside a car."
    assert rows["Where is the dog?"]["answer"] == "The dog is in the top left."
    assert rows["How many objects are there?"]["answer"] == "There are two."
    false = rows["Is the dog in the category vehicle?"]
    assert (false["task"], false["polarity"]) == ("knowledge", "negative")
    assert false["answer"] == "No, the dog is in the category animal."


SALES = [("Spain", 3, 1.5), ("Peru", 7, 2.5), ("Chad", 5, 0.5)]


def test_a_chart_is_asked_about_its_table(tmp_path):
    (tmp_path / "charts").mkdir(), (tmp_path / "images").mkdir()
    with (tmp_path / "charts" / "sales.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("country", "sales", "growth"), *SALES])
    columns = {"columns": ["country", "sales", "growth"], "rows": SALES}
    write(tmp_path / "charts" / "again.json", columns)
    write(tmp_path / "charts" / "bad.json", [{"a": 1}])
    write(tmp_path / "charts" / "twice.json", [{"c": "Peru", "n": 7}, {"c": "Peru", "n": 3}])
    for name in ("sales", "again", "bad", "twice"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{name}.png")
    counts = augment(
        str(tmp_path / "charts"), tmp_path / "out", str(tmp_path / "images"), wanted=Wanted(50, 50)
    )
    assert counts["dropped image: invalid table"] == 1
    assert counts["dropped image: no instruction"] == 1
    made = {(r["image_id"], r["question"]): r for r in rows_of(tmp_path / "out")}
    values = {c: {"sales": sales, "growth": growth} for c, sales, growth in SALES}
    false = r"The (\w+) of (\w+) is ([\d.]+), not ([\d.]+)\."
    for name in ("sales", "again"):
        rows = {question: row for (image, question), row in made.items() if image == name}
        assert rows["What is the sales of Peru?"]["answer"] == "The sales of Peru is 7."
        assert rows["Which country has the lowest growth?"]["answer"] == (
            "Chad has the lowest growth, 0.5."
        )
        turned = rows["Is the sales of Spain higher than that of Peru?"]
        assert turned["answer"] == "No, Peru has a higher sales, 7, than Spain with 3."
        kinds = {row["task"] for row in rows.values() if row["polarity"] == "negative"}
        assert kinds == set(KINDS[1:])
        for row in rows.values():
            if row["task"] == "knowledge":
                said = re.fullmatch(false, row["answer"])
                assert float(said[3]) == values[said[2]][said[1]] != float(said[4])


def test_a_table_with_two_rows_of_one_label_makes_no_instruction():
    """ "The sales of Peru" would be either."""
    table = [{"country": name, "sales": n} for name, n in (("Peru", 7), ("Peru", 3), ("Chad", 5))]
    assert chart_instructions({"table": table}, random.Random(0)) == []
    assert chart_instructions({"table": table[1:]}, random.Random(0))


def test_a_model_is_told_a_charts_table(server, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "c.png")
    table = {"country": [c for c, *_ in SALES], "sales": [n for _, n, _ in SALES]}
    record = {"image_id": "c", "image": "c.png", "title": "Exports", "table": table}
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    said = {
        "positive": [("value retrieval", "What did Peru sell?", "Peru sold 7.")],
        "nonexistent object": [("Peru", "Why is there no Peru?", "It is there.")],
        "existent object": [("Spain", "Why did Spain sell most?", "Peru did, with 7.")],
        "knowledge": [("Chad", "Why did Chad sell 9?", "Chad sold 5.")],
    }
    server.script = lambda kind, text: reply(kind, said[kind])
    out = tmp_path / "out"
    asked(str(tmp_path / "c.jsonl"), out, tmp_path / "images", server)
    assert [row["answer"] for row in rows_of(out)] == [
        "Peru sold 7.", "Peru did, with 7.", "Chad sold 5."
    ]  # fmt: skip
    (refused,) = rows_of(out, "rejected")
    assert refused["reason"].startswith("named in the captions: 'Peru'")
    for text in server.asked:
        assert 'under the title "Exports"' in text and '{"country": "Peru", "sales": 7}' in text
    positive = next(text for text in server.asked if kind_of(text) == "positive")
    assert "value retrieval, extreme value" in positive and "image captioning" not in positive


def test_nothing_is_asked_twice_after_kill_9(images, server, tmp_path):
    """Killed in the midst of the first shard and of the second; the same call goes on."""
    count, out = 270, tmp_path / "out"
    records = [{**vg(n, [f"kite {n}", *REGIONS]), "image": "0.jpg"} for n in range(count)]
    data = write(tmp_path / "a.json", records)
    command = ["augment", "lrv", "--data", data, "--images", images, "--out", out]
    command += ["--generator", "endpoint", "--endpoint", server.url, "--endpoint-model", "m"]
    command = [str(part) for part in (*command, "--negatives", 0)]
    for number, stop_at in enumerate((60, 266)):  # 8 at most are asked again after the first
        server.stop_at, limit = stop_at, time.monotonic() + 120
        running = subprocess.Popen(
            [sys.executable, "-m", "firsthand.recipes.cli", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        while len(server.asked) < stop_at:
            assert running.poll() is None and time.monotonic() < limit, "it never got there"
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        done = out / "images" / "state" / "completions"
        assert len(list(done.glob("*"))) == number and not (out / "data").exists()
    server.stop_at = 10**9
    server.go.set()
    assert cli.main(command) == 0
    assert len(set(server.asked)) == count
    again = sum(times - 1 for times in Counter(server.asked).values())
    assert again <= 2 * 8, "only what was on its way at a kill is asked again"
    assert [r["image_id"] for r in rows_of(out)] == [str(n) for n in range(count)]
    content = {p: p.read_bytes() for p in out.rglob("*.parquet")}
    answered = len(server.asked)
    assert cli.main(command) == 0
    assert {p: p.read_bytes() for p in out.rglob("*.parquet")} == content
    assert len(server.asked) == answered


WRONG = [
    (["--data", "gone.json"], "gone.json: no such file"),
    (["--images", "nowhere"], "nowhere: no such folder"),
    (["--generator", "endpoint"], "--endpoint URL --endpoint-model NAME"),
    (["--endpoint", "http://127.0.0.1:9/v1"], "go together"),
    (["--positives", "0", "--negatives", "0"], "one of them must be above 0"),
    (["--max-words", "0"], "max_words is 0"),
]


@pytest.mark.parametrize("more, told", WRONG, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_settings_that_cannot_work_are_told_first(images, tmp_path, capsys, more, told):
    data = write(tmp_path / "a.json", [vg(0)])
    out = str(tmp_path / "out")
    given = ["augment", "lrv", "--data", data, "--images", str(images), "--out", out, *more]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "data").exists()


def test_json_of_another_layout_is_refused(images, tmp_path, capsys):
    data = write(tmp_path / "a.json", {"key": "value"})
    given = ["augment", "lrv", "--data", data, "--images", str(images)]
    assert cli.main([*given, "--out", str(tmp_path / "out")]) == 2
    assert "none of the layouts" in capsys.readouterr().err


def test_another_run_in_the_same_folder_is_refused(images, tmp_path):
    data = write(tmp_path / "a.json", [vg(0)])
    augment(data, tmp_path / "out", str(images))
    with pytest.raises(ValueError, match="other steps or another source"):
        augment(data, tmp_path / "out", str(images), wanted=Wanted(seed=1))
