"""Instruction data from annotations alone: templates over what an image shows and what it does not.

What it is: LRV's kinds of instructions (arXiv 2306.14565) without a model: positive ones, objects
that are absent, wrong attributes and places, wrong kinds, and the same of charts' tables. Every
answer follows from the annotations. What it is not: varied language, or the tasks that need a model
(sentiment, style, common sense, activities).

    vocabulary = count_nouns([record, ...])
    made = generate(record, size, vocabulary, positives=6, negatives=2, seed=0)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.processing.instructions import NEGATIVES, Instruction, negative, positive
from firsthand.processing.key_expressions import compound_noun, noun_phrases
from firsthand.recipes.chart_rules import chart_instructions
from firsthand.recipes.instruction_checks import Named

COLORS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink"),
    *("brown", "black", "white", "gray"),
)
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
FEW_PLACES = 4  # two by two: a box of more is all over the image
LARGER = 2.0  # a box of this many times another's area is larger
ABSENT = 12  # absent nouns that are tried an image
MASS = ("broccoli", "corn", "bread")
Record = Mapping[str, Any]
Vocabulary = Mapping[str, int]


@dataclass(frozen=True)
class Thing:
    """An object of an image; what is not known is empty. `area` in pixels.

    `touched` are places that its box reaches into, besides `position`, the place of its middle.
    """

    noun: str
    color: str = ""
    position: str = ""
    kind: str = ""
    area: float = 0.0
    touched: frozenset[str] = frozenset()


def thing_of(region: Record, size: tuple[int, int] | None) -> Thing | None:
    """The object of a region: what it says, or its caption's first noun, colour and box.

    `size` is the image's (width, height). None where the caption names no object. A box that
    reaches into more than FEW_PLACES is nowhere in particular.
    """
    caption = region["caption"]
    noun = region.get("noun") or _first_noun(caption)
    if noun is None:
        return None
    color = region.get("color", "" if "noun" in region else _color(caption, noun))
    left, top, width, height = region["bbox"]
    position, touched = region.get("position", ""), frozenset[str]()
    if not position and size is not None:
        touched = touched_places(region["bbox"], size)
        if len(touched) <= FEW_PLACES:
            position = position_of((left + width / 2) / size[0], (top + height / 2) / size[1])
    return Thing(noun.lower(), color, position, region.get("kind", ""), width * height, touched)


def _first_noun(caption: str) -> str | None:
    spans = noun_phrases(caption)
    return compound_noun(caption[spans[0][0] : spans[0][1]]) if spans else None


def _color(caption: str, noun: str) -> str:
    """The one colour that a caption says; an orange is none."""
    words = caption.lower().replace("grey", "gray").split()
    spoken = [word for word in words if word in COLORS and word not in noun.split()]
    return spoken[0] if len(spoken) == 1 else ""


def position_of(x: float, y: float) -> str:
    """`top left`, `center`, ...: where a point (shares of width and height) lies, in thirds."""
    row, column = (names[min(max(int(3 * at), 0), 2)] for names, at in ((ROWS, y), (COLUMNS, x)))
    return f"{row} {column}".strip() or "center"


def touched_places(box: Sequence[float], size: tuple[int, int]) -> frozenset[str]:
    """The places that a box [x, y, width, height] reaches into; `size` is (width, height)."""
    left, top, width, height = box
    across, down = _thirds(left, width, size[0]), _thirds(top, height, size[1])
    return frozenset(f"{ROWS[y]} {COLUMNS[x]}".strip() or "center" for y in down for x in across)


def _thirds(start: float, length: float, side: int) -> range:
    first, last = (min(max(int(3 * at / side), 0), 2) for at in (start, start + length))
    return range(first, last + 1)


def count_nouns(records: Iterable[Record]) -> Counter[str]:
    """How often regions name each noun: what absent objects are drawn from."""
    things = (thing_of(region, None) for record in records for region in record["regions"])
    return Counter(thing.noun for thing in things if thing is not None)


def is_plural(noun: str) -> bool:
    """Whether a noun looks like a plural: `grapes`, not `bus` or `glass`."""
    return noun.endswith("s") and not noun.endswith(("ss", "us", "is"))


def with_article(noun: str) -> str:
    """`a dog`, `an apple`, `grapes`."""
    return noun if is_plural(noun) or noun in MASS else scenes.with_article(noun)


def be(noun: str) -> str:
    """`is` or `are`."""
    return "are" if is_plural(noun) else "is"


def existence(noun: str) -> str:
    """`Is there a dog in the image?`"""
    return f"{be(noun).capitalize()} there {with_article(noun)} in the image?"


def placed(position: str) -> str:
    """`in the top left`, `at the top`, `on the left`: to stand in a sentence."""
    preposition = {"top": "at", "bottom": "at", "left": "on", "right": "on"}.get(position, "in")
    return f"{preposition} the {position}"


def generate(
    record: Record,
    size: tuple[int, int] | None,
    vocabulary: Vocabulary,
    positives: int = 10,
    negatives: int = 3,
    seed: int = 0,
) -> list[Instruction]:
    """Instructions of one record, the same for the same arguments.

    Args:
        record: as `dense_captions.read` gives it.
        size: width and height of the image in pixels; None where positions do not matter.
        vocabulary: nouns of all images, with counts.
        positives: at most so many; tasks take turns.
        negatives: at most so many of each kind.
        seed: of the draws, which also depend on the record's `image_id`.
    """
    rng = random.Random(f"{seed}/{record['image_id']}")
    if record["table"]:
        pools = chart_instructions(record, rng)
    else:
        pools = _image_instructions(record, size, vocabulary, rng)
    made = _by_turns([one for one in pools if one["polarity"] == "positive"], positives, rng)
    for kind in NEGATIVES:
        made += _by_turns([one for one in pools if one["task"] == kind], negatives, rng)
    return made


def _by_turns(found: list[Instruction], count: int, rng: random.Random) -> list[Instruction]:
    """At most `count`, a task after the other; each question once."""
    pools: dict[str, list[Instruction]] = {}
    for one in {one["question"]: one for one in found}.values():
        pools.setdefault(one["task"], []).append(one)
    for pool in pools.values():
        rng.shuffle(pool)
    order = list(pools)
    rng.shuffle(order)
    rounds = max(map(len, pools.values()), default=0)
    return [pools[t][i] for i in range(rounds) for t in order if i < len(pools[t])][:count]


def _image_instructions(
    record: Record, size: tuple[int, int] | None, vocabulary: Vocabulary, rng: random.Random
) -> list[Instruction]:
    found = (thing_of(region, size) for region in record["regions"])
    things = [thing for thing in found if thing is not None]
    times = Counter(thing.noun for thing in things)
    single = [thing for thing in things if times[thing.noun] == 1]
    exact = all(region.get("noun") for region in record["regions"])
    absent = _absent(record, vocabulary, rng)
    made = [one for thing in single for one in _of_thing(thing, rng)]
    made += _of_existence(list(times)) + _of_pairs(single, rng)
    made += [positive("image captioning", "Describe the image.", t) for t in record["captions"][:1]]
    if exact:
        made += _of_all(things, times, bool(record["captions"]))
    for noun in absent:
        made += _of_absent(noun, single)
    for thing in single:
        made += _wrong_attributes(thing, rng)
    return made + [one for thing in single for one in _wrong_kind(thing, things, rng)]


def _absent(record: Record, vocabulary: Vocabulary, rng: random.Random) -> list[str]:
    """Different nouns that other images show, drawn by how often they do; this one names none."""
    named = Named([region["caption"] for region in record["regions"]] + record["captions"])
    nouns, counts = list(vocabulary), list(vocabulary.values())
    drawn = rng.choices(nouns, counts, k=4 * ABSENT) if nouns else []
    return [noun for noun in dict.fromkeys(drawn) if not named.names(noun)][:ABSENT]


def _of_thing(thing: Thing, rng: random.Random) -> list[Instruction]:
    noun, verb = thing.noun, be(thing.noun)
    made = []
    if thing.color:
        task, said = "object attribute detection", f"The {noun} {verb} {thing.color}."
        made += [
            positive(task, f"What color {verb} the {noun}?", said),
            positive(task, f"Tell me the color of the {noun}.", said),
            positive("visual entailment", f"{verb.capitalize()} the {noun} {thing.color}?",
                     f"Yes, the {noun} {verb} {thing.color}."),
            positive("multiple-choice question", *_choice(f"What color {verb} the {noun}?",
                                                          thing.color, COLORS, rng)),
        ]  # fmt: skip
    if thing.position:
        said = f"The {noun} {verb} {placed(thing.position)}."
        made += [
            positive("spatial relation", f"Where {verb} the {noun}?", said),
            positive("spatial relation", f"Say where in the image the {noun} {verb}.", said),
        ]
    return made


def _choice(
    question: str, right: str, options: Sequence[str], rng: random.Random
) -> tuple[str, str]:
    listed = [right, *rng.sample([o for o in options if o != right], 3)]
    rng.shuffle(listed)
    text = ", ".join(f"{letter}) {one}" for letter, one in zip("ABCD", listed, strict=True))
    return f"{question} {text}", f"{'ABCD'[listed.index(right)]}) {right}."


def _of_existence(present: list[str]) -> list[Instruction]:
    made = []
    for noun in present:
        verb, it = be(noun), with_article(noun)
        task, yes = "object existence", f"Yes, there {verb} {it} in the image."
        made += [
            positive(task, existence(noun), yes),
            positive(task, f"Can you see {it} in the image?", yes),
            positive("image-text matching", f'Does the image match the text "{it}"?',
                     f"Yes, the image shows {it}."),
        ]  # fmt: skip
    return made


def _of_pairs(single: list[Thing], rng: random.Random) -> list[Instruction]:
    """Which of two objects is larger, and which stands where nothing else does."""
    made = []
    for first, second in zip(single, single[1:], strict=False):
        larger, smaller = sorted((first, second), key=lambda t: -t.area)
        if larger.area >= LARGER * smaller.area > 0:
            pair = [first.noun, second.noun]
            rng.shuffle(pair)
            asked = f"Which takes up more of the image, the {pair[0]} or the {pair[1]}?"
            made.append(positive("object comparison", asked, f"The {larger.noun}."))
    return made


def _of_all(things: list[Thing], times: Counter[str], has_caption: bool) -> list[Instruction]:
    """What needs every object to be annotated: counts, places and the caption."""
    made = []
    number = len(things)
    if number < len(scenes.NUMBERS):
        said = f"There {'is' if number == 1 else 'are'} {scenes.NUMBERS[number]}."
        made.append(positive("object counting", scenes.COUNTING_QUESTION, said))
    for thing in things:
        here = [t for t in things if thing.position in (t.position, *t.touched)]
        if thing.position and len(here) == 1:
            asked = f"What is {placed(thing.position)} of the image?"
            said = f"{with_article(thing.noun)} {be(thing.noun)} there.".capitalize()
            made.append(positive("referential expression grounding", asked, said))
    if not has_caption and things and max(times.values()) == 1 and all(t.position for t in things):
        listed = [{"noun": t.noun, "position": t.position} for t in things]
        for question in (scenes.CAPTION_QUESTION, "What does the image show, and where?"):
            made.append(positive("image captioning", question, scenes.caption(listed)))
    return made


def _of_absent(noun: str, single: list[Thing]) -> list[Instruction]:
    verb, it = be(noun), with_article(noun)
    no = f"there {verb} no {noun} in the image."
    near = f" next to the {single[0].noun}" if single else ""
    asked = {
        existence(noun): f"No, {no}",
        f"Can you see {it} in the image?": f"No, {no}",
        f"What color {verb} the {noun}?": no.capitalize(),
        f"Where {verb} the {noun}?": no.capitalize(),
        f"Describe the {noun}{near}.": no.capitalize(),
        f"What {verb} the {noun} doing?": no.capitalize(),
    }
    return [negative("nonexistent object", noun, q, a) for q, a in asked.items()]


def _wrong_attributes(thing: Thing, rng: random.Random) -> list[Instruction]:
    noun, verb = thing.noun, be(thing.noun)
    asked: dict[str, str] = {}
    if thing.color:
        wrong = rng.choice([color for color in COLORS if color != thing.color])
        right = f"the {noun} {verb} {thing.color}"
        asked[f"{verb.capitalize()} the {noun} {wrong}?"] = f"No, {right}."
        asked[f"Why {verb} the {noun} {wrong}?"] = f"{right.capitalize()}, not {wrong}."
        asked[f"Describe the {wrong} {noun}."] = f"{right.capitalize()}, not {wrong}."
    if thing.position:
        known = {thing.position, *thing.touched}
        places = [place for place in scenes.POSITIONS if place not in known]
        wrong, right = rng.choice(places), f"the {noun} {verb} {placed(thing.position)}"
        asked[f"{verb.capitalize()} the {noun} {placed(wrong)}?"] = f"No, {right}."
        told = f"Tell me about the {noun} {placed(wrong)} of the image."
        asked[told] = f"{right.capitalize()}."
    return [negative("existent object", noun, q, a) for q, a in asked.items()]


def _wrong_kind(thing: Thing, things: list[Thing], rng: random.Random) -> list[Instruction]:
    """False knowledge of what kind a thing is of, where annotations say the right one."""
    kinds = sorted({other.kind for other in things if other.kind and other.kind != thing.kind})
    if not thing.kind or not kinds:
        return []
    wrong, noun, verb = rng.choice(kinds), thing.noun, be(thing.noun)
    right = f"the {noun} {verb} in the category {thing.kind}"
    asked = {
        f"{verb.capitalize()} the {noun} in the category {wrong}?": f"No, {right}.",
        f"Besides the {noun}, what else of the category {wrong} is in the image?": (
            f"{right.capitalize()}, not in {wrong}."
        ),
    }
    return [negative("knowledge", noun, q, a) for q, a in asked.items()]
