"""`firsthand measure` through its front door: figures, truth, budgets, judges, bad input."""

import json
import math
from functools import partial

import pytest
from measuring import (
    CHAIR,
    OBJECTS,
    compared,
    measured,
    questions,
    refused,
    rows_of,
    run,
    save,
    save_captions,
)
from scripted_endpoint import ScriptedEndpoint

from firsthand.metrics import chair, pope
from firsthand.recipes import cli, measure
from firsthand.recipes.inputs import read_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_captions(tmp_path)
    return tmp_path


def test_chair_of_every_caption(folder):
    found = measured(*CHAIR, "--details", "details.jsonl", "--max-new-tokens", 32, "--split", "val")
    assert found["chair_s"]["value"] == 2 / 4
    assert found["chair_i"]["value"] == 2 / 5
    assert found["recall"]["value"] == 3 / 5
    assert found["mean_length"]["value"] == 16 / 4
    one = found["chair_i"]
    assert 0 <= one["low"] <= 2 / 5 <= one["high"] <= 1
    assert (one["arm"], one["split"], one["n"]) == ("plain", "val", 4)
    about = one["protocol"]
    assert (about["variant"], about["lexicon_hash"]) == ("original", chair.COCO.hash)
    assert (about["prompt"], about["max_new_tokens"], about["n_ids"]) == ("Describe.", 32, 4)
    details = read_rows("details.jsonl")
    assert [row["id"] for row in details] == list("abcd")
    words = {key: details[0][key] for key in ("words", "nodes", "hallucinated")}
    assert words == {
        "words": ["dog", "cat", "car"],
        "nodes": ["dog", "cat", "car"],
        "hallucinated": [False, True, False],
    }


def test_gzipped_rows_give_the_same_results(folder):
    plain = measured(*CHAIR)
    save("rows.jsonl.gz", rows_of())
    packed = ("chair", "--predictions", "rows.jsonl.gz", "--objects", "objects.json")
    assert measured(*packed) == plain


def test_each_variant_is_named_in_its_results(folder):
    for variant in ("sima", "objhal", "fixed"):
        found = measured(*CHAIR, "--variant", variant)
        assert found["chair_i"]["protocol"]["variant"] == variant
        assert (
            found["chair_i"]["value"] == chair.score(rows_of(), OBJECTS, variant=variant)["chair_i"]
        )


def test_options_name_what_the_metrics_have():
    parsers = {"chair": ("variant", chair.VARIANTS), "pope": ("parser", pope.PARSER_NAMES)}
    for metric, (option, names) in parsers.items():
        for name in names:
            words = ["measure", metric, "--predictions", "x", f"--{option}", name]
            assert vars(cli.build_parser().parse_args(words))[option] == name
        with pytest.raises(SystemExit):
            cli.build_parser().parse_args([*words[:-1], "none-such"])


