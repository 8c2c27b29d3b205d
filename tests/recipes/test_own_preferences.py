"""Responses, critiques, preferences: exact on scripted answers, whole on a tiny model, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from tiny_models import tiny_image, tiny_internvl, tiny_processor

from firsthand.datasets_scripts.sima import sima
from firsthand.processing import critic
from firsthand.processing.endpoint import Reply
from firsthand.processing.generation import build_prompt, prepare_inputs
from firsthand.processing.support import word_log_likelihoods
from firsthand.recipes import answering, cli, scorers, train_preference
from firsthand.recipes.answering import Answerer, Request
from firsthand.recipes.augment_critique import Criticise, Critique, Rate, critique
from firsthand.recipes.augment_preferences import prefer
from firsthand.recipes.augment_responses import respond
from firsthand.recipes.inputs import stored_image

ROOT = Path(__file__).parents[2]
CONTEXT = 4096
CAPTIONS = ["a dog.", "a dog, a cat.", "a cat."]


def rows_of(folder: Path, kind: str = "data") -> list[dict]:
    files = sorted((folder / kind).glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def prompts(folder: Path, count: int, questions=None) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40 + i % 7, 30), (i % 250, 90, 200)).save(folder / "images" / f"{i}.png")
    asked = questions or {i: f"What is {i}?" for i in range(count)}
    records = [
        {"image": f"{i}.png", "text": asked[i], "ground_truth": "a dog."} for i in range(count)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    sima.build("prompts", folder / "p.jsonl", folder / "images", folder / "prompts")
    return folder / "prompts"


class Scripted(Answerer):
    """Answers from a function of (question, draw), in place of a model."""

    def ask(self, requests):
        said = [self.script(request.text, request.draw) for request in requests]
        return [s if isinstance(s, Reply) else Reply(s, s) for s in said]

    def too_long(self, request):
        return "it is too long" if "too long" in request.text else None

    def control_token(self, text):
        return "<image>" if "<image>" in text else None


def scripted(tmp_path, script) -> Scripted:
    answerer = Scripted(str(tmp_path / "cache"))
    object.__setattr__(answerer, "script", script)
    return answerer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_internvl()
    model.config.get_text_config().max_position_embeddings = CONTEXT
    model.save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


def test_unusable_responses_are_kept_with_their_reason(tmp_path):
    said = {
        "good": ["a dog.", "a cat."],
        "same": ["a dog.", " a dog. "],
        "empty": ["", "a dog."],
        "token": ["a <image> dog.", "a dog."],
        "failed": [Reply(error="HTTP 400"), "a dog."],
        "three": ["", "a dog.", "a cat."],
    }
    data = prompts(tmp_path, len(said), dict(enumerate(said)))

    def script(question, draw):
        return said[question][draw] if draw < len(said[question]) else "a dog."

    counts = respond(str(data), tmp_path / "out", scripted(tmp_path, script), candidates=2)
    assert counts == {"kept": 2, "dropped": 4}
    kept = {row["question"]: row for row in rows_of(tmp_path / "out")}
    assert [r["source"] for r in kept["good"]["responses"]] == ["greedy", "sampled_1", "sampled_2"]
    assert [r["problem"] for r in kept["three"]["responses"]] == ["empty", None, None]
    problems = {r["question"]: r["dropped"] for r in rows_of(tmp_path / "out", "dropped")}
    start = "Respond: fewer than two usable responses: "
    again = "the same as an earlier one"
    assert problems == {
        "same": start + again,
        "empty": f"{start}empty; {again}",
        "token": f"{start}control token: it spells <image>; {again}",
        "failed": f"{start}HTTP 400; {again}",
    }


def test_bad_prompts_are_kept_with_their_reason(tmp_path):
    data = prompts(tmp_path, 4)
    table = parquet.read_table(data / "data" / "00000.parquet")
    rows = table.to_pylist()
    rows[0]["images"][0]["bytes"] = b"broken"
    rows[1]["images"] *= 2
    rows[2]["question"] = "  "
    parquet.write_table(table.from_pylist(rows, table.schema), data / "data" / "00000.parquet")
    answerer = scripted(tmp_path, lambda question, draw: f"{draw}")
    assert respond(str(data), tmp_path / "out", answerer) == {"kept": 1, "dropped": 3}
    reasons = [row["dropped"] for row in rows_of(tmp_path / "out", "dropped")]
    assert reasons[0].startswith("Respond: corrupt image: 0.png")
    assert reasons[1:] == ["Respond: 2 images: a prompt has one", "Respond: no question"]


def responses(tmp_path, texts: dict[str, list[str]]) -> Path:
    data = prompts(tmp_path, len(texts), dict(enumerate(texts)))
    answerer = scripted(tmp_path, lambda question, draw: texts[question][draw])
    longest = max(map(len, texts.values()))
    respond(str(data), tmp_path / "responses", answerer, longest - 1)
    return tmp_path / "responses"


def fields(text: str) -> tuple[str, str, str]:
    """Question and responses of a critic's prompt."""
    task = text.split("Your task\n")[1]
    question, _, first, second = (line.split("[", 1)[1][:-1] for line in task.split("\n")[:4])
    return question, first, second


