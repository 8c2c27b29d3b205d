"""`firsthand measure gavie` and `gqa`: a scripted judge, the demo's scenes by rule, joint mode."""

import json
import re
from functools import partial

import pytest
from measuring import compared, measured, run, save
from scripted_endpoint import Raw, ScriptedEndpoint

from firsthand.datasets_scripts.scenes import scenes
from firsthand.recipes import measure, measure_gavie
from firsthand.recipes.demo_data import load_scenes
from firsthand.recipes.inputs import read_rows

KEY = "sk-secret-of-the-test"
REGIONS = {
    "1": [{"caption": "a red car", "bbox": [20, 55, 120, 60]}],
    "2": [{"caption": "a cat", "bbox": [0, 0, 30, 40]}],
}


def marks(text, **more):
    """2 for what tells of a dog, 10 for the rest; and 8 for relevance."""
    accuracy = 2 if "dog" in text else 10
    said = {"relevance": 8, "accuracy": accuracy, "relevance_reason": "", "accuracy_reason": ""}
    return said | more


def reply(payload, key):
    text = payload["messages"][1]["content"]
    several = re.findall(r"^Answer (\d+): (.*)$", text, re.M)
    if several:
        listed = [marks(said, answer=int(number)) for number, said in several]
        return json.dumps({"answers": listed})
    said = re.search(r"^Answer: (.*)$", text, re.M).group(1)
    if "forbidden" in said:
        return Raw(json.dumps({"error": {"message": f"bad key {KEY}"}}), 401)
    found = marks(said)
    if "wavers" in said:
        found["accuracy"] = payload.get("seed", 0)
    return "Well, 7." if "nonsense" in said else json.dumps(found)


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    quick = partial(measure.Endpoint, max_retries=0)
    monkeypatch.setattr(measure, "Endpoint", quick)
    with ScriptedEndpoint(reply) as server:
        yield server


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regions.json").write_text(json.dumps(REGIONS))
    return tmp_path