def coco(folder):
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "car"}, {"id": 3, "name": "cat"}]
    images = [{"id": number} for number in (1, 2, 3, 4)]
    shown = [(1, 1), (1, 2), (2, 3)]
    instances = {
        "images": images,
        "categories": categories,
        "annotations": [{"image_id": i, "category_id": c} for i, c in shown],
    }
    captions = {"images": images, "annotations": [{"image_id": 3, "caption": "A big truck."}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps(captions))


def test_ground_truth_of_coco_files(folder):
    coco(folder)
    words = ("chair", "--predictions", "rows.jsonl", "--coco-instances", "instances.json")
    without = measured(*words)["chair_i"]
    assert without["value"] == 2 / 5
    with_captions = measured(*words, "--coco-captions", "captions.json")["chair_i"]
    assert with_captions["value"] == 1 / 5  # a reference caption names the truck of image 3
    prints = [row["protocol"]["fingerprint"] for row in (without, with_captions)]
    assert prints[0] != prints[1]
    (folder / "objects.json").write_text(json.dumps(OBJECTS | {"4": [], "99": ["dog"]}))
    same = measured(*CHAIR)["chair_i"]["protocol"]["fingerprint"]
    assert same == prints[0]  # the same truth of the scored images, from elsewhere


def test_own_nouns(folder):
    (folder / "nouns.txt").write_text("dog\ncar\ncat\nbus\nperson\n")
    found = measured(*CHAIR, "--nouns", "nouns.txt")
    assert found["chair_i"]["value"] == 1 / 4  # a truck is no object here


@pytest.mark.parametrize("variant", ["original", "sima", "objhal"])
@pytest.mark.parametrize("budget", [("--at-words", 4), ("--at-recall", 0.4)])
def test_a_budget_cuts_captions_and_keeps_its_intervals(folder, capsys, variant, budget):
    found = measured(*CHAIR, "--variant", variant, *budget)
    cut = chair.at_length if budget[0] == "--at-words" else chair.at_recall
    expected = cut(rows_of(), OBJECTS, budget[1], variant=variant)
    for name, row in found.items():
        assert row["value"] == pytest.approx(expected[name], nan_ok=True), name
        assert row["low"] <= row["value"] <= row["high"]
    assert {"chair_s", "chair_i", "recall", "coverage", "mean_length"} <= set(found)
    assert f"budget_words: {expected['budget_words']}" in capsys.readouterr().out
    told = found["recall"]["protocol"]["variant"]
    assert told in (f"{variant}, first 4 words", f"{variant}, cut at recall 0.4")


def test_nothing_mentioned_is_nan_with_a_count(folder, capsys):
    save("rows.jsonl", rows_of(dict.fromkeys("ab", "Nothing to see.") | {"c": ""}))
    found = measured(*CHAIR)
    assert math.isnan(found["chair_i"]["value"]) and found["chair_i"]["n"] == 3
    assert found["chair_s"]["value"] == 0
    out = capsys.readouterr().out
    assert "chair_i: nan (undefined: nothing to divide by in 3 rows)" in out
    assert "n_mentions: 0" in out and "n_silent: 3" in out and "n_empty: 1" in out

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    assert next(row for row in written if row["metric"] == "chair_i")["value"] is None


ROW = rows_of()[0]
BAD_ROWS = {
    "unknown images": ([ROW, ROW | {"id": "x", "image_id": "99"}], "No ground truth for 1 image"),
    "id twice": ([ROW, ROW], "'a' occurs twice"),
    "number for text": ([ROW | {"prediction": 7}], "type int"),
    "null for text": ([ROW | {"prediction": None}], "type NoneType"),
    "list for id": ([ROW | {"id": ["a"]}], "row 1: id is a list"),
    "list for image": ([ROW, ROW | {"image_id": {}}], "row 2: image_id is a dict"),
    "no prediction": ([{"id": "a", "image_id": "1"}], "row 1 has no prediction"),
    "no JSON": ([ROW, "{broken"], "line 2 is not JSON"),
    "no object": ([ROW, "[1]"], "line 2 is not a JSON object"),
    "empty": ([], "holds no rows"),
}


@pytest.mark.parametrize("rows, told", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_name(folder, capsys, rows, told):
    save("rows.jsonl", rows)
    line = refused(capsys, *CHAIR, "--out", "results.json")
    assert told in line and "rows.jsonl" in line
    assert not (folder / "results.json").exists()


def test_half_a_gzipped_file(folder, capsys):
    save("rows.jsonl.gz", [ROW] * 50)
    (folder / "rows.jsonl.gz").write_bytes((folder / "rows.jsonl.gz").read_bytes()[:-20])
    line = refused(capsys, "chair", "--predictions", "rows.jsonl.gz", "--objects", "objects.json")
    assert "rows.jsonl.gz is not whole" in line


TRUTH = {
    "none": ((), "needs ground truth"),
    "two": (("--objects", "objects.json", "--coco-instances", "i.json"), "needs ground truth"),
    "captions alone": (("--objects", "objects.json", "--coco-captions", "c.json"), "goes with"),
    "a list": (("--objects", "list.json"), "holds a list of 1"),
    "a COCO file": (("--objects", "captions.json"), "is a COCO annotation file"),
    "no COCO file": (("--coco-instances", "objects.json"), "a COCO file of this kind"),
    "swapped": (("--coco-instances", "captions.json"), "swapped"),
    "absent": (("--objects", "absent.json"), "absent.json"),
    "not JSON": (("--objects", "rows.jsonl"), "is no JSON"),
    "unknown noun": (("--objects", "strange.json"), "gryphon"),
    "two lexicons": (
        ("--objects", "objects.json", "--variant", "sima", "--nouns", "nouns.txt"),
        "brings a lexicon",
    ),
    "two budgets": (("--objects", "objects.json", "--at-words", 3, "--at-recall", 0.5), "give one"),
    "no words": (("--objects", "objects.json", "--at-words", 0), "at least 1"),
    "out of reach": (("--objects", "objects.json", "--at-recall", 1), "out of reach"),
}


@pytest.mark.parametrize("words, told", TRUTH.values(), ids=TRUTH)
def test_bad_ground_truth_and_options_are_refused(folder, capsys, words, told):
    coco(folder)
    (folder / "list.json").write_text("[1]")
    (folder / "strange.json").write_text(json.dumps({str(i): ["gryphon"] for i in range(1, 5)}))
    (folder / "nouns.txt").write_text("dog\n")
    assert told in refused(capsys, "chair", "--predictions", "rows.jsonl", *words)


def test_skipped_rows_are_counted_and_keep_their_reason(folder, capsys):
    bad = [ROW, ROW | {"id": "x", "image_id": "99"}, ROW | {"id": "y", "prediction": 5}]
    failed = [{"id": "z", "image_id": "1", "error": "no image"}, {"image_id": "1"}]
    save("rows.jsonl", [*rows_of(), *bad, *failed])
    clean = chair.score(rows_of(), OBJECTS)
    found = measured(*CHAIR, "--skip-bad", "--details", "details.jsonl")
    assert found["chair_i"]["value"] == clean["chair_i"] and found["chair_i"]["n"] == 4
    out = capsys.readouterr().out
    assert "n_skipped: 4" in out and "n_errors: 1" in out
    skipped = [row for row in read_rows("details.jsonl") if "reason" in row]
    assert {row["id"] for row in skipped} == {"a", "x", "y", None}
    cut = measured(*CHAIR, "--skip-bad", "--at-words", 4)
    assert cut["recall"]["value"] == chair.at_length(rows_of(), OBJECTS, 4)["recall"]


def test_captions_of_one_image_are_resampled_together(folder):
    rows = [ROW | {"id": f"{ROW['id']}{k}"} for k in range(20)]
    save("rows.jsonl", [*rows, *rows_of()[2:3]])
    both = measured(*CHAIR)["chair_i"]
    assert both["low"] == pytest.approx(1 / 3) and both["high"] == 1.0  # two images, not 21 rows


POPE = ("pope", "--predictions", "pope.jsonl")


def test_pope_and_its_details(folder):
    save("pope.jsonl", questions(["Yes.", "Yes.", "A dog.", "no"]))
    found = measured(*POPE, "--details", "details.jsonl")
    assert found["pope_accuracy"]["value"] == 0.5
    assert found["pope_accuracy"]["protocol"]["variant"] == "strict"
    parsed = [(row["answer"], row["parsed"]) for row in read_rows("details.jsonl")]
    assert parsed == [("yes", "yes"), ("no", "yes"), ("yes", None), ("no", "no")]
    assert measured(*POPE, "--parser", "pope")["pope_accuracy"]["value"] == 0.75


def test_pope_with_its_published_questions(folder, capsys):
    rows = questions(["Yes.", "Yes.", "Yes.", "no"])
    published = [
        {
            "question_id": int(row["id"]),
            "image": row["image_id"],
            "text": "?",
            "label": row["answer"],
        }
        for row in rows
    ]
    save("questions.json", published)
    save("pope.jsonl", [{"id": row["id"], "prediction": row["prediction"]} for row in rows])
    words = (*POPE, "--questions", "questions.json")
    assert measured(*words)["pope_accuracy"]["value"] == 0.75
    save("pope.jsonl", [{"id": row["id"], "prediction": row["prediction"]} for row in rows[:3]])
    assert "1 questions have no answer, e.g. 3" in refused(capsys, *words)
    assert measured(*words, "--skip-bad")["pope_accuracy"]["n"] == 3


def amber_folder(folder):
    annotations = [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    ]
    files = {"annotations.json": annotations, "relation.json": {"dog": ["puppy"], "cat": []}}
    (folder / "data").mkdir()
    for name, content in files.items():
        (folder / "data" / name).write_text(json.dumps(content))
    (folder / "data" / "safe_words.txt").write_text("")


def test_amber_in_its_own_files_and_in_rows(folder, capsys):
    amber_folder(folder)
    said = [{"id": 1, "response": "A puppy and a cat."}, {"id": 2, "response": "No."}]
    (folder / "said.json").write_text(json.dumps(said))
    save("said.jsonl", [{"id": row["id"], "prediction": row["response"]} for row in said])
    assert "--amber-data" in refused(capsys, "amber", "--predictions", "said.json")
    for path in ("said.json", "said.jsonl"):
        words = ("amber", "--predictions", path, "--amber-data", "data")
        found = measured(*words, "--details", "details.jsonl")
        assert found["amber_chair"]["value"] == 0.5 and found["amber_chair"]["n"] == 1
        assert found["amber_accuracy"]["value"] == 1.0
        assert found["amber_chair"]["protocol"]["variant"] == "amber_exact"
        assert read_rows("details.jsonl")[0]["words"] == ["puppy", "cat"]
    words = ("said.jsonl", "said.jsonl", "--metric", "amber", "--amber-data", "data")
    assert compared(*words)["amber_cover", "said.jsonl (a) - said.jsonl (b)"]["value"] == 0


def test_mementos(folder, capsys):
    groups = {"objects": [["dog", "puppy"], ["ball"]], "behaviours": [["run", "running"]]}
    told = {"1": "A puppy runs after a ball.", "2": "A ball."}
    (folder / "keywords.json").write_text(json.dumps(groups))
    (folder / "references.json").write_text(json.dumps(told))
    rows = [{"id": i, "image_id": i, "prediction": "A dog is running."} for i in (1, 2)]
    save("rows.jsonl", rows)
    words = ("mementos", "--predictions", "rows.jsonl", "--references", "references.json")
    assert "--keywords" in refused(capsys, *words)
    found = measured(*words, "--keywords", "keywords.json", "--details", "details.jsonl")
    assert found["mementos_objects_recall"]["value"] == 0.25
    assert found["mementos_behaviours_recall"]["n"] == 1
    assert found["mementos_objects_f1"]["protocol"]["lexicon_hash"]
    assert read_rows("details.jsonl")[0]["said"] == ["dog"]
    (folder / "keywords.json").write_text("{")
    assert "keywords.json is no JSON" in refused(capsys, *words, "--keywords", "keywords.json")


@pytest.fixture
def judge():
    """Rates 6 what ends in a full stop and 1 what does not."""

    def answer(payload, key):
        text = payload["messages"][1]["content"].split("Answer to check: ")[1]
        rating = 6 if text.split("\n")[0].endswith(".") else 1
        return "?" if "nonsense" in text else json.dumps({"reason": "r", "rating": rating})

    with ScriptedEndpoint(answer) as server:
        yield server


def test_mmhal_asks_a_judge_once(folder, capsys, judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    rows = [
        {"id": i, "image_id": str(i), "question": "?", "answer": "A dog.", "prediction": text}
        for i, text in enumerate(["A dog.", "A cat"])
    ]
    save("rows.jsonl", rows)
    words = ("mmhal", "--predictions", "rows.jsonl")
    assert "2 answers have no rating" in refused(capsys, *words)
    asks = ("--endpoint", judge.url, "--judge-model", "judge")
    found = measured(*words, *asks, "--cache", "cache", "--details", "rated.jsonl")
    assert found["mmhal_score"]["value"] == 3.5
    assert found["mmhal_hallucination_rate"]["value"] == 0.5
    assert "judge judge, prompt" in found["mmhal_score"]["protocol"]["variant"]
    assert judge.keys == {"secret-key"} and len(judge.asked) == 2
    assert measured(*words, *asks, "--cache", "cache") == found
    assert len(judge.asked) == 2  # all from the cache
    again = measured("mmhal", "--predictions", "rated.jsonl")  # rated rows need no judge
    assert again["mmhal_score"]["value"] == 3.5
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert kept and not any(b"secret-key" in path.read_bytes() for path in kept)
    same = compared("rows.jsonl", "rows.jsonl", "--metric", "mmhal", *asks, "--cache", "cache")
    assert same["mmhal_score", "rows.jsonl (a) - rows.jsonl (b)"]["value"] == 0


def test_a_judge_that_cannot_be_read(folder, capsys, judge, monkeypatch):
    monkeypatch.setattr(measure, "Endpoint", partial(measure.Endpoint, max_retries=0))
    row = {"id": 0, "image_id": "0", "question": "?", "answer": "A dog."}
    save("rows.jsonl", [row | {"prediction": "nonsense."}])
    words = ("mmhal", "--predictions", "rows.jsonl", "--endpoint", judge.url)
    assert "--judge-model" in refused(capsys, *words)
    assert run(*words, "--judge-model", "judge") == 2
    assert "rated none of 1 answers" in capsys.readouterr().err


def test_an_interval_needs_every_caption_once(folder):
    """The budget's columns, caption by caption, add up to the whole's figure."""
    words = ["measure", *CHAIR, "--at-words", "3"]
    args = cli.build_parser().parse_args(words)
    found = measure.scorer_of(args, "chair")("rows.jsonl", rows_of())
    whole = chair.at_length(rows_of(), OBJECTS, 3)
    for name, columns in found.pairs.items():
        numerator, denominator = columns.sum(axis=0)
        assert numerator / denominator == pytest.approx(whole[name])
        assert found.ids[name] == list("abcd") and len(columns) == 4