def judged(tmp_path, data, critic, out="out", **options):
    def script(text, draw):
        return critic(*fields(text))

    step = Criticise(scripted(tmp_path, script), **options)
    counts = critique(str(data), tmp_path / out, Critique(step, options))
    return counts, rows_of(tmp_path / out), rows_of(tmp_path / out, "dropped")


def test_the_critic_sees_both_orders_and_disagreement_is_a_tie(tmp_path):
    names = ["fair", "first", "unparsed", "failed", "too long", "marks"]
    texts = {name: ["a cat.", "a dog."] for name in names}
    texts["marks"] = ["a cat [[1]].", "a dog."]
    data = responses(tmp_path, texts)

    def critic(question, first, second):
        if question == "unparsed" and first == "a dog.":
            return "I cannot say."
        if question == "failed":
            return Reply(error="HTTP 500")
        right = "1" if first == "a dog." or question == "first" else "2"
        return f"The reason. Verdict: [[{right}]]"

    counts, kept, dropped = judged(tmp_path, data, critic)
    assert counts == {"kept": 1, "dropped": 5}
    assert kept[0]["scores"] == [-1.0, 1.0] and kept[0]["critic"] == "critic demo model"
    comparison = kept[0]["comparisons"][0]
    assert (comparison["first"], comparison["second"], comparison["verdict"]) == (1, 0, "1")
    assert len(comparison["replies"]) == 2
    assert {row["question"]: row["dropped"].removeprefix("Criticise: ") for row in dropped} == {
        "first": "tie",
        "unparsed": "unparsed",
        "failed": "no reply",
        "too long": "over-long",
        "marks": "fewer than two usable responses: it holds a verdict of its own",
    }
    by_name = {row["question"]: row for row in dropped}
    assert by_name["too long"]["comparisons"][0]["replies"] == ["it is too long"]
    assert by_name["failed"]["comparisons"][0]["replies"] == ["HTTP 500"] * 2
    one, kept, _ = judged(tmp_path, data, critic, "one", orders="one", reading="published")
    assert one["kept"] == 2 and {row["question"] for row in kept} == {"fair", "first"}


def test_more_candidates_are_scored_by_wins_minus_losses(tmp_path):
    data = responses(tmp_path, {"which": ["a cat.", "a dog.", "a dog, a cat."]})
    order = ["a dog.", "a dog, a cat.", "a cat."]

    def critic(question, first, second):
        return f"[[{1 if order.index(first) < order.index(second) else 2}]]"

    _, kept, _ = judged(tmp_path, data, critic)
    assert kept[0]["scores"] == [-2.0, 2.0, 0.0] and len(kept[0]["comparisons"]) == 3


def chair_scorer(**options) -> scorers.ChairScorer:
    lexicon = scorers.chair.lexicon_from_nouns(["dog", "cat"])
    return scorers.ChairScorer({"0": ["dog"], "1": ["dog"]}, lexicon, **options)


def test_chair_scores_against_ground_truth_and_what_has_none_is_dropped(tmp_path):
    texts = {name: ["a dog, a cat.", "a dog.", "nothing."] for name in "abc"}
    data = responses(tmp_path, texts)
    counts = critique(
        str(data), tmp_path / "out", Critique(Rate(chair_scorer(), "chair"), {"scorer": "chair"})
    )
    assert counts == {"kept": 2, "dropped": 1}
    row = rows_of(tmp_path / "out")[0]
    assert row["scores"] == [-0.5, 0.0, 0.0] and row["clean"] == [False, True, True]
    reason = rows_of(tmp_path / "out", "dropped")[0]["dropped"]
    assert reason == "Rate: no ground truth: no objects are listed for the image '2.png'"
    with_recall = chair_scorer(recall_weight=1.0)(row, ["a dog, a cat.", "a dog.", "nothing."])
    assert [s.value for s in with_recall] == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    "name", ["000000000009.jpg", "COCO_train2014_000000000009.jpg", "9.png", "a/b/9.png"]
)
def test_chair_finds_coco_images_by_their_number(name):
    row = {"images": [{"path": name, "bytes": b""}]}
    assert scorers.ChairScorer({9: ["dog"]})(row, ["A dog."])[0] == (0.0, True)


