"""Mementos: keywords found, sets compared by hand, and images where a figure has no meaning."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.mementos import scoring as mementos
from firsthand.metrics.results import bootstrap, ratio, result_rows

KEYWORDS = {
    "objects": [["person", "man", "woman"], ["dog"], ["hot dog", "frankfurter"], ["box"]],
    "behaviours": [["walk", "walking"], ["pick up", "picks up"], ["eat", "eating"]],
}
REFERENCES = {
    "a": "A man picks up a hot dog while walking.",
    "b": {"objects": ["Woman", "kite"], "behaviours": ["eat"]},
    7: "A dog in a box.",
}
ROWS = [
    {"id": 1, "image_id": "a", "prediction": "A woman and two dogs walk, eating hot dogs."},
    {"id": 2, "image_id": "b", "prediction": "A person eats."},
    {"id": 3, "image_id": "7", "prediction": "Boxes."},
]


def test_means_over_images_by_hand():
    # objects: 1 said person, dog, hot dog of person, hot dog; 2 person of person, kite; 3 box of 2
    # behaviours: 1 said walk, eat of pick up, walk; 2 eat of eat; 3 none of none
    result = mementos.score(ROWS, REFERENCES, KEYWORDS)
    assert result == {
        "mementos_objects_precision": pytest.approx((2 / 3 + 1 + 1) / 3),
        "mementos_objects_recall": pytest.approx((1 + 1 / 2 + 1 / 2) / 3),
        "mementos_objects_f1": pytest.approx((4 / 5 + 2 / 3 + 2 / 3) / 3),
        "mementos_behaviours_precision": pytest.approx((1 / 2 + 1) / 2),
        "mementos_behaviours_recall": pytest.approx((1 / 2 + 1) / 2),
        "mementos_behaviours_f1": pytest.approx((1 / 2 + 1) / 2),
        "n_silent_objects": 0,
        "n_bare_objects": 0,
        "n_silent_behaviours": 1,
        "n_bare_behaviours": 1,
        "n": 3,
        "n_errors": 0,
        "n_skipped": 0,
        "keywords_hash": mementos.keywords_hash(KEYWORDS),
    }


def test_each_invention_counts():
    """Where the published script counts all that is left over as one wrong keyword."""
    keywords = {"objects": [[f"thing{c}"] for c in "abcdefghij"], "behaviours": []}
    said = " ".join(f"thing{c}" for c in "abcdefghij")
    rows = [{"id": 1, "image_id": 1, "prediction": said}]
    result = mementos.score(rows, {1: "a thinga"}, keywords)
    assert result["mementos_objects_precision"] == 1 / 10


def test_silence_costs_recall_but_has_no_precision():
    rows = [*ROWS[:1], {"id": 2, "image_id": "b", "prediction": ""}]
    alone = mementos.score(ROWS[:1], REFERENCES, KEYWORDS)
    result = mementos.score(rows, REFERENCES, KEYWORDS)
    for part in mementos.PARTS:
        name = f"mementos_{part}"
        assert result[f"{name}_precision"] == alone[f"{name}_precision"]
        assert result[f"{name}_recall"] == alone[f"{name}_recall"] / 2
        assert result[f"{name}_f1"] == alone[f"{name}_f1"] / 2
        assert result[f"n_silent_{part}"] == 1
    nothing = mementos.score([{"id": 1, "image_id": 1, "prediction": ""}], {1: ""}, KEYWORDS)
    assert all(math.isnan(v) for name, v in nothing.items() if name.startswith("mementos"))
    assert nothing["n"] == nothing["n_bare_objects"] == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("HOT DOGS", {"hot dog"}),
        ("hot-dog", {"hot dog"}),
        ("It is hot. Dogs pant.", {"dog"}),
        ("a hot red dog", {"dog"}),
        ("frankfurters", {"hot dog"}),
        ("boxes", {"box"}),
        ("doggy men", set()),
        ("", set()),
    ],
)
def test_keywords_are_found_as_written_or_with_s(text, found):
    terms = {"person": "person", "man": "person", "dog": "dog", "box": "box"}
    terms |= {"hot dog": "hot dog", "frankfurter": "hot dog"}
    assert mementos.find_keywords(text, terms) == found


terms = st.sampled_from(["person", "man", "woman", "dog", "hot dog", "frankfurter", "box"])


@given(st.lists(terms, max_size=8), st.lists(terms, max_size=8))
def test_lists_and_descriptions_give_the_same(said, shown):
    as_text = [{"id": 1, "image_id": 1, "prediction": " beside ".join(said)}]
    as_list = [{"id": 1, "image_id": 1, "prediction": {"objects": said, "behaviours": []}}]
    results = [
        mementos.score(rows, {1: reference}, KEYWORDS)
        for rows in (as_text, as_list)
        for reference in (" beside ".join(shown), {"objects": shown, "behaviours": []})
    ]
    assert all(r == pytest.approx(results[0], nan_ok=True) for r in results)
    merged = {"man": "person", "woman": "person", "frankfurter": "hot dog"}
    first, second = ({merged.get(t, t) for t in side} for side in (said, shown))
    if first | second:
        expected = 2 * len(first & second) / (len(first) + len(second))
        assert results[0]["mementos_objects_f1"] == pytest.approx(expected)


def test_details_say_what_was_said_missed_and_invented():
    images = mementos.score(ROWS, REFERENCES, KEYWORDS, details=True)["images"]
    assert images[:2] == [
        {
            "id": 1,
            "part": "objects",
            "said": ["dog", "hot dog", "person"],
            "missed": [],
            "invented": ["dog"],
        },
        {
            "id": 1,
            "part": "behaviours",
            "said": ["eat", "walk"],
            "missed": ["pick up"],
            "invented": ["eat"],
        },
    ]
    assert len(images) == 6


def test_pairs_add_up_to_the_score_and_name_their_rows():
    given_ = (ROWS, REFERENCES, KEYWORDS)
    result, columns, ids = (
        mementos.score(*given_),
        mementos.pairs(*given_),
        mementos.pair_ids(*given_),
    )
    assert set(columns) == set(ids) == {name for name in result if name.startswith("mementos")}
    assert ids["mementos_objects_f1"] == [1, 2, 3]
    assert ids["mementos_behaviours_f1"] == [1, 2]
    for name, column in columns.items():
        assert len(column) == len(ids[name])
        assert bootstrap(column, ratio, n=10)[0] == pytest.approx(result[name])
    made = result_rows(columns, arm="plain", split="test", protocol={})
    assert [row["n"] for row in made] == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"id": 1, "image_id": "a", "prediction": "x"}, ValueError, "id 1 occurs twice"),
        ({"id": 9, "prediction": "x"}, ValueError, "needs id and image_id"),
        ({"id": 9, "image_id": "z", "prediction": "x"}, ValueError, "No reference for .* 'z'"),
        ({"id": 9, "image_id": "a"}, TypeError, "its prediction is neither .* NoneType"),
        (
            {"id": 9, "image_id": "a", "prediction": {"objects": ["dog"]}},
            TypeError,
            "its prediction is neither",
        ),
        ({"id": 9, "image_id": "bad", "prediction": "x"}, TypeError, "its reference is neither"),
    ],
)
def test_bad_rows_are_refused_by_name_or_skipped(row, error, message):
    references = REFERENCES | {"bad": 3}
    with pytest.raises(error, match=message):
        mementos.score([*ROWS, row], references, KEYWORDS)
    result = mementos.score([*ROWS, row], references, KEYWORDS, skip_bad=True)
    assert [skipped["id"] for skipped in result.pop("skipped")] == [row["id"]]
    assert result == mementos.score(ROWS, REFERENCES, KEYWORDS) | {"n_skipped": 1}


def test_failed_rows_are_counted():
    failed = {"id": 9, "image_id": "nowhere", "error": "truncated file"}
    expected = mementos.score(ROWS, REFERENCES, KEYWORDS) | {"n_errors": 1}
    assert mementos.score([*ROWS, failed], REFERENCES, KEYWORDS) == expected


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"objects": []}, ValueError, "objects and behaviours"),
        ([["dog"]], ValueError, "objects and behaviours"),
        ({"objects": ["dog"], "behaviours": []}, TypeError, "a list of synonyms, not 'dog'"),
        ({"objects": [[3]], "behaviours": []}, TypeError, "a list of synonyms"),
        (
            {"objects": [["dog", "pet"], ["cat", "Pet"]], "behaviours": []},
            ValueError,
            "'pet' is in the groups of 'dog' and 'cat'",
        ),
        ({"objects": [["..."]], "behaviours": []}, ValueError, "has no word"),
    ],
)
def test_groups_that_decide_nothing_are_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        mementos.score(ROWS, REFERENCES, keywords)


def test_references_must_map_and_equal_lists_have_one_hash():
    with pytest.raises(TypeError, match="they are no list"):
        mementos.score(ROWS, [], KEYWORDS)
    turned = {part: list(reversed(groups)) for part, groups in reversed(KEYWORDS.items())}
    assert mementos.keywords_hash(turned) == mementos.keywords_hash(KEYWORDS)
    other = KEYWORDS | {"behaviours": []}
    assert mementos.keywords_hash(other) != mementos.keywords_hash(KEYWORDS)
