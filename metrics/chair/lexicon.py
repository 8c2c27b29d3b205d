"""Lexicons: which words of a caption name which object, and where they stand.

What it is: the matcher under CHAIR. A `Lexicon` knows terms ("puppy", "teddy bear") and the node
each term stands for ("dog", "teddy bear"); `mentions(text)` finds them with their character spans.
What it is not: a parser. It sees neither negation ("no dog") nor sense (orange, the colour).

    lexicon_from_nouns(["dog", "teddy bear"]).mentions("Two teddy bears and a dog.")
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress
from typing import Any, NamedTuple

__all__ = ["Lexicon", "Mention", "lexicon_from_nouns", "surface_forms"]

_BREAKS = r"\s,;:!?()\[\]{}<>\"@#$%&*‘’“”«»`\u2012-\u2015"
_PIECE = re.compile(rf"--+|[^{_BREAKS}/_.\-]+|[^\s\-_]")
_CLITIC = re.compile(r"(?:'(?:s|re|ll|ve|d|m)?|\.)+\Z", re.IGNORECASE)
_PIECES_KEPT = 200_000
_TEXTS_KEPT = 10_000
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


Word = tuple[int, int, str]
"""A word of some term: its first character, the one after its last, and its singular."""


class _Memo(dict[str, Any]):
    """What a function finds in a text, found once; forgets everything when it is full."""

    def __init__(self, find: Callable[[str], Any], size: int) -> None:
        super().__init__()
        self._find = find
        self._size = size

    def __missing__(self, text: str) -> Any:
        found = self._find(text)
        if len(self) >= self._size:
            self.clear()
        self[text] = found
        return found


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
        breaks: further characters that separate words.
        counting: what CHAIR counts: all "mentions"; "distinct false": repeats of a hallucinated
            term within a caption count once; "distinct": repeats of any term count once.
        reader: what finds the words of a text in place of `forms`, a tagger for instance; it gives
            (start, end, singular) of words in order, other words left out or not.
    """

    name: str
    nodes: Mapping[str, str]
    forms: Mapping[str, str]
    compounds: Mapping[str, str]
    dropped_beside: Mapping[str, str]
    splits_compounds: bool
    breaks: str = ""
    counting: str = "mentions"
    reader: Callable[[str], Iterable[Word]] | None = None

    @cached_property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the content's SHA-256: equal lexicons, equal hash."""
        tables = (self.nodes, self.forms, self.compounds, self.dropped_beside)
        content = [self.splits_compounds, *(sorted(table.items()) for table in tables)]
        if (self.breaks, self.counting, self.reader) != ("", "mentions", None):
            content.append([self.breaks, self.counting, self.reader is not None])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @cached_property
    def _longest(self) -> int:
        return max((compound.count(" ") + 1 for compound in self.compounds), default=1)

    @cached_property
    def _special(self) -> frozenset[str]:
        """Words that need a look around: first words of compounds, and terms to be dropped."""
        starts = {compound.split(" ", 1)[0] for compound in self.compounds}
        return frozenset(starts | self.dropped_beside.keys())

    @cached_property
    def _nodes_of_names(self) -> _Memo:
        return _Memo(self._node_of_name, _PIECES_KEPT)

    @cached_property
    def _words_of_pieces(self) -> _Memo:
        return _Memo(self._words_of_piece, _PIECES_KEPT)

    @cached_property
    def _mentions_of_texts(self) -> _Memo:
        """Whole texts too: a score and its intervals read the same ones."""
        return _Memo(self._mentions_of_text, _TEXTS_KEPT)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        if self.splits_compounds:
            return _PIECE
        return re.compile(rf"--+|(?:(?!--)[^{_BREAKS}{re.escape(self.breaks)}])+|\S")

    def node(self, name: str) -> str:
        """The node of an object's name, as ground truth spells it.

        Raises:
            ValueError: the lexicon has no such term.
        """
        return self._nodes_of_names[str(name)]

    def _node_of_name(self, name: str) -> str:
        key = " ".join(name.lower().replace("-", " ").split())
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
        return list(self._mentions_of_texts[text])

    def _mentions_of_text(self, text: str) -> tuple[Mention, ...]:
        words = list(self.reader(text)) if self.reader else self._words(text)
        nodes, special, make = self.nodes, self._special, tuple.__new__
        found, at, overrules = [], 0, False
        while at < len(words):
            start, end, term = words[at]
            at += 1
            if term in special:
                end, term, at = self._compound(text, words, at - 1)
                overrules = overrules or term in self.dropped_beside
            node = nodes.get(term)
            if node is not None:
                found.append(make(Mention, (start, end, term, node)))
        return tuple(self._kept(found) if overrules else found)

    def _kept(self, found: list[Mention]) -> list[Mention]:
        """Without the terms that another term of the same text overrules."""
        terms = {mention.term for mention in found}
        return [m for m in found if self.dropped_beside.get(m.term) not in terms]

    def _words(self, text: str) -> list[Word]:
        """The words of terms; text between blanks is looked up whole, and only once."""
        pieces = text.split(" ")
        entries = list(map(self._words_of_pieces.__getitem__, pieces))
        starts = list(accumulate(map(len, pieces), initial=0))
        words = []
        for i in compress(range(len(entries)), entries):
            offset = starts[i] + i
            for start, end, singular in entries[i]:
                words.append((offset + start, offset + end, singular))
        return words

    def _words_of_piece(self, piece: str) -> tuple[Word, ...]:
        if piece.isalpha():
            singular = self.forms.get(piece.lower())
            return ((0, len(piece), singular),) if singular is not None else ()
        words = []
        for match in self._pattern.finditer(piece):
            bare = _CLITIC.sub("", match.group())
            word = bare.lstrip("'")
            singular = self.forms.get(word.lower())
            if singular is not None:
                start = match.start() + len(bare) - len(word)
                words.append((start, start + len(word), singular))
        return tuple(words)

    def _compound(self, text: str, words: list[Word], at: int) -> tuple[int, str, int]:
        """The longest term that starts at `at`: where it ends, its name, and what follows it."""
        last = at
        while last + 1 < len(words) and last - at + 1 < self._longest:
            if not self._adjacent(text[words[last][1] : words[last + 1][0]]):
                break
            last += 1
        for end in range(last, at, -1):
            term = self.compounds.get(" ".join(word for _, _, word in words[at : end + 1]))
            if term is not None:
                return words[end][1], term, end + 1
        return words[at][1], words[at][2], at + 1

    def _adjacent(self, between: str) -> bool:
        """Whether text between two words is only a gap: no punctuation, clitic or other word."""
        if self.splits_compounds:
            return "--" not in between and not between.replace("-", "").replace("_", "").strip()
        return not between.strip()


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
