"""GAVIE's two marks by rule, from annotations: an offline judge that reads the words it knows.

What it is: `rule_judge`, exact where every object, its attributes and its relations are annotated.
It finds what an answer claims in known words, and looks each claim up; figures are called
`gavie_rule_...`. What it is not: a language model, or a stand-in for one. It reads plain sentences:
an attribute belongs to the noun it stands before, else to the last noun before it; a negation
reaches to the end of its clause. An answer that claims nothing in known words is counted, not
marked.

    from firsthand.metrics.gavie import rules
    words = rules.Words(["dog", "cat"], {"color": ["red", "blue"]})
    objects = {"7": [{"noun": "dog", "properties": {"color": ["red"]}}]}
    rated = rules.rate(rows, objects, words)  # gavie.score(rated)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .prompts import Row
from .replies import HIGHEST, Rating
from .scoring import RULE_JUDGE

__all__ = ["Claim", "Words", "claims", "holds", "rate", "rule_judge"]

Object = Mapping[str, Any]
"""`{noun, properties: {kind: [what holds]}}`; of a kind that it lacks nothing is known."""
Property = tuple[str, str]  # kind, phrase

NEGATIONS = frozenset("no not never none without neither nor cannot isnt arent".split())
NUMBERS = "zero one two three four five six seven eight nine ten".split()
VERDICTS = {"yes": True, "yeah": True, "no": False, "nope": False}
STOPS = frozenset(".;!?") | {"but", "while", "however", "instead"}  # a negation ends there
SUBJECTS = frozenset("there it i the this that we you they".split())  # "No there is a dog"
ARTICLES = frozenset("a an the".split())
WHOLES = frozenset("image picture photo scene".split())
ASKS_YES_NO = frozenset("is are was were do does did can could has have isn't aren't".split())


class Claim(NamedTuple):
    """An object with all of these properties is there (`stated`), or is not."""

    noun: str
    properties: tuple[Property, ...] = ()
    stated: bool = True

    def __str__(self) -> str:
        said = " ".join([self.noun, *(phrase for _, phrase in self.properties)])
        return said if self.stated else f"no {said}"


class Words:
    """What rules can read.

    Args:
        nouns: names of objects; one that an image's objects lack is not in the image.
        properties: kind -> its phrases, for attributes ("color": ["red"]) and relations
            ("position": ["top left"]).
        asked_by: word in a question -> the kind it asks for; the kinds' own names ask for them.
    """

    def __init__(
        self,
        nouns: Iterable[str],
        properties: Mapping[str, Sequence[str]] | None = None,
        asked_by: Mapping[str, str] | None = None,
    ) -> None:
        properties = properties or {}
        self.asked_by = {kind: kind for kind in properties} | dict(asked_by or {})
        self.nouns = {
            tuple(tokens(form)): ("", noun) for noun in nouns for form in (*_plurals(noun), noun)
        }
        self.properties = {
            tuple(tokens(phrase)): (kind, phrase)
            for kind, phrases in properties.items()
            for phrase in phrases
        }
        self.longest = max(map(len, [*self.nouns, *self.properties]), default=1)

    def read(self, said: list[str]) -> list[str | Property]:
        """Tokens with the longest known terms as (kind, phrase), nouns of kind ""."""
        found: list[str | Property] = []
        i = 0
        while i < len(said):
            noun, one = (self._at(said, i, terms) for terms in (self.nouns, self.properties))
            as_noun = noun > one or (noun == one > 0 and self._stands_alone(said, i, noun))
            table = self.nouns if as_noun else self.properties
            size = max(noun, one)
            found.append(table[tuple(said[i : i + size])] if size else said[i])
            i += size or 1
        return found

    def _at(self, said: list[str], i: int, terms: Mapping[tuple[str, ...], Property]) -> int:
        """The number of tokens of the longest term that begins at i; 0 for none."""
        sizes = range(min(self.longest, len(said) - i), 0, -1)
        return next((n for n in sizes if tuple(said[i : i + n]) in terms), 0)

    def _stands_alone(self, said: list[str], i: int, size: int) -> bool:
        """Whether a term that is noun and property is the noun: `an orange`, no `orange cup`."""
        return i > 0 and said[i - 1] in ARTICLES and not self._at(said, i + size, self.nouns)


def tokens(text: str) -> list[str]:
    """Lower-case words, and punctuation marks as tokens of their own."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[.,;!?]", text.lower().replace("’", "'"))


def _plurals(noun: str) -> list[str]:
    forms = [noun + "s", noun + "es"]
    return [*forms, noun[:-1] + "ies"] if noun.endswith("y") else forms


