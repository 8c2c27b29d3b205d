"""Lexicons: which words of a caption name which object, and where they stand.

What it is: the matcher under CHAIR. A `Lexicon` knows terms ("puppy", "teddy bear") and the node
each term stands for ("dog", "teddy bear"); `mentions(text)` finds them with their character spans.
What it is not: a parser. It sees neither negation ("no dog") nor sense (orange, the colour).

    lexicon_from_nouns(["dog", "teddy bear"]).mentions("Two teddy bears and a dog.")
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["Lexicon", "Mention", "lexicon_from_nouns", "surface_forms"]

_BREAKS = r"\s,;:!?()\[\]{}<>\"@#$%&*‘’“”«»`\u2012-\u2015"
_CHUNK = re.compile(rf"(?:(?!--)[^{_BREAKS}])+|\S")
_PIECE = re.compile(rf"--+|[^{_BREAKS}/_.\-]+|[^\s\-_]")
_CLITIC = re.compile(r"(?:'(?:s|re|ll|ve|d|m)?|\.)+\Z", re.IGNORECASE)
_REMEMBERED = 200_000
_IRREGULAR = {
    "calf": "calves",
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "half": "halves",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "shelf": "shelves",
    "thief": "thieves",
    "tooth": "teeth",
    "wolf": "wolves",
}


class Mention(NamedTuple):
    """One object word: `text[start:end]` names `node` by way of `term` (singular, lower case)."""

    start: int
    end: int
    term: str
    node: str


class _Word(NamedTuple):
    """A word of some term. Words of no term are skipped: `place` tells what is next to what."""

    place: int
    start: int
    end: int
    singular: str
    joins_next: bool  # False where punctuation or a clitic separates it from the next word


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Terms, their nodes, and the spellings under which they are found.

    Attributes:
        name: the variant's name; goes into protocols.
        nodes: term -> node, both singular and lower case; a term may have several words.
        forms: spelling (lower case, one word) -> singular word; other spellings are never seen.
        compounds: words joined by one space -> term. A term that is no key of `nodes` swallows its
            words without naming an object ("home plate").
        dropped_beside: term -> other term; the first is ignored in a text that has the second.
        splits_compounds: whether hyphens and slashes separate words ("teddy-bear" is two).
    """

    name: str
    nodes: Mapping[str, str]
    forms: Mapping[str, str]
    compounds: Mapping[str, str]
    dropped_beside: Mapping[str, str]
    splits_compounds: bool

    @cached_property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the content's SHA-256: equal lexicons, equal hash."""
        tables = (self.nodes, self.forms, self.compounds, self.dropped_beside)
        content = [self.splits_compounds, *(sorted(table.items()) for table in tables)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @cached_property
    def _longest(self) -> int:
        return max((compound.count(" ") + 1 for compound in self.compounds), default=1)

    @cached_property
    def _starts(self) -> frozenset[str]:
        return frozenset(compound.split(" ", 1)[0] for compound in self.compounds)

    @cached_property
    def _seen(self) -> dict[str, tuple[str | None, int, int]]:
        return {}

    def node(self, name: str) -> str:
        """The node of an object's name, as ground truth spells it.

        Raises:
            ValueError: the lexicon has no such term.
        """
        key = " ".join(str(name).lower().replace("-", " ").split())
        found = self.nodes.get(key) or self.nodes.get(self.compounds.get(key, ""))
        if found is None:
            raise ValueError(
                f"{name!r} is no object of the lexicon {self.name!r}, which has "
                f"{len(set(self.nodes.values()))}. Use its names, or make a lexicon of your own "
                "with lexicon_from_nouns(nouns)."
            )
        return found

    def mentions(self, text: str) -> list[Mention]:
        """Every object word of `text`, in order; spans are character offsets and never overlap."""
        words = self._words(text)
        found, at = [], 0
        while at < len(words):
            taken, term = self._term_at(words, at)
            found.append((words[at].start, words[at + taken - 1].end, term))
            at += taken
        terms = {term for _, _, term in found}
        return [
            Mention(start, end, term, self.nodes[term])
            for start, end, term in found
            if term in self.nodes and self.dropped_beside.get(term) not in terms
        ]

    def _words(self, text: str) -> list[_Word]:
        pattern = _PIECE if self.splits_compounds else _CHUNK
        words = []
        for place, match in enumerate(pattern.finditer(text)):
            chunk = match.group()
            singular, lead, length = self._seen.get(chunk) or self._look_up(chunk)
            if singular is not None:
                start = match.start() + lead
                joins = length == len(chunk)
                words.append(_Word(place, start, start + length, singular, joins))
        return words

    def _look_up(self, chunk: str) -> tuple[str | None, int, int]:
        """The singular of a chunk of text, and where the word stands in it: offset and length."""
        bare = _CLITIC.sub("", chunk)
        word = bare.lstrip("'")
        entry = (self.forms.get(word.lower()), len(bare) - len(word), len(word))
        if len(self._seen) < _REMEMBERED:
            self._seen[chunk] = entry
        return entry

    def _term_at(self, words: list[_Word], at: int) -> tuple[int, str]:
        """How many words the longest term that starts at `at` takes, and the term."""
        singular = words[at].singular
        if singular in self._starts:
            for size in range(min(self._longest, len(words) - at), 1, -1):
                run = words[at : at + size]
                if run[-1].place - run[0].place == size - 1 and all(w.joins_next for w in run[:-1]):
                    term = self.compounds.get(" ".join(word.singular for word in run))
                    if term is not None:
                        return size, term
        return 1, singular


def surface_forms(word: str) -> list[str]:
    """The word and its plurals by English rule, plus the singular of a plural-looking word.

    `dog` -> dog, dogs; `wolf` -> wolf, wolves; `grapes` -> grapes, grape. Some are no English words
    ("scissorses"); they are harmless, nobody writes them.
    """
    forms = [word]
    for singular, plural in _IRREGULAR.items():
        if word == singular or (len(singular) > 2 and word.endswith(singular)):
            forms.append(word.removesuffix(singular) + plural)
    if word.endswith("s") and not word.endswith(("ss", "us")):
        forms.append(word[:-1])
    if re.search(r"[^aeiou]y\Z", word):
        forms.append(word[:-1] + "ies")
    elif re.search(r"(?:s|x|z|ch|sh)\Z", word):
        forms.append(word + "es")
    else:
        forms.append(word + "s")
    if re.search(r"[^aeiou]o\Z", word):
        forms.append(word + "es")
    return forms


def lexicon_from_nouns(
    nouns: Iterable[str], synonyms: Mapping[str, Iterable[str]] | None = None, name: str = "open"
) -> Lexicon:
    """An open lexicon: every noun is a node, found in singular and plural, however many words it
    has.

    "teddy bear" is also found as "teddy bears", "teddy-bear" and "teddybear"; the longest noun wins
    ("hot dog" is no "dog").

    Args:
        nouns: the objects; case and extra blanks are ignored.
        synonyms: noun -> further terms for it.
        name: the variant's name in protocols.

    Raises:
        ValueError: no nouns, an empty noun, synonyms of an unlisted noun, or one term for two
            nouns.
        TypeError: `nouns` is one string.
    """
    nodes = _nodes(nouns, synonyms or {})
    forms: dict[str, str] = {}
    compounds: dict[str, str] = {}
    for term in nodes:  # exact spellings first: a derived form never hides a listed word
        for word in term.split():
            forms[word] = word
    for term in nodes:
        *first, last = term.split()
        for form in surface_forms(last):
            forms.setdefault(form, last)
            if first:
                forms.setdefault("".join([*first, form]), term)
        if first:
            compounds[term] = term
    return Lexicon(name, nodes, forms, compounds, {}, splits_compounds=True)


def _nodes(nouns: Iterable[str], synonyms: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """term -> noun, in order, normalised; refuses what would make scores ambiguous."""
    for given in (nouns, *synonyms.values()):
        if isinstance(given, str):
            raise TypeError(f"Expected a list of terms, not the one string {given!r}.")
    listed = [_normal(noun) for noun in nouns]
    if not listed:
        raise ValueError("A lexicon needs at least one noun.")
    more = {_normal(noun): [_normal(term) for term in terms] for noun, terms in synonyms.items()}
    if stray := sorted(set(more) - set(listed)):
        raise ValueError(
            f"Synonyms of nouns that are not listed: {', '.join(stray)}. List them too."
        )
    nodes: dict[str, str] = {}
    for noun in listed:
        for term in (noun, *more.get(noun, [])):
            if nodes.setdefault(term, noun) != noun:
                raise ValueError(
                    f"{term!r} stands for both {nodes[term]!r} and {noun!r}; choose one."
                )
    return nodes


def _normal(term: str) -> str:
    normal = " ".join(str(term).lower().replace("-", " ").split())
    if not normal:
        raise ValueError("A noun is empty. Leave it out.")
    return normal
