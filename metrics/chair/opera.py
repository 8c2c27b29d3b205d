"""Words as the variant `opera` reads them: NLTK's tokens, part-of-speech tags and WordNet lemmas.

What it is: the reading of a caption in OPERA's script (Huang et al. 2024, arXiv 2311.17911), which
lmms-eval uses too, with the character span of each token. What it is not: NLTK or its data. Both
come with `pip install 'firsthand[chair-opera]'` and `python -m nltk.downloader punkt_tab
averaged_perceptron_tagger_eng wordnet`; nothing here is imported before it is needed.

    words = tagged_words(*nltk_tools())
    words("Two umbrellas.")       # [(0, 3, "two"), (4, 13, "umbrella"), (13, 14, ".")]
"""

from collections.abc import Callable
from functools import lru_cache

from .lexicon import Word

__all__ = ["nltk_tools", "tagged_words"]

Tokenize = Callable[[str], list[str]]
Tag = Callable[[list[str]], list[tuple[str, str]]]
Lemmatize = Callable[[str, str], str]

_WORDNET_POS = {"J": "a", "V": "v", "N": "n", "R": "r"}
_DATA = {
    "punkt_tab": "tokenizers",
    "averaged_perceptron_tagger_eng": "taggers",
    "wordnet": "corpora",
}


def tagged_words(tokenize: Tokenize, tag: Tag, lemmatize: Lemmatize) -> Callable[[str], list[Word]]:
    """A function from a text to its (start, end, lemma), one per token, in order.

    Args:
        tokenize: lower-case text -> tokens, pieces of the text in order (others are skipped).
        tag: tokens -> (token, Penn Treebank tag) of each.
        lemmatize: (token, "a" | "v" | "n" | "r") -> lemma; tags of no such class count as nouns.
    """
    lemma = lru_cache(maxsize=200_000)(lemmatize)

    def words(text: str) -> list[Word]:
        lower = _lower(text)
        tokens = tokenize(lower)
        found, at = [], 0
        for token, kind in tag(tokens):
            start = lower.find(token, at)
            if start >= 0:
                at = start + len(token)
                found.append((start, at, lemma(token, _WORDNET_POS.get(kind[:1], "n"))))
        return found

    return words


def _lower(text: str) -> str:
    """Lower case with every character in its place."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)


def nltk_tools() -> tuple[Tokenize, Tag, Lemmatize]:
    """NLTK's tokenizer, tagger and WordNet lemmatiser; loads them (some seconds).

    Raises:
        ImportError: NLTK or some of its data are not installed; the message names what is missing,
            the extra, and where data is placed.
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer
    except ImportError as error:
        raise ImportError(
            "The CHAIR variant 'opera' needs NLTK, which is not installed. Run: pip install "
            f"'firsthand[chair-opera]', then: {_DOWNLOAD}. The other variants need neither."
        ) from error
    lemmatizer = WordNetLemmatizer()
    probes: dict[str, Callable[[], object]] = {
        "punkt_tab": lambda: nltk.word_tokenize("a dog."),
        "averaged_perceptron_tagger_eng": lambda: nltk.pos_tag(["a", "dog"]),
        "wordnet": lambda: lemmatizer.lemmatize("dogs"),
    }
    _require_data(probes)
    return nltk.word_tokenize, nltk.pos_tag, lemmatizer.lemmatize


_DOWNLOAD = f"python -m nltk.downloader {' '.join(_DATA)}"


def _require_data(probes: dict[str, Callable[[], object]]) -> None:
    missing = []
    for name, probe in probes.items():
        try:
            probe()
        except LookupError:
            missing.append(name)
    if missing:
        places = ", ".join(f"{_DATA[name]}/{name}/" for name in missing)
        raise ImportError(
            f"The CHAIR variant 'opera' needs NLTK data that is not installed: "
            f"{', '.join(missing)}. Run: {_DOWNLOAD}; or, without a network, copy the folders "
            f"{places} into a folder that the environment variable NLTK_DATA names. The other "
            "variants need no data."
        )
