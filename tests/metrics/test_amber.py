"""AMBER by exact words: counts by hand, a second count the slow way, and AMBER's own files."""

import gzip
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.amber import scoring as amber
from firsthand.metrics.results import bootstrap, ratio, result_rows

REFERENCE = Path(os.environ.get("FIRSTHAND_REFERENCE", "no reference")) / "amber"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="FIRSTHAND_REFERENCE does not name AMBER's files"
)

ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["dog", "tree"], "hallu": ["cat", "car"]},
    {"id": 2, "type": "generative", "truth": ["woman", "sea"], "hallu": ["ship"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "relation", "truth": "no"},
    {"id": 7, "type": "discriminative-relation", "truth": "yes"},
]
RELATION = {
    "dog": [],
    "tree": ["bush", "leave"],
    "woman": ["person", "people"],
    "sea": ["water"],
    "ship": ["boat"],
    "cat": [],
    "car": ["vehicle"],
    "shelf": ["can", "TV"],
    "slippers": [],
}
TRUTH = amber.make_truth(ANNOTATIONS, RELATION, ["light", "vehicle"])
DESCRIPTIONS = [
    {"id": 1, "prediction": "Dogs under a bush; a cat, a vehicle and another cat can be seen."},
    {"id": "2", "response": "The people look at the water."},
]
ANSWERS = [
    {"id": 3, "response": "No."},
    {"id": 4, "response": "no, it is not"},
    {"id": 5, "response": "There are two."},
    {"id": 6, "response": "Yes"},
    {"id": 7, "response": "Yes, they do."},
]


def test_descriptions_are_counted_as_by_hand():
    result = amber.score(DESCRIPTIONS, TRUTH)
    # 1: dog, bush, cat, vehicle (safe: counted, never wrong), cat; 2: people, water
    assert result["amber_chair"] == 2 / 7
    assert result["amber_cover"] == 4 / 4
    assert result["amber_hal"] == 1 / 2
    assert result["amber_cog"] == 1 / 3  # the cat, but not the car, since vehicle is safe
    counts = {"n_generative": 2, "n_discriminative": 0, "n_silent": 0, "variant": "amber_exact"}
    assert {name: result[name] for name in counts} == counts
    assert math.isnan(result["amber_accuracy"])


def test_answers_are_counted_as_by_hand():
    result = amber.score(ANSWERS, TRUTH)
    assert result["amber_accuracy"] == 2 / 5
    assert result["amber_precision"] == 1 / 2  # said no: 3, 4
    assert result["amber_recall"] == 1 / 3  # gold no: 3, 5, 6
    assert result["amber_f1"] == pytest.approx(2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3))
    assert (result["n_unparsed"], result["n_discriminative"]) == (1, 5)
    kinds = {name.split("_")[1] for name in result if name.count("_") == 2 and "amber" in name}
    assert kinds == {"existence", "attribute", "state", "number", "relation"}
    assert result["amber_attribute_accuracy"] == 0.0
    assert result["amber_relation_accuracy"] == 1 / 2
    assert math.isnan(result["amber_state_recall"])
    assert math.isnan(result["amber_chair"])


def test_details_give_words_with_their_places():
    responses = amber.score([*DESCRIPTIONS, *ANSWERS], TRUTH, details=True)["responses"]
    first = responses[0]
    assert first["words"] == ["Dogs", "bush", "cat", "vehicle", "cat"]
    assert [DESCRIPTIONS[0]["prediction"][a:b] for a, b in first["spans"]] == first["words"]
    assert first["nodes"] == ["dog", "bush", "cat", "vehicle", "cat"]
    assert first["hallucinated"] == [False, False, True, False, True]
    assert responses[3] == {"id": 4, "kind": "state", "answer": "yes", "parsed": "no"}
    assert responses[4]["parsed"] is None


@pytest.mark.parametrize(
    ("spelled", "node"),
    [
        ("Dogs", "dog"),
        ("women", "woman"),
        ("shelves", "shelf"),
        ("can", None),
        ("cans", "can"),
        ("leave", None),
        ("leaves", "leave"),
        ("bushes", "bush"),
        ("slipper", "slippers"),
        ("slippers", "slippers"),
        ("tv", "tv"),
        ("TVs", "tv"),
        ("people", "people"),
        ("dogged", None),
        ("dog-house", None),
    ],
)
def test_spellings(spelled, node):
    row = {"id": 1, "prediction": f"Here: {spelled}."}
    (response,) = amber.score([row], TRUTH, details=True)["responses"]
    assert response["nodes"] == ([node] if node else [])


