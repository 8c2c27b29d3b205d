"""Key expressions: the rule on ordinary captions, exact places in the answer, strict replies."""

import base64
import gzip
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firsthand.processing.key_expressions import (
    by_rule,
    compound_noun,
    head_noun,
    noun_phrases,
    parse_reply,
    place,
    prompt,
    request,
)
from firsthand.processing.messages import SENT_PIXELS

CAPTIONS = {
    "A man is riding a wave on top of a surfboard.": "man; wave; surfboard",
    "Two dogs sit next to a traffic light.": "dogs; traffic light",
    "A black and white cat sleeps on a red couch.": "black and white cat; red couch",
    "The image features a man sitting on a wooden bench.": "man; wooden bench",
    "There is a dining table in the middle of the room.": "dining table; room",
    "A group of people standing around a parking lot": "group of people; parking lot",
    "The woman is wearing a large, blue hat and holding an umbrella.": "woman; large, blue hat; "
    "umbrella",
    "A brightly colored bird perches on a tree branch.": "colored bird; tree branch",
    "Three people on skis pose for a picture.": "people; skis",
    "A bowl of oranges beside an orange.": "bowl; oranges; orange",
    "The woman's hat is blue.": "woman's hat",
    "A kitchen area with people washing dishes.": "kitchen; people; dishes",
    "a dog top left, a traffic light bottom right.": "dog; traffic light",
    "He waits to cross the street, which seems busy.": "street",
    "A train that runs through a tunnel": "train; tunnel",
    "The photo shows a café with many visitors.": "café; visitors",
    "It creates a sense of calmness and harmony in the background.": "",
    "Playing tennis": "tennis",
    "": "",
    "!!! 42 ... :-)": "",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_noun_phrases_of_captions(caption):
    found = "; ".join(caption[start:end] for start, end, _ in noun_phrases(caption))
    assert found == CAPTIONS[caption]


def test_the_head_is_the_last_noun():
    heads = {
        "young tennis player": "player",
        "group of people": "people",
        "an old wooden table": "table",
        "Two Dogs": "dogs",
        "the man's hat": "hat",
        "red": None,
        "yes": None,
    }
    assert {phrase: head_noun(phrase) for phrase in heads} == heads


SCENES = [
    ("validation", 0.99),
    ("test", 0.99),
    ("test_prior", 0.99),
]


@pytest.mark.parametrize("split, least", SCENES)
def test_scenes_captions_give_their_nouns(split, least):
    """The rule knows nothing of the scenes' nouns; it finds nearly all and invents nearly none."""
    from firsthand.recipes.demo_data import load_scenes

    right = wrong = wanted = 0
    for row in load_scenes(split):
        nouns = {o["noun"] for o in row["objects"]}
        found = {row["caption"][start:end] for start, end, _ in noun_phrases(row["caption"])}
        right, wrong = right + len(found & nouns), wrong + len(found - nouns)
        wanted += len(nouns)
    assert right / wanted >= least and wrong / wanted <= 1 - least


def test_objects_of_models_captions_are_found():
    """On captions of photographs: nearly every COCO object that CHAIR reads in them is named."""
    folder = Path(os.environ.get("FIRSTHAND_REFERENCE", "no folder")) / "chair"
    if not folder.is_dir():
        pytest.skip("FIRSTHAND_REFERENCE holds no chair captions")
    from firsthand.metrics import chair

    with gzip.open(folder / "Instruction2_llava.jsonl.gz", "rt") as lines:
        captions = [json.loads(line)["caption"] for line in lines][::8]
    said = named = 0
    for caption in captions:
        objects = {m.node for m in chair.COCO.mentions(caption)}
        phrases = ". ".join(caption[start:end] for start, end, _ in noun_phrases(caption))
        said, named = (
            said + len(objects),
            named + len(objects & {m.node for m in chair.COCO.mentions(phrases)}),
        )
    assert said > 500 and named / said > 0.98


@given(st.text(alphabet="abdgnestyİ' -,.’é1", max_size=80))
def test_spans_are_ordered_and_end_with_their_head(text):
    last = 0
    for start, end, head in noun_phrases(text):
        assert last <= start < end <= len(text)
        assert text[start:end].lower().replace("’", "'").endswith(head)
        last = end


def spans(answer, phrases, **more):
    found, rejected = place(answer, phrases, **more)
    for one in found:
        assert answer[one["char_start"] : one["char_end"]] == one["text"]
    return [(f["text"], f["phrase"], f["char_start"]) for f in found], [
        r["reason"].split(":")[0] for r in rejected
    ]


def test_an_expression_stands_in_the_answer_or_is_rejected():
    answer = "A Cat in a category with a cat."
    assert spans(answer, ["cat"]) == ([("cat", "cat", 27)], [])
    assert spans(answer, ["CAT"]) == ([("Cat", "Cat", 2)], [])
    assert spans(answer, ["categ"]) == ([], ["not in the answer"])
    assert spans(answer, ["categ"], whole_words=False) == ([("categ", "categ", 11)], [])
    assert spans(answer, ["dog", "", "None", "N/A."]) == (
        [],
        ["not in the answer", "empty", "a refusal", "a refusal"],
    )


def test_an_expression_given_again_takes_its_next_place():
    found, reasons = spans("a cup, a cup", ["cup", "cup", "cup"])
    assert found == [("cup", "cup", 2), ("cup", "cup", 9)] and reasons == ["named twice"]


def test_a_one_word_answer_is_the_label_of_what_is_looked_for():
    (dog,), _ = place("Yes.", ["brown dog"])
    assert (dog["text"], dog["phrase"], dog["nouns"]) == ("Yes", "brown dog", [])
    assert (dog["char_start"], dog["char_end"]) == (0, 3)
    (same,), _ = place("Dog.", ["dog"])
    assert (same["text"], same["phrase"], same["nouns"]) == ("Dog", "Dog", ["dog"])
    assert place("not at all", ["brown dog"])[0] == []
    assert place("...", ["dog"])[0] == []


@given(st.text(max_size=40), st.lists(st.text(max_size=12), max_size=5), st.booleans())
def test_place_loses_nothing(answer, phrases, whole_words):
    found, rejected = place(answer, phrases, whole_words)
    assert len(found) + len(rejected) == len(phrases)
    for one in found:
        assert answer[one["char_start"] : one["char_end"]] == one["text"] != ""
    assert all(one["reason"] for one in rejected)


def test_the_rule_reads_questions_of_one_word_answers():
    looked_for = {
        ("Is there a dog in the image?", "Yes."): ["dog"],
        ("Is there a dog in the image?", "No."): [],
        ("How many red cups are there?", "2"): ["red cups"],
        ("What color is the car?", "Blue"): ["car"],
        ("What animal is this?", "Dog"): ["Dog"],
        ("What is there?", "A cup, a cup and a dog."): ["cup", "dog"],
    }
    for (question, answer), phrases in looked_for.items():
        assert [e["phrase"] for e in by_rule(question, answer)[0]] == phrases


def test_the_rule_keeps_the_place_of_its_phrases():
    found, _ = by_rule("What?", "A dog house and a dog, and the dog again.")
    assert [(e["text"], e["char_start"]) for e in found] == [("dog house", 2), ("dog", 18)]


def test_replies_are_parsed_strictly():
    good = '{"key_expressions": ["red car", "two dogs"]}'
    assert parse_reply(good) == ["red car", "two dogs"]
    assert parse_reply(f"```json\n{good}\n```") == ["red car", "two dogs"]
    assert parse_reply('{"key_expressions": []}') == []
    for bad in (
        "",
        "red car; two dogs",
        f"Here you are: {good}",
        '["red car"]',
        '{"key_expressions": "red car"}',
        '{"key_expressions": ["red car", 3]}',
        '{"expressions": ["red car"]}',
        '{"key_expressions": [], "comment": "none"}',
    ):
        with pytest.raises(ValueError, match="reply|key_expressions"):
            parse_reply(bad)


def test_the_request_holds_the_words_and_a_small_image():
    (message,) = request("What's {{there}}?", "A <b> & c", Image.new("RGBA", (2000, 1000)))
    image, text = message["content"]
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (SENT_PIXELS, SENT_PIXELS // 2)
    assert "Question: What's {{there}}?\nAnswer: A <b> & c" in text["text"]
    assert text["text"] == prompt("What's {{there}}?", "A <b> & c")


@pytest.mark.parametrize(
    ("phrase", "noun"),
    [
        ("the red traffic light", "traffic light"),
        ("a dog", "dog"),
        ("old wooden table", "table"),
        ("the baseball bat", "baseball bat"),
        ("running", None),
    ],
)
def test_compounds_keep_their_nouns(phrase, noun):
    assert compound_noun(phrase) == noun