def claims(text: str, words: Words, topic: str | None = None) -> list[Claim]:
    """What a text claims, each once, in order.

    Args:
        text: an answer without its leading yes or no.
        words: that can be read.
        topic: the noun that an attribute belongs to where no noun precedes it.

    >>> words = Words(["dog", "cat"], {"color": ["red"], "position": ["top left"]})
    >>> [str(claim) for claim in claims("A red dog top left, but no cat.", words)]
    ['dog', 'dog red', 'dog top left', 'no cat']
    """
    items = words.read(tokens(text))
    found: list[Claim] = []
    before: list[Property] = []  # properties that belong to the next noun
    denied, latest = False, topic
    for i, item in enumerate(items):
        if isinstance(item, str):
            if item in NEGATIONS or item.endswith("n't"):
                denied = True
            elif item in STOPS or (item == "," and _kind(items, i + 1) != ""):
                denied, before = False, []
            elif item in ARTICLES and _is_unknown(items, i + 1, words):
                latest = None  # what follows is said of something that we have no word for
        elif item[0] == "":
            latest = item[1]
            found += _of_noun(latest, before, denied)
            before = []
        elif _belongs_to_next(items, i):
            before.append(item)
        elif latest is not None:
            _add_property(found, latest, item, denied)
    return list(dict.fromkeys(found))


def _kind(items: list[str | Property], i: int) -> str | None:
    """The kind of a property, "" for a noun, None for other words and beyond the end."""
    return items[i][0] if i < len(items) and not isinstance(items[i], str) else None


def _is_unknown(items: list[str | Property], i: int, words: Words) -> bool:
    """Whether an article's noun may be one that we have no word for."""
    known = WHOLES | words.asked_by.keys()
    return i < len(items) and isinstance(items[i], str) and items[i] not in known


def _belongs_to_next(items: list[str | Property], i: int) -> bool:
    """Whether a property stands directly before its noun, or first in its clause."""
    k = i + 1
    while _kind(items, k) or (items[k : k + 1] == ["and"] and _kind(items, k + 1) == items[i][0]):
        k += 1  # further properties: "red and blue car"
    edges = [k for k, item in enumerate(items) if item in STOPS or item in ("and", ",")]
    start = max((edge for edge in edges if edge < i), default=-1)
    end = min((edge for edge in edges if edge > i), default=len(items))
    nouns = [k for k in range(start + 1, end) if _kind(items, k) == ""]
    return _kind(items, k) == "" or (bool(nouns) and nouns[0] > i)


def _of_noun(noun: str, properties: list[Property], denied: bool) -> list[Claim]:
    if denied:
        return [Claim(noun, tuple(properties), False)]
    return [Claim(noun), *(Claim(noun, (one,)) for one in properties)]


def _add_property(found: list[Claim], noun: str, one: Property, denied: bool) -> None:
    """A property after its noun; with the noun denied, both together are."""
    if found and found[-1].noun == noun and not found[-1].stated and not found[-1].properties:
        found[-1] = found[-1]._replace(properties=(one,))
    else:
        found.append(Claim(noun, (one,), not denied))


def holds(claim: Claim, objects: Sequence[Object]) -> bool | None:
    """Whether a claim is true of an image's objects; None where the annotations do not say."""
    shown = [_has(one, claim.properties) for one in objects if one["noun"] == claim.noun]
    truth = True if True in shown else None if None in shown else False
    return truth if claim.stated or truth is None else not truth


def _has(one: Object, properties: Iterable[Property]) -> bool | None:
    known = one.get("properties", {})
    told = [phrase in known[kind] if kind in known else None for kind, phrase in properties]
    return False if False in told else None if None in told else True