def test_pairs_add_up_to_the_score_and_name_their_rows():
    rows = [*DESCRIPTIONS, *ANSWERS]
    result, columns, ids = (f(rows, TRUTH) for f in (amber.score, amber.pairs, amber.pair_ids))
    assert set(ids) == set(columns)
    assert ids["amber_cog"] == [1, "2"]
    assert ids["amber_attribute_f1"] == [4, 5]
    for name, column in columns.items():
        assert len(column) == len(ids[name])
        value = bootstrap(column, ratio, n=10)[0]
        assert value == pytest.approx(result[name], nan_ok=True)
    assert not any("chair" in name for name in amber.pairs(ANSWERS, TRUTH))
    made = result_rows(columns, arm="plain", split="test", protocol={})
    assert {row["metric"]: row["n"] for row in made}["amber_chair"] == 2


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"id": 1, "prediction": "A dog."}, ValueError, "id 1 occurs twice"),
        ({"id": "1", "prediction": "A dog."}, ValueError, "id '1' occurs twice"),
        ({"id": 99, "prediction": "A dog."}, ValueError, "no id 99; its annotations hold 7"),
        ({"id": "x.jpg", "prediction": "A dog."}, ValueError, "no id 'x.jpg'"),
        ({"id": 3, "prediction": None}, TypeError, "of type NoneType"),
        ({"id": 3}, TypeError, "of type NoneType"),
        ({"prediction": "A dog."}, ValueError, "needs id and prediction"),
    ],
)
def test_bad_rows_are_refused_by_name_or_skipped(row, error, message):
    with pytest.raises(error, match=message):
        amber.score([*DESCRIPTIONS, row], TRUTH)
    result = amber.score([*DESCRIPTIONS, row], TRUTH, skip_bad=True)
    assert [skipped["id"] for skipped in result.pop("skipped")] == [row.get("id")]
    expected = amber.score(DESCRIPTIONS, TRUTH) | {"n_skipped": 1}
    assert result == pytest.approx(expected, nan_ok=True)