def length_score(image, question, responses, ground_truth):
    return [len(text) if image.size[0] else 0 for text in responses]


def test_a_function_of_ones_own_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    data = responses(tmp_path, {"a": ["a dog.", "a dog, a cat."]})
    command = ["augment", "critique", "--data", str(data), "--out"]
    scorer = ["--scorer", "test_own_preferences:length_score"]
    assert cli.main([*command, str(tmp_path / "out"), *scorer]) == 0
    assert rows_of(tmp_path / "out")[0]["scores"] == [6.0, 13.0]
    assert cli.main([*command, str(tmp_path / "x"), "--scorer", "nowhere:nothing"]) == 2
    assert "no scorer 'nowhere:nothing'" in capsys.readouterr().err
    bad = scorers.FunctionScorer("math:dist")
    with pytest.raises(ValueError, match="no scorer"):
        scorers.imported("math")
    monkeypatch.setattr(scorers, "imported", lambda name: lambda *given: [1.0])
    with pytest.raises(ValueError, match="bad scores"):
        bad(rows_of(tmp_path / "out")[0], ["a", "b"])


def test_preferences_load_as_trl_wants_them(tmp_path):
    data = responses(tmp_path, {name: CAPTIONS for name in "ab"})
    judge = Critique(Rate(chair_scorer(recall_weight=1.0), "chair"), {})
    critique(str(data), tmp_path / "judged", judge)
    counts = prefer(str(tmp_path / "judged"), tmp_path / "pairs", weights=True)
    assert counts == {"kept": 2, "dropped": 0}
    rows = load_dataset(str(tmp_path / "pairs"), split="train")
    row = rows[0]
    assert row["prompt"] == [{"role": "user", "content": "a"}]
    assert row["chosen"] == [{"role": "assistant", "content": "a dog."}]
    assert row["rejected"] == [{"role": "assistant", "content": "a cat."}]
    assert row["images"][0].size == (40, 30)
    assert (row["chosen_source"], row["verdict"]) == ("greedy", "greedy over sampled_2")
    assert (row["margin"], row["weight"], row["critic"]) == (2.0, 1.0, "chair")
    strict = prefer(str(tmp_path / "judged"), tmp_path / "none", min_margin=3.0)
    assert strict == {"kept": 0, "dropped": 2}
    reason = rows_of(tmp_path / "none", "dropped")[0]["dropped"]
    assert reason == "Prefer: small margin: 2.000, the least is 3.0"


def test_only_clean_responses_may_be_chosen(tmp_path):
    data = responses(tmp_path, {"a": ["a dog, a cat.", "a cat."], "b": ["a dog.", "a cat."]})
    judge = Critique(Rate(chair_scorer(), "chair"), {})
    critique(str(data), tmp_path / "judged", judge)
    assert prefer(str(tmp_path / "judged"), tmp_path / "out", clean_only=True) == {
        "kept": 1,
        "dropped": 1,
    }
    reason = rows_of(tmp_path / "out", "dropped")[0]["dropped"]
    assert reason == "Prefer: no clean response"
    step = Criticise(scripted(tmp_path, lambda text, draw: "[[1]]"), orders="one")
    critique(str(data), tmp_path / "critic", Critique(step, {}))
    with pytest.raises(ValueError, match="does not say which responses are clean"):
        prefer(str(tmp_path / "critic"), tmp_path / "x", clean_only=True)


