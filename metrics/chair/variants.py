"""The CHAIR variants in use, by name: which words each finds, and how each counts them.

What it is: one lexicon per published variant, and `fixed`, ours. What it is not: a ranking.
Numbers of two variants do not compare; choose the one that the numbers beside yours were made with.

    lexicon_for("sima").mentions("Two umbrellas.")

| variant | as in | how it differs from `original` |
|---|---|---|
| original | Rohrbach et al. 2018, and its port to Python 3 | |
| opera | OPERA (2311.17911), lmms-eval | singulars by part-of-speech tagger and WordNet |
| sima | SIMA (2405.15973) | WordNet nouns; repeats of a hallucinated word count once |
| objhal | Object HalBench, RLHF-V (2312.00849) | WordNet nouns; more terms; repeats count once |
| fixed | | ours: known bugs mended; compares with nothing published |
"""

from collections.abc import Callable, Mapping
from functools import cache

from .coco import CATEGORIES, COCO, COMPOUNDS, NEVER_FOUND, compounds_of
from .lexicon import Lexicon, surface_forms
from .opera import nltk_tools, tagged_words

__all__ = [
    "REFINED",
    "VARIANTS",
    "choose_lexicon",
    "fixed",
    "lexicon_for",
    "opera",
    "wordnet_spellings",
]

REFINED: dict[str, list[str]] = {
    "dining table": ["coffee table"],
    "person": ["brother", "pedestrian"],
    "remote": ["remote control"],
}
"""Terms that Object HalBench adds to `CATEGORIES`."""

_PLURALS = {"s": "ses", "f": "ves", "x": "xes", "z": "zes", "ch": "ches", "sh": "shes"}
_PLURALS |= {"man": "men", "y": "ies"}

_WORDNET_READS: dict[str, str | None] = {
    "brethren": "brother",
    "buffaloes": "buffalo",
    "busses": "bus",
    "children": "child",
    "flamingoes": "flamingo",
    "geese": "goose",
    "grandchildren": "grandchild",
    "knives": "knife",
    "men": None,
    "mice": "mouse",
    "oxen": "ox",
    "oxens": "oxen",
    "pocketknives": "pocketknife",
    "skis": "ski",
    "sports": None,
    "taxies": "taxi",
    "vases": None,
}
"""Spellings whose WordNet noun is not the regular one (None: no word of any term)."""

_SINGULAR_ONLY = frozenset(
    "biker bluejay brindle coworker doggie firetruck glas hairdryer hot iphone knive"
    " lenovo longboard macbook netbook paddleboat pitbull potted riverboat sailboard shortboard"
    " skimboard smartphone solider stovetop teddybear televison vase".split()
)
"""Words that WordNet has under no plural: nouns it does not know stay as they are written."""


def wordnet_spellings(word: str) -> list[str]:
    """What NLTK's WordNet lemmatiser reads as `word`, taking every spelling for a noun.

    `wolf` -> wolf, wolfs, wolves. Made for the words of `CATEGORIES`, `REFINED` and their
    compounds, for which it agrees with WordNet 3.0 on every spelling that WordNet reads so.
    """
    special = [spelling for spelling, read in _WORDNET_READS.items() if read == word]
    if word in _WORDNET_READS:  # "children" is never left as it is
        return special
    if word in _SINGULAR_ONLY:
        return [word]
    endings = [(end, more) for end, more in _PLURALS.items() if word.endswith(end)]
    regular = [word, word + "s", *(word.removesuffix(end) + more for end, more in endings)]
    return [form for form in regular if form not in _WORDNET_READS] + special


def _tables(more: Mapping[str, list[str]], dead: set[str]) -> dict[str, str]:
    """term -> category, without the terms that cannot be found."""
    categories = {c: [*terms, *more.get(c, [])] for c, terms in CATEGORIES.items()}
    return {t: c for c, terms in categories.items() for t in (c, *terms) if t not in dead}


def _words_of(*tables: Mapping[str, str]) -> list[str]:
    return sorted({word for table in tables for term in table for word in term.split()})