def refused(capsys, *words):
    """The last line of a refused command; a progress bar may stand before it."""
    assert run(*words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def answers(*said):
    return [
        {"id": i, "image_id": str(i % 2 + 1), "question": "Describe.", "prediction": text}
        for i, text in enumerate(said)
    ]


def asks(judge, *more):
    words = ("--regions", "regions.json", "--endpoint", judge.url, "--judge-model", "judge")
    return ("gavie", "--predictions", "rows.jsonl", *words, "--cache", "cache", *more)


def test_a_judge_is_asked_once_with_the_regions(folder, capsys, judge):
    save("rows.jsonl", answers("A red car.", "A dog.", "A cat."))
    price = ("--price", "1", "2", "--details", "rated.jsonl")
    found = measured(*asks(judge, *price))
    assert (found["gavie_relevance"]["value"], found["gavie_relevance"]["n"]) == (8, 3)
    assert found["gavie_accuracy"]["value"] == pytest.approx(22 / 3)
    assert found["gavie_accuracy"]["low"] < 22 / 3 < found["gavie_accuracy"]["high"]
    protocol = found["gavie_accuracy"]["protocol"]
    assert re.match(r"judge judge, prompt \w{12}, single, boxes fixed, 1 s", protocol["variant"])
    assert protocol["truth_hash"]
    assert "'dollars': 6e-05" in capsys.readouterr().out  # 3 x (10 x 1 + 5 x 2) / 1e6
    assert judge.asked[0]["temperature"] == 0 and "seed" not in judge.asked[0]
    told = [payload["messages"][1]["content"] for payload in judge.asked]
    assert sum("a cat: x 0, y 0, width 30, height 40" in text for text in told) == 1
    assert measured(*asks(judge)) == found and len(judge.asked) == 3  # all from the cache
    rated = read_rows("rated.jsonl")
    assert rated[1]["ratings"][0]["accuracy"] == 2 and "regions" not in rated[1]
    again = measured("gavie", "--predictions", "rated.jsonl")  # rated rows need no judge
    assert again["gavie_accuracy"]["value"] == found["gavie_accuracy"]["value"]
    legacy = measured(*asks(judge, "--bbox-format", "legacy"))
    assert "boxes legacy" in legacy["gavie_accuracy"]["protocol"]["variant"]
    told = [payload["messages"][1]["content"] for payload in judge.asked[3:]]
    assert sum("width 120, height 120" in text for text in told) == 2


def test_samples_are_asked_with_seeds_and_have_a_spread(folder, capsys, judge):
    save("rows.jsonl", answers("It wavers.", "A cat."))
    found = measured(*asks(judge, "--samples", "3"))
    assert found["gavie_accuracy"]["value"] == 5.5
    assert found["gavie_accuracy_spread"]["value"] == 0.5  # of 0, 1, 2 and of 10, 10, 10
    assert sorted(payload["seed"] for payload in judge.asked) == [0, 0, 1, 1, 2, 2]
    assert {payload["temperature"] for payload in judge.asked} == {1}
    assert "--concurrency must" in refused(capsys, *asks(judge, "--concurrency", "0"))
    assert "--samples 0" in refused(capsys, *asks(judge, "--samples", "0"))


def test_what_cannot_be_read_is_counted_and_the_key_is_nowhere(folder, capsys, judge, caplog):
    save("rows.jsonl", answers("A cat.", "nonsense", "forbidden"))
    found = measured(*asks(judge, "--details", "rated.jsonl"))
    assert (found["gavie_accuracy"]["value"], found["gavie_accuracy"]["n"]) == (10, 1)
    printed = capsys.readouterr()
    assert "n_unparsed: 2" in printed.out and "'failed': 2" in printed.out
    assert "HTTP 401" in printed.out and "not JSON" in printed.out
    again = measured("gavie", "--predictions", "rated.jsonl")  # as it was, without a judge
    assert again["gavie_accuracy"]["n"] == 1 and "n_unparsed: 2" in capsys.readouterr().out
    save("rows.jsonl", answers("forbidden"))
    assert "marked none of 1 answers: HTTP 401" in refused(capsys, *asks(judge))
    kept = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert judge.keys == {KEY} and len(kept) > 4
    for text in (*kept, printed.out, printed.err, caplog.text, *capsys.readouterr()):
        assert KEY not in text


def test_a_model_of_this_process_judges_without_an_endpoint(folder, capsys, monkeypatch):
    said = '{"relevance_reason": "a", "relevance": 9, "accuracy_reason": "b", "accuracy": 3}'
    monkeypatch.setattr("firsthand.processing.local_model.LocalModel._say", lambda *_: said)
    save("rows.jsonl", answers("A cat.", "A dog."))
    words = ("gavie", "--predictions", "rows.jsonl", "--regions", "regions.json")
    found = measured(*words, "--judge-model", "org/judge", "--samples", "2")
    assert found["gavie_accuracy"]["value"] == 3 and found["gavie_accuracy_spread"]["value"] == 0
    assert "judge org/judge, prompt" in found["gavie_accuracy"]["protocol"]["variant"]
    assert "'answered': 4" in capsys.readouterr().out


def test_joint_mode_marks_all_files_in_one_prompt(folder, capsys, judge):
    save("rows.jsonl", answers("A red car.", "A cat."))
    save("other.jsonl", answers("A dog.", "A dog and a cat."))
    found = measured(*asks(judge, "--mode", "joint", "--others", "other.jsonl"), out="r.json")
    rows = json.loads((folder / "r.json").read_text())
    values = {(row["arm"], row["metric"]): row["value"] for row in rows}
    assert values["plain", "gavie_accuracy"] == 10 and values["other", "gavie_accuracy"] == 2
    assert len(judge.asked) == 2 and "joint of other, plain" in str(found)
    assert "needs --others" in refused(capsys, *asks(judge, "--mode", "joint"))
    assert "--others goes with" in refused(capsys, *asks(judge, "--others", "other.jsonl"))
    same = asks(judge, "--mode", "joint", "--others", "other.jsonl", "--arm", "other")
    assert "two files have one name" in refused(capsys, *same)


def test_two_files_are_compared(folder, judge):
    save("rows.jsonl", answers("A dog.", "A cat."))
    save("better.jsonl", answers("A red car.", "A cat."))
    words = ("--metric", "gavie", *asks(judge)[3:])
    found = compared("better.jsonl", "rows.jsonl", *words)
    assert found["gavie_accuracy", "better - rows"]["value"] == 4
    assert found["gavie_relevance", "better - rows"]["value"] == 0


def test_gqa_is_judged_by_the_same_client(folder, monkeypatch):
    rows = [{**row, "answer": "cat"} for row in answers("A kitten.", "A dog.")]
    save("rows.jsonl", rows)

    def verdict(payload, key):
        text = payload["messages"][1]["content"]
        return json.dumps({"reason": "r", "correct": "check: A kitten" in text})

    with ScriptedEndpoint(verdict) as server:
        words = ("gqa", "--predictions", "rows.jsonl", "--endpoint", server.url)
        found = measured(*words, "--judge-model", "m", "--details", "rated.jsonl")
    assert found["gqa_judged_accuracy"]["value"] == 0.5
    again = measured("gqa", "--predictions", "rated.jsonl")
    assert again["gqa_judged_accuracy"]["value"] == 0.5


def scene_rows():
    """Every question of two splits with its annotated answer, and the caption."""
    rows = []
    for scene in load_scenes("validation") + load_scenes("test_prior"):
        asked = scene["questions"] + [
            {"question": scenes.CAPTION_QUESTION, "answer": scene["caption"], "task": "caption"}
        ]
        for number, one in enumerate(asked):
            row = {"id": f"{scene['id']}/{number}", "image_id": scene["id"], "task": one["task"]}
            rows.append(row | {"question": one["question"], "prediction": one["answer"]})
    return rows


OFFLINE = ("gavie", "--predictions", "rows.jsonl", "--regions", "scenes", "--offline")


def test_the_rules_agree_with_every_annotated_answer_and_with_no_turned_one(folder, capsys):
    rows = scene_rows()
    save("rows.jsonl", rows)
    found = measured(*OFFLINE)
    for name in ("gavie_rule_relevance", "gavie_rule_accuracy"):
        assert (found[name]["value"], found[name]["n"]) == (10, len(rows))
    assert found["gavie_rule_accuracy"]["protocol"]["variant"] == "rule_judge"
    turned = {"Yes.": "No.", "No.": "Yes."}
    rows = [
        row | {"prediction": turned[row["prediction"]]}
        for row in rows
        if row["task"] == "existence"
    ]
    save("rows.jsonl", rows)
    found = measured(*OFFLINE)
    assert found["gavie_rule_accuracy"]["value"] == 0
    assert found["gavie_rule_relevance"]["value"] == 10
    assert "--regions scenes" in refused(capsys, *OFFLINE[:3], "--offline")
    assert "--offline" in refused(capsys, *OFFLINE, "--samples", "2")


def test_scenes_are_told_to_a_judge_in_their_own_boxes():
    scene = load_scenes("test", 1)
    (region, *_) = measure_gavie.scene_regions(scene)["test-000000"]
    assert region == {"caption": "orange balloon", "bbox": [19, 25, 79, 76]}


def test_regions_of_visual_genome_s_own_file(folder):
    region = {"region_id": 1, "phrase": "a cat", "x": 1, "y": 2, "width": 3, "height": 4}
    (folder / "vg.json").write_text(json.dumps([{"id": 7, "regions": [region]}]))
    assert measure_gavie.read_regions("vg.json") == {
        "7": [{"caption": "a cat", "bbox": [1, 2, 3, 4]}]
    }
    (folder / "vg.json").write_text(json.dumps([{"id": 7}]))
    with pytest.raises(ValueError, match="vg.json holds neither"):
        measure_gavie.read_regions("vg.json")


def test_bad_rows_are_refused_or_counted(folder, capsys, judge):
    bad = {"id": "x", "image_id": "9", "question": "?", "prediction": "A cat."}
    save("rows.jsonl", [*answers("A cat."), bad])
    assert "row 'x': no regions of the image '9'" in refused(capsys, *asks(judge))
    assert len(judge.asked) == 0
    found = measured(*asks(judge, "--skip-bad"))
    assert found["gavie_accuracy"]["n"] == 1
    assert "n_errors: 1" in capsys.readouterr().out
    assert run("gavie", "--predictions", "rows.jsonl", "--regions", "regions.json") == 2
    assert "row 'x'" in capsys.readouterr().err
    save("rows.jsonl", answers("A cat."))
    words = ("gavie", "--predictions", "rows.jsonl", "--regions", "regions.json")
    assert "1 answers have no marks: name a judge" in refused(capsys, *words)


def test_lrv_s_own_records_are_read(folder, judge):
    records = [{"image_id": "2", "question": "Describe.", "answer": "A cat."}]
    (folder / "out.json").write_text(json.dumps(records))
    words = ("gavie", "--predictions", "out.json", *asks(judge)[3:])
    assert measured(*words)["gavie_accuracy"]["value"] == 10