def test_long_prompts_are_found_before_they_are_asked(saved, tmp_path):
    answerer = Answerer(str(tmp_path), model=str(saved), max_new_tokens=100)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    image = {"path": "a.png", "bytes": (tmp_path / "a.png").read_bytes()}
    assert answerer.too_long(Request(image, "a", "short")) is None
    told = answerer.too_long(Request(image, "a", "long " * CONTEXT))
    assert told.endswith("and 100 to write, are more than the 4096 that the model reads")
    asked = {"image": tiny_image(), "question": "long " * CONTEXT}
    inputs = prepare_inputs(tiny_processor("internvl"), [asked])
    assert told.startswith(f"{inputs['input_ids'].shape[1]} tokens of prompt and image")
    assert answerer.control_token("say <|im_end|>") == "<|im_end|>"
    assert answerer.control_token("say it") is None


def test_what_cannot_work_is_said_first(tmp_path, capsys):
    data = prompts(tmp_path, 1)
    out = ["--out", str(tmp_path / "out")]
    bad = {
        "give both": ["responses", "--endpoint", "http://127.0.0.1:9/v1"],
        "temperature is 0.0": ["responses", "--temperature", "0"],
        "candidates is 0": ["responses", "--candidates", "0"],
        "no column responses": ["critique"],
        "no column responses, scores": ["preferences"],
        "needs ground truth": ["critique", "--scorer", "chair"],
        "not both": ["responses", "--model", "a", "--endpoint", "b", "--endpoint-model", "c"],
        "needs a model of this process": [
            "critique", "--reading", "choice", "--endpoint", "b", "--endpoint-model", "c",
        ],
    }  # fmt: skip
    for told, (verb, *more) in bad.items():
        assert cli.main(["augment", verb, "--data", str(data), *out, *more]) == 2
        assert told in capsys.readouterr().err


COMMAND = ["--max-new-tokens", "6", "--candidates", "2", "--batch-size", "8"]


def command(saved, data, out) -> list[str]:
    given = ["augment", "responses", "--data", str(data), "--out", str(out), "--model", str(saved)]
    return [*given, *COMMAND]


def files(folder: Path) -> dict:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("data", "dropped")
        for path in sorted((folder / kind).glob("*.parquet"))
    }


