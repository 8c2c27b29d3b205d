"""Labelled words of scenes, kept over a stop, and the measures of warning and maps by hand."""

import json

import numpy as np
import pytest
from tiny_models import tiny_image

from firsthand.metrics import results
from firsthand.processing.head_statistics import auroc as exact_auroc
from firsthand.processing.head_statistics import average_precision as exact_precision
from firsthand.processing.head_statistics import ordered
from firsthand.processing.masks import encode
from firsthand.recipes import evaluate_relevancy, evaluate_warning, labelled_words

SCENES = [
    {
        "id": f"s{i}",
        "image": tiny_image(i),
        "objects": [{"noun": noun, "position": "center", "mask": None} for noun in nouns],
    }
    for i, nouns in enumerate([["dog", "cup"], ["cat"], ["dog"]])
]


@pytest.fixture
def asked(monkeypatch):
    """Captions and evidence without a model; a scene id is refused once it stands in `broken`."""
    seen: dict[str, list] = {"captions": [], "evidence": [], "broken": []}

    def answers(model, processor, rows, *args, done, **kwargs):
        for row in rows:
            seen["captions"].append(row)
            done(row, "a dog center, a dog top left.")
            yield row | {"prediction": "a dog center, a dog top left."}

    def evidence(model, processor, image, question, caption, spans):
        seen["evidence"].append(caption)
        if len(seen["evidence"]) in seen["broken"]:
            raise ValueError("cannot be read")
        return [{"text": caption[slice(*span)]} for span in spans]

    monkeypatch.setattr(labelled_words, "generate_answers", answers)
    monkeypatch.setattr(labelled_words, "evidence", evidence)
    return seen


def read(folder, source, count=3):
    return labelled_words.labelled_words(folder, None, None, "test", SCENES[:count], source)


def test_every_mention_is_labelled_from_its_scene(tmp_path, asked):
    words = read(tmp_path, "own")
    assert [(w["scene"], w["node"], w["true"]) for w in words] == [
        ("s0", "dog", True), ("s0", "dog", True),
        ("s1", "dog", False), ("s1", "dog", False),
        ("s2", "dog", True), ("s2", "dog", True),
    ]  # fmt: skip
    assert {(w["text"], w["split"], w["source"]) for w in words} == {("dog", "test", "own")}
    assert not any("seed" in row for row in asked["captions"])


def test_one_swapped_word_a_caption_is_false(tmp_path, asked):
    words = read(tmp_path, "swapped")
    assert [w["scene"] for w in words if not w["true"]] == ["s0", "s1", "s2"]
    assert asked["captions"] == []


def test_drawn_captions_have_seeds_of_their_own(tmp_path, asked):
    read(tmp_path, "drawn")
    assert len({row["seed"] for row in asked["captions"]}) == 3


def test_a_second_call_goes_on(tmp_path, asked):
    first = read(tmp_path, "own", count=2)
    file = tmp_path / "words-test-own-0.jsonl"
    file.write_text(file.read_text()[:-20])  # killed in the middle of the second caption
    assert read(tmp_path, "own", count=3)[: len(first)] == first
    assert len(asked["captions"]) == 3 and len(asked["evidence"]) == 4


def test_a_caption_that_cannot_be_read_is_left_out_with_its_reason(tmp_path, asked, capsys):
    asked["broken"].append(2)
    assert {w["scene"] for w in read(tmp_path, "own")} == {"s0", "s2"}
    kept = (tmp_path / "skipped-test-own-0.jsonl").read_text()
    assert json.loads(kept) == {"scene": "s1", "reason": "cannot be read"}
    assert "1 of 3 captions are left out" in capsys.readouterr().out


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source is 'guessed'"):
        read(tmp_path, "guessed")


def test_auroc_and_precision_of_histograms_are_the_exact_ones():
    rng = np.random.default_rng(0)
    scores, made_up = rng.integers(0, 9, 40).astype(float), rng.random(40) < 0.3  # with ties
    means = evaluate_warning.columns(scores, made_up).mean(0)
    assert evaluate_warning.auroc(means) == pytest.approx(
        exact_auroc(ordered(scores[None]), made_up.astype(float))[0]
    )
    exact = exact_precision(ordered(scores[None]), made_up.astype(float))[0]
    assert evaluate_warning.average_precision(means) == pytest.approx(exact)
    value, low, high = results.bootstrap(
        evaluate_warning.columns(scores, made_up), evaluate_warning.auroc, groups=range(40)
    )
    assert low < value < high


def test_measures_of_every_arm_and_their_difference():
    words = [
        {"scene": f"s{i // 2}", "true": bool(i % 2), "log_probability": -1.0, "x": i % 2}
        for i in range(20)
    ]
    arms = {
        "probability": lambda words: np.array([-w["log_probability"] for w in words]),
        "attention": lambda words: np.array([0.5 for _ in words]),
        "relevancy": lambda words: np.array([0.5 for _ in words]),
        "all": lambda words: np.array([0.5 for _ in words]),
        "warning": lambda words: np.array([1.0 - w["x"] for w in words]),
    }
    rows = evaluate_warning.measure(words, arms, "test", {})
    found = {(r["arm"], r["metric"]): r["value"] for r in rows}
    assert found["warning", "auroc"] == 1 and found["probability", "auroc"] == 0.5
    assert found["warning - probability", "auroc"] == 0.5
    assert found["warning", "brier"] == 0 and found["attention", "brier"] == 0.25
    assert found["words", "made_up"] == 0.5 and all(r["n"] == 20 for r in rows)


def scene(name: str, noun: str, column: int) -> dict:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, 4 * column : 4 * column + 4] = True
    return {"id": name, "objects": [{"noun": noun, "mask": encode(mask)}]}


def test_a_map_on_its_object_points_and_on_anothers_does_not():
    rows = [scene("a", "dog", 0), scene("b", "cup", 1)]
    left, even = [[0.5, 0.0], [0.5, 0.0]], [[0.25, 0.25], [0.25, 0.25]]
    word = {"scene": "a", "node": "dog", "true": True, "map": left}
    word |= {"token_map": left, "attention_map": even}
    wrong = word | {"node": "cup", "true": False}
    arms = evaluate_relevancy.compared([word, wrong], rows, "resize")
    assert {arm: values for arm, (values, _) in arms.items()} == {
        "relevancy": [[1, 1, 2]],
        "relevancy_tokens": [[1, 1, 2]],
        "attention": [[0.5, 0.5, 1]],
        "shuffled": [[0, 0, 0]],
    }
    found = evaluate_relevancy.measure(arms, "test", {})
    values = {(r["arm"], r["metric"]): r["value"] for r in found}
    assert values["relevancy - attention", "pointing_game"] == 0.5
    assert values["relevancy - shuffled", "energy_in_mask"] == 1