def rule_judge(question: str, answer: str, objects: Sequence[Object], words: Words) -> Rating:
    """Marks of an answer, as `parse` gives them of a judge's reply.

    Relevance is 10 where the answer gives what is asked for (yes or no, a number, a property of the
    kind asked for, an object; or says that what is asked about is not there), else 0. Accuracy is
    10 times the share of its claims that hold, of those that the annotations decide.

    Raises:
        ValueError: none of its claims can be decided, so there are no marks.
    """
    asked, said = tokens(question), tokens(answer)
    about = claims(" ".join(w for w in asked if w not in NEGATIONS), words)
    verdict = _verdict(said) if asked[:1] and asked[0] in ASKS_YES_NO else None
    found = claims(
        " ".join(said[_verdict(said) is not None :]), words, about[0].noun if about else None
    )
    judged = {str(claim): holds(claim, objects) for claim in found}
    if verdict is not None and about:
        judged[" ".join(["yes" if verdict else "no", "to", *map(str, about)])] = _agrees(
            verdict, [holds(claim, objects) for claim in about]
        )
    number = _number(said) if "how many".split() == asked[:2] else None
    if number is not None:
        nouns = {claim.noun for claim in about}
        there = sum(not nouns or one["noun"] in nouns for one in objects)
        judged[f"{number} of them"] = number == there
    known = {text: truth for text, truth in judged.items() if truth is not None}
    if said and not known:
        raise ValueError(f"the annotations decide no claim of the answer {answer[:80]!r}")
    relevant = bool(said) and _is_relevant(asked, about, found, verdict, number, words)
    false = [text for text, truth in known.items() if not truth]
    share = 1 - len(false) / len(known) if known else 1.0
    return {
        "relevance": HIGHEST if relevant else 0,
        "accuracy": HIGHEST * share,
        "relevance_reason": f"what is asked for is {'given' if relevant else 'not given'}",
        "accuracy_reason": f"{len(known) - len(false)} of {len(known)} claims hold"
        + (f"; not: {', '.join(false)}" if false else ""),
    }


def _verdict(said: list[str]) -> bool | None:
    """The yes or no that an answer begins with; "no" before a noun is a negation."""
    follows = said[1] if len(said) > 1 else "."
    begins = said[:1] and (follows in SUBJECTS or follows in ".,;!?")
    return VERDICTS.get(said[0]) if begins else None


def _agrees(verdict: bool, truths: list[bool | None]) -> bool | None:
    """Whether yes or no is right, where yes says that all of it holds."""
    whole = False if False in truths else None if None in truths else True
    return None if whole is None else whole == verdict


def _number(said: list[str]) -> int | None:
    """The first number of an answer, in digits or as a word up to ten."""
    for word in said:
        if word.isdecimal() and len(word) < 6:
            return int(word)
        if word in NUMBERS:
            return NUMBERS.index(word)
    return None


def _is_relevant(
    asked: list[str],
    about: list[Claim],
    found: list[Claim],
    verdict: bool | None,
    number: int | None,
    words: Words,
) -> bool:
    """Whether an answer gives what the question asks for."""
    nouns = {claim.noun for claim in about}
    if any(not claim.stated and claim.noun in nouns and not claim.properties for claim in found):
        return True  # what is asked about is not there
    if asked[:2] == ["how", "many"]:
        return number is not None
    if asked[:1] and asked[0] in ASKS_YES_NO:
        return verdict is not None or any(claim.noun in nouns for claim in found)
    if kinds := {words.asked_by[word] for word in asked if word in words.asked_by}:
        given = [claim for claim in found if not nouns or claim.noun in nouns]
        return any(kind in kinds for claim in given for kind, _ in claim.properties)
    return bool(found)


def rate(
    rows: Iterable[Row],
    objects: Mapping[Any, Sequence[Object]],
    words: Words,
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """The rows with `rule_judge`'s marks as `ratings`; with `unparsed` where it has none.

    Rows with an `error` or with `ratings` are left as they are.

    Args:
        rows: `{question, prediction, image_id}`.
        objects: image id -> its objects, all of them; ids compare as text.
        words: that can be read.
        skip_bad: a row without question, prediction or annotations gets an `error` instead of
            raising.

    Raises:
        ValueError: such a row, by name.
    """
    known = {str(image_id): listed for image_id, listed in objects.items()}
    rated = [dict(row) for row in rows]
    for row in rated:
        if row.get("error") or "ratings" in row:
            continue
        reason = _unusable(row, known)
        if reason and not skip_bad:
            raise ValueError(reason)
        if reason:
            row["error"] = reason
            continue
        row.pop("unparsed", None)
        row["judge"] = RULE_JUDGE
        shown = known[str(row["image_id"])]
        try:
            row["ratings"] = [rule_judge(row["question"], row["prediction"], shown, words)]
        except ValueError as error:
            row["unparsed"] = str(error)
    return rated


def _unusable(row: Row, known: Mapping[str, Any]) -> str | None:
    for name in ("question", "prediction"):
        if not isinstance(row.get(name), str):
            kind = type(row.get(name)).__name__
            return f"Row {row.get('id')!r}: `{name}` is of type {kind}, not str."
    if str(row.get("image_id")) not in known:
        return f"Row {row.get('id')!r}: no annotations of the image {row.get('image_id')!r}."
    return None