def killed_when(out: Path, enough: int, arguments: list[str]) -> dict:
    """Run the command line, kill it at `enough` answers; their files and times."""
    running = subprocess.Popen(
        [sys.executable, "-m", "firsthand.recipes.cli", *arguments],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    limit = time.monotonic() + 120
    while len(list(out.glob("state/answers/*/*.json"))) < enough:
        assert running.poll() is None and time.monotonic() < limit, "it never got there"
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and not (out / "data").exists()
    return {p: p.stat().st_mtime_ns for p in out.glob("state/answers/*/*.json")}


def test_a_killed_run_generates_nothing_twice(saved, tmp_path):
    data = prompts(tmp_path, 270)
    assert cli.main(command(saved, data, tmp_path / "whole")) == 0
    assert len(files(tmp_path / "whole")) == 4
    out = tmp_path / "killed"
    before = killed_when(out, 100, command(saved, data, out))
    assert 100 <= len(before) < 3 * 270
    assert cli.main(command(saved, data, out)) == 0
    assert all(p.stat().st_mtime_ns == time_ for p, time_ in before.items())
    assert files(out) == files(tmp_path / "whole")


def test_a_killed_critique_asks_nothing_twice(saved, tmp_path):
    data = responses(tmp_path, {f"What is {i}?": ["a cat.", "a dog."] for i in range(40)})
    critic = ["augment", "critique", "--data", str(data), "--model", str(saved), "--reading"]
    critic += ["choice", "--max-new-tokens", "2", "--batch-size", "2", "--out"]
    assert cli.main([*critic, str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    before = killed_when(out, 10, [*critic, str(out)])
    assert 10 <= len(before) < 80
    assert cli.main([*critic, str(out)]) == 0
    assert all(p.stat().st_mtime_ns == time_ for p, time_ in before.items())
    assert files(out) == files(tmp_path / "whole")


def test_ranks_share_the_shards(saved, tmp_path, monkeypatch, capsys):
    data = prompts(tmp_path, 270)
    assert cli.main(command(saved, data, tmp_path / "whole")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(command(saved, data, tmp_path / "ranks")) == 0
    told = capsys.readouterr().out
    assert "1 shards of other processes are not" in told and files(tmp_path / "ranks") == files(
        tmp_path / "whole"
    )


def test_three_commands_make_pairs_and_the_image_is_encoded_once(saved, tmp_path):
    data = prompts(tmp_path, 12)
    model, _ = answering.opened_model(str(saved))
    seen = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda m, a, o: seen.append(len(o.last_hidden_state)))
    assert cli.main(command(saved, data, tmp_path / "responses")) == 0
    assert sum(seen) == 12
    hook.remove()
    critic = ["augment", "critique", "--data", str(tmp_path / "responses"), "--model", str(saved)]
    critic += ["--max-new-tokens", "4", "--out", str(tmp_path / "critic")]
    assert cli.main([*critic, "--reading", "choice"]) == 0
    pairs = ["augment", "preferences", "--data", str(tmp_path / "critic")]
    assert cli.main([*pairs, "--out", str(tmp_path / "pairs")]) == 0
    assert len(load_dataset(str(tmp_path / "pairs"), split="train")) > 0


def test_the_choice_is_the_likelier_verdict(saved, tmp_path):
    data = responses(tmp_path, {"a": ["a cat.", "a dog."]})
    answerer = Answerer(str(tmp_path / "cache"), model=str(saved), max_new_tokens=4)
    critique(str(data), tmp_path / "out", Critique(Criticise(answerer, reading="choice"), {}))
    found = rows_of(tmp_path / "out")[0]
    model, processor = answering.opened_model(str(saved))
    odds = []
    for first, second in [("a dog.", "a cat."), ("a cat.", "a dog.")]:
        text = critic.question_of("a", first, second, "a dog.")
        prompt = build_prompt(processor, text) + " Verdict: [["
        image = stored_image(found["images"][0])
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        with torch.no_grad():
            last = model(**inputs).logits[0, -1].log_softmax(-1)
        one, two = (processor.tokenizer(f" Verdict: [[{n}").input_ids[-1] for n in "12")
        odds.append(float(last[one] - last[two]))
    replies = [json.loads(text) for text in found["comparisons"][0]["replies"]]
    assert [a - b for a, b in replies] == pytest.approx(odds, abs=1e-4)
    assert found["scores"] == ([-1.0, 1.0] if odds[0] - odds[1] > 0 else [1.0, -1.0])


def test_evidence_is_what_the_model_sees_of_object_words(saved, tmp_path):
    data = responses(tmp_path, {"What?": ["a dog and a cup.", "Yes."]})
    row = rows_of(data)[0]
    tiny_image().save(tmp_path / "a.png")
    row["images"][0]["bytes"] = (tmp_path / "a.png").read_bytes()
    model, processor = answering.opened_model(str(saved))
    said = model, processor, stored_image(row["images"][0]), "What?", "a dog and a cup."
    (one, one_blank), (two, two_blank) = word_log_likelihoods(*said, [(2, 5), (12, 15)])
    nats = [one - one_blank, two - two_blank]
    ceiling = min(nats) + 1e-6
    scorer = scorers.EvidenceScorer(str(saved), 0.5, ceiling, threshold=max(nats))
    found = scorer(row, ["a dog and a cup.", "Yes."])
    expected = one + two + 0.5 * sum(min(n, ceiling) for n in nats)
    assert found[0].value == pytest.approx(expected)
    assert found == [(found[0].value, False), (0.0, True)]


EXTRA = {  # what makes the documented commands small
    "augment responses": "--max-new-tokens 6 --candidates 2",
    "augment critique": "--reading choice --max-new-tokens 2",
    "recipes.train_preference": "--max_steps 2 --lora_rank 4 --use_cpu true",
}


def test_the_documented_commands_run(saved, tmp_path, monkeypatch):
    prompts(tmp_path, 8)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "self_preference.md").read_text("utf-8")
    lines = page.split("```")[1].replace("\\\n", " ").strip().splitlines()
    places = {
        "llava-hf/llava-1.5-7b-hf": str(saved),
        "train2017": "images",
        "prompts.jsonl": "p.jsonl",
    }
    places |= {"recipes/configs": str(ROOT / "recipes" / "configs"), "--out prompts": "--out rows"}
    assert len(lines) == 6
    for line in lines:
        for name, place in places.items():
            line = line.replace(name, place)
        line = line.replace("--data prompts", "--data rows")
        line += "".join(f" {more}" for name, more in EXTRA.items() if name in line)
        program, *arguments = line.split()
        if program == "firsthand":
            assert cli.main(arguments) == 0, line
        elif program == "python":
            sima.main(arguments[2:])
        else:
            train_preference.run(*train_preference.parse(arguments[3:]))
    assert (tmp_path / "merged" / "config.json").exists()