def test_failed_and_empty_responses_are_counted():
    rows = [
        {"id": 1, "error": "truncated file"},
        {"id": 2, "response": " "},
        {"id": 3, "response": ""},
    ]
    result = amber.score(rows, TRUTH)
    counts = {"n_errors": 1, "n_empty": 2, "n_silent": 1, "n_unparsed": 1, "n_generative": 1}
    assert {name: result[name] for name in counts} == counts
    assert math.isnan(result["amber_chair"])
    assert (result["amber_cover"], result["amber_hal"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("annotations", "relation", "error", "message"),
    [
        ([{"id": 1}], {}, ValueError, "Annotation 1 is none of AMBER's"),
        ([7], {}, ValueError, "it has int"),
        ([ANNOTATIONS[0] | {"type": "other"}], RELATION, ValueError, "unknown type 'other'"),
        ([ANNOTATIONS[2] | {"truth": "maybe"}], RELATION, ValueError, "'maybe' is no yes or no"),
        (ANNOTATIONS[:1], {"dog": []}, ValueError, "names tree, cat, car, which the relation"),
        ([ANNOTATIONS[0] | {"truth": "dog"}], RELATION, TypeError, "expected a list of words"),
        (ANNOTATIONS[:1] * 2, RELATION, ValueError, "Annotation 2: the id 1 occurs twice"),
        ([], ["dog"], TypeError, "maps words to lists"),
        ([], {"dog": ["hot dog"]}, ValueError, "'hot dog' would never be found"),
    ],
)
def test_files_of_something_else_are_refused(annotations, relation, error, message):
    with pytest.raises(error, match=message):
        amber.make_truth(annotations, relation)


def test_amber_s_files_are_read(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (tmp_path / "relation.json.gz").write_bytes(gzip.compress(json.dumps(RELATION).encode()))
    with pytest.raises(FileNotFoundError, match="safe_words.txt"):
        amber.read_truth(tmp_path)
    (tmp_path / "safe_words.txt").write_text("light\nvehicle")
    assert amber.read_truth(tmp_path) == TRUTH
    path = tmp_path / "responses.json"
    for text in (json.dumps(ANSWERS), "\n".join(map(json.dumps, ANSWERS))):
        path.write_text(text)
        rows = amber.read_responses(path)
        assert rows[0] == {"id": 3, "image_id": 3, "response": "No.", "prediction": "No."}
        assert amber.score(rows, TRUTH) == pytest.approx(amber.score(ANSWERS, TRUTH), nan_ok=True)
    path.write_text(json.dumps([{"id": 1}]))
    with pytest.raises(ValueError, match=r"entry 1 needs \['id', 'response'\]"):
        amber.read_responses(path)
    path.write_text("{no json")
    with pytest.raises(ValueError, match="is not JSON"):
        amber.read_responses(path)


def slow_counts(nouns, annotation, truth):
    """(hallucinated, nouns, covered, imagined) with flags set in lists, an associate at a time."""

    def flags(objects):
        words = [(word, i) for i, name in enumerate(objects) for word in truth.relation[name]]
        return words + [(name, i) for i, name in enumerate(objects)], [0] * len(objects)

    (shown, covered), (listed, imagined) = flags(annotation["truth"]), flags(annotation["hallu"])
    false = 0
    for noun in nouns:
        if noun in truth.safe_words:
            continue
        places = [i for word, i in shown if word == noun]
        others = [i for word, i in listed if word == noun]
        if places:
            covered[places[0]] = 1
        elif others:
            imagined[others[0]] = 1
        false += not places
    return false, len(nouns), sum(covered), sum(imagined)


@needs_reference
def test_counts_agree_with_a_second_count_on_amber_s_own_objects():
    truth = amber.read_truth(REFERENCE)
    rng = random.Random(0)
    words = sorted(set(amber.spellings(truth).values()) - amber.PLURAL_ONLY)
    rows, expected = [], np.zeros(4)
    for i in range(1, 301):
        annotation = truth.annotations[i]
        likely = annotation["truth"] + annotation["hallu"]
        nouns = [rng.choice(likely if rng.random() < 0.7 else words) for _ in range(12)]
        nouns = [noun for noun in nouns if noun not in amber.PLURAL_ONLY]
        rows.append({"id": i, "prediction": "Look: " + ", ".join(nouns) + "."})
        expected += slow_counts(nouns, annotation, truth)
    columns = amber.pairs(rows, truth)
    found = [
        *columns["amber_chair"].sum(axis=0),
        columns["amber_cover"][:, 0].sum(),
        columns["amber_cog"][:, 0].sum(),
    ]
    assert found == list(expected)
    assert all(value > 100 for value in found)


@needs_reference
def test_published_annotations_are_whole():
    truth = amber.read_truth(REFERENCE)
    types = Counter(annotation["type"] for annotation in truth.annotations.values())
    kinds = Counter(amber.KINDS[t] for t in types.elements() if t != "generative")
    assert types["generative"] == 1004
    assert kinds == {
        "existence": 4924,
        "state": 4764,
        "number": 2072,
        "action": 792,
        "relation": 1664,
    }
    questions = amber.read_queries(REFERENCE / "query_discriminative.json.gz")
    assert len(questions) == kinds.total() == 14216
    assert questions[0]["image_id"] == questions[0]["image"] == "AMBER_1.jpg"
    rows = [
        {"id": i, "response": ", ".join(a["truth"]) if a["type"] == "generative" else a["truth"]}
        for i, a in truth.annotations.items()
    ]
    result = amber.score(rows, truth)
    assert (result["amber_chair"], result["amber_hal"], result["amber_cog"]) == (0, 0, 0)
    assert result["amber_cover"] == pytest.approx(0.932, abs=5e-4)
    assert (result["amber_accuracy"], result["amber_f1"], result["n_unparsed"]) == (1, 1, 0)
    answered = {row["id"] for row in rows if row["id"] > 1004}
    assert {question["id"] for question in questions} == answered


@given(st.text(max_size=60))
def test_any_text_is_scored(text):
    rows = [{"id": 1, "prediction": text}, {"id": 3, "prediction": text}]
    result = amber.score(rows, TRUTH, details=True)
    assert result["n_generative"] == result["n_discriminative"] == 1
    response = result["responses"][0]
    assert [text[a:b] for a, b in response["spans"]] == response["words"]
    assert 0 <= result["amber_cover"] <= 1