def _sima() -> Lexicon:
    terms = _tables({}, NEVER_FOUND)
    compounds = compounds_of(terms)
    forms = {f: w for w in _words_of(terms, compounds) for f in wordnet_spellings(w)}
    beside = {"seat": "toilet"}
    return Lexicon("sima", terms, forms, compounds, beside, False, counting="distinct false")


def _objhal() -> Lexicon:
    """Every term of two words is read as one, "motor bike" among them; the others stay dead."""
    terms = _tables(REFINED, {"iPhone", "stove top oven"})
    compounds = COMPOUNDS | {t: t for t in terms if " " in t} | {"bow tie": "tie"}
    forms = {f: w for w in _words_of(terms, compounds) for f in wordnet_spellings(w)}
    beside = {"seat": "toilet"}
    return Lexicon("objhal", terms, forms, compounds, beside, False, counting="distinct")


def opera(
    tokenize: Callable[[str], list[str]],
    tag: Callable[[list[str]], list[tuple[str, str]]],
    lemmatize: Callable[[str, str], str],
) -> Lexicon:
    """The variant `opera` over a tokenizer, tagger and lemmatiser; arguments as `tagged_words`."""
    terms = _tables({}, NEVER_FOUND)
    compounds = compounds_of(terms)
    words = {word: word for word in _words_of(terms, compounds)}
    reader = tagged_words(tokenize, tag, lemmatize)
    return Lexicon("opera", terms, words, compounds, {"seat": "toilet"}, False, reader=reader)


def fixed() -> Lexicon:
    """CHAIR's own terms, all of which are found, in singular and plural, as one word or two.

    "bus", "ties", "canoes" and "tennis" are read as what they are; "motor bike", "cheesecake",
    "iPhone" and "stove top oven" are found; "teddy-bear" is a teddy bear, and "cup/bottle" two
    objects. A hyphenated word that is no term names nothing ("remote-controlled").
    """
    terms = {term.lower(): category for term, category in _tables({}, set()).items()}
    compounds = COMPOUNDS | {t: t for t in terms if " " in t} | {"bow tie": "tie"}
    del compounds["wine glas"]
    words = _words_of(terms, compounds)
    forms = {word: word for word in words}
    for word in words:
        for form in surface_forms(word):
            forms.setdefault(form, word)
    for term in (term for term in terms if " " in term):
        *first, last = term.split()
        forms |= {"-".join([*first, form]): term for form in surface_forms(last)}
    beside = {"seat": "toilet"}
    return Lexicon("fixed", terms, forms, compounds, beside, False, breaks="/")


_MAKERS: dict[str, Callable[[], Lexicon]] = {
    "original": lambda: COCO,
    "opera": lambda: opera(*nltk_tools()),
    "sima": _sima,
    "objhal": _objhal,
    "fixed": fixed,
}
VARIANTS = tuple(_MAKERS)
"""Names of the variants, the default first."""


@cache
def lexicon_for(variant: str) -> Lexicon:
    """The lexicon of a variant, made once.

    Raises:
        ValueError: no variant has that name.
        ImportError: `opera` without NLTK or without its data; the message says what to install.
    """
    if variant not in _MAKERS:
        raise ValueError(f"{variant!r} is no CHAIR variant. Choose one of {', '.join(VARIANTS)}.")
    return _MAKERS[variant]()


def choose_lexicon(lexicon: Lexicon, variant: str) -> Lexicon:
    """The lexicon of the variant, or the caller's own (one that is not `COCO`).

    Raises:
        ValueError: two different ones are given, or the variant is unknown.
        ImportError: as in `lexicon_for`.
    """
    if lexicon is COCO:
        return lexicon_for(variant)
    if variant not in ("original", lexicon.name):
        raise ValueError(
            f"The variant {variant!r} brings a lexicon, and {lexicon.name!r} was given too. Leave "
            "one of them out: variants are for COCO's objects."
        )
    return lexicon
