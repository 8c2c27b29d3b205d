"""Key expressions: the phrases of an answer that need the image (FiVL, arXiv 2412.14672).

What it is: two ways to find them, a rule for English noun phrases that runs offline and a question
to a vision-language model behind an endpoint; and one way to place them, as characters of the
answer, that says why where it cannot. What it is not: a part-of-speech tagger (the rule knows the
closed classes of words and common exceptions, and takes the rest for nouns), or a segmenter.

    found, rejected = by_rule("What is on the table?", "A red cup and two old books.")
    replies = endpoint.ask_many([request(question, answer, image)], parse=parse_reply)
    found, rejected = place(answer, replies[0].value)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from PIL import Image

from firsthand.processing import english
from firsthand.processing.messages import json_object, message, render

Expression = dict[str, Any]  # text, phrase, char_start, char_end, nouns
Rejected = dict[str, str]  # text, reason
Span = tuple[int, int, str]  # first character, last + 1, head noun
TOKEN = re.compile(r"\d[\d.,]*\d|\d|[^\W\d_]+(?:[-'’][^\W\d_]+)*|\S")
WORD = "word"


def noun_phrases(text: str) -> list[Span]:
    """Noun phrases of English text that something in a photograph can be, in order.

    A phrase leaves its determiner and numeral out and ends with its head noun: `an old wooden
    table` gives `old wooden table` and the noun `table`. `group of people` stays together; its head
    is `people`. Words that no region shows (`image`, `left`, `atmosphere`) are no phrases.

    Returns:
        (first character, last character + 1, head noun in lower case) for each.
    """
    chunker = _Chunker(text)
    for at in range(len(chunker.words)):
        chunker.take(at)
    chunker.close()
    return chunker.spans


def head_noun(phrase: str) -> str | None:
    """The last noun of a phrase, in lower case: the head of an English compound."""
    spans = noun_phrases(phrase)
    return spans[-1][2] if spans else None


def compound_noun(phrase: str) -> str | None:
    """The head noun with the nouns right before it: `traffic light` of `the red traffic light`."""
    head = head_noun(phrase)
    words = [m.group().lower() for m in TOKEN.finditer(phrase)]
    if head is None or head not in words:
        return head
    end = len(words) - words[::-1].index(head)
    start = end - 1
    while start and _kind(words[start - 1]) == WORD:
        start -= 1
    return " ".join(words[start:end])


class _Chunker:
    """Grows one phrase at a time over words; `close` keeps it if it names something visible."""

    def __init__(self, text: str) -> None:
        self.matches = list(TOKEN.finditer(text))
        self.words = [m.group().lower().replace("’", "'") for m in self.matches]
        self.kinds = [_kind(w) for w in self.words]
        self.spans: list[Span] = []
        self.chunk: list[int] = []  # of words
        self.nouns: list[int] = []  # those of the chunk that can be its head
        self.opened = False  # a determiner came before

    def take(self, at: int) -> None:
        kind = self.kinds[at]
        if kind == "determiner":
            if not self._joined():
                self.close()
            # trees *that* grow: no determiner
            self.opened = self.words[at] != "that" or self._next(at) in (WORD, "adjective")
        elif kind == "adverb in ly" and self.opened and not self.nouns:
            pass  # a brightly colored bird
        elif kind == "adjective" and not self._names(at):
            if self.nouns and not self._joined():
                self.close()
            self.chunk.append(at)
        elif self._goes_on(at):
            pass
        elif self._is_verb(at):
            self.close()
        elif kind in (WORD, "participle", "verb", "adjective"):
            self.chunk.append(at)
            self.nouns += [] if kind == "participle" else [at]
        else:
            self.close()

    def close(self) -> None:
        """End the phrase before this word."""
        heads = [noun for noun in self.nouns if self._shows(noun)]
        if heads:  # a beach scene shows a beach
            head, word = self._bare(heads[-1]), self.words[heads[-1]]
            end = self.matches[heads[-1]].end() - (len(word) - len(head))
            self.spans.append((self.matches[self.chunk[0]].start(), end, head))
        self.chunk, self.nouns, self.opened = [], [], False

    def _shows(self, at: int) -> bool:
        """Whether a region can show a noun: no *place*, but a parking *place*."""
        compound = at > 0 and self.words[at - 1] in english.ING_MODIFIERS
        return compound or _visible(self._bare(at))

    def _bare(self, at: int) -> str:
        return self.words[at].removesuffix("'s")

    def _joined(self) -> bool:
        """Whether the chunk ends with "group of", so that its head is still to come."""
        return bool(self.chunk) and self.words[self.chunk[-1]] == "of"

    def _next(self, at: int) -> str:
        return self.kinds[at + 1] if at + 1 < len(self.kinds) else "end"

    def _next_word(self, at: int) -> str:
        return self.words[at + 1] if at + 1 < len(self.words) else ""

    def _goes_on(self, at: int) -> bool:
        """Words between the parts of one phrase: black *and* white cat, a group *of* people."""
        word = self.words[at]
        if word in ("and", ",") and self.chunk and not self.nouns:
            return self._next(at) == "adjective"
        if word == "of" and self.nouns:
            quantity = self.words[self.nouns[-1]] in english.QUANTITIES
            if quantity and self._next(at) in (WORD, "adjective", "participle", "determiner"):
                self.chunk.append(at)
                self.nouns = []
                return True
        return False

    def _names(self, at: int) -> bool:
        """Whether a word that can be an adjective is a noun here: a traffic *light*."""
        after = self._next_word(at)
        ends = self._next(at) not in (WORD, "adjective") and after != "and"
        ends, within = ends or after in english.POSITIONS, self.opened or bool(self.chunk)
        return self.words[at] in english.ADJECTIVES_OR_NOUNS and within and ends

    def _is_verb(self, at: int) -> bool:
        """Whether a word that can be a verb is one here."""
        word, kind, after = self.words[at], self.kinds[at], self._next(at)
        if kind == WORD:  # to *meet* the others
            return at > 0 and self.words[at - 1] == "to" and after in ("determiner", "pronoun")
        if kind not in ("participle", "verb"):
            return False
        if self.nouns:
            return not (word in english.ING_MODIFIERS and after == WORD)
        if self.opened or self.chunk:
            return False  # after a determiner or adjective: the smiling woman, a drink
        if word in english.ING_MODIFIERS and after == WORD:
            return False
        before = self.kinds[at - 1] if at else "start"
        if kind == "verb":  # on skis, wearing ties
            named = before in ("preposition", "participle") and self.words[at - 1] != "to"
            return not named
        stays = before in ("preposition", "start") and after == WORD
        return not (word.endswith("ed") and stays)  # with stuffed animals


@lru_cache(maxsize=1 << 16)
def _kind(word: str) -> str:
    """The class of a word out of context."""
    if word in english.DETERMINERS or word[0].isdigit() or word.endswith("'s"):
        possessive = word.endswith("'s") and word not in english.PRONOUNS
        return WORD if possessive else "determiner" if word not in english.PRONOUNS else "pronoun"
    for kind, words in (
        ("pronoun", english.PRONOUNS | english.AUXILIARIES),
        ("preposition", english.PREPOSITIONS),
        ("conjunction", english.CONJUNCTIONS),
        ("adverb", english.ADVERBS),
        ("adjective", english.ADJECTIVES),
    ):
        if word in words:
            return kind
    if not word[0].isalpha():
        return "mark"
    if word.startswith("well-"):
        return "adjective"
    if word.endswith("ly") and word not in english.NOUNS_IN_LY:
        return "adverb in ly"
    if word.endswith("ing") and word not in english.NOUNS_IN_ING and len(word) > 4:
        return "participle"
    if word.endswith("ed") and word not in english.NOUNS_IN_ED and len(word) > 3:
        return "participle"
    if word in english.VERBS:
        return "verb"
    return "adjective" if _ends_like_an_adjective(word) else WORD


def _ends_like_an_adjective(word: str) -> bool:
    endings = ("al", "ic", "ive", "ous", "ful", "less", "able", "ible", "ish")
    regular = len(word) > 4 and word.endswith(endings)
    return regular and word not in english.NOUNS_LIKE_ADJECTIVES


def _visible(head: str) -> bool:
    """Whether a head noun can name a region of an image."""
    if head in english.UNSEEN or len(head) < 2:
        return False
    singular = head.removesuffix("s") if not head.endswith("ss") else head
    abstract = singular.endswith(english.ABSTRACT_ENDINGS)
    return not abstract or singular in english.SEEN_DESPITE_ENDING


def by_rule(question: str, answer: str) -> tuple[list[Expression], list[Rejected]]:
    """Expressions of an answer without any model: its noun phrases, each where it first stands.

    A one-word answer that names nothing itself ("Yes", "two", "red") is grounded in the noun
    phrases of its question; "No" in nothing, as what it denies cannot be seen.
    """
    distinct: dict[str, Span] = {}
    for span in noun_phrases(answer):
        distinct.setdefault(answer[span[0] : span[1]].lower(), span)
    if distinct:
        spans = distinct.values()
        return [_expression(answer, start, end, answer[start:end]) for start, end, _ in spans], []
    if not _one_word(answer) or answer.strip(" .,!").lower() in ("no", "none"):
        return [], []
    asked = [question[start:end] for start, end, _ in noun_phrases(question)]
    return place(answer, dict.fromkeys(asked))


def place(
    answer: str, phrases: Iterable[str], whole_words: bool = True
) -> tuple[list[Expression], list[Rejected]]:
    """Expressions as characters of the answer, and those that are not in it, with the reason.

    A phrase stands where it first occurs, or next occurs where it is given again. Case counts only
    where both ways occur. Where the answer is one word, a phrase that is not in it is what to look
    for and the word is its label, as in FiVL's pipeline.

    Args:
        answer: what the expressions are of.
        phrases: as found or as a model named them.
        whole_words: whether `cat` may not stand in `category`.

    Returns:
        `{text, phrase, char_start, char_end, nouns}` each, `nouns` with the head noun of the text
        (none where it has none); and `{text, reason}` each.
    """
    found: list[Expression] = []
    rejected: list[Rejected] = []
    taken: set[tuple[int, int]] = set()
    for phrase in (p.strip() for p in phrases):
        span, reason = _span_of(answer, phrase, taken, whole_words)
        if span is None:
            rejected.append({"text": phrase, "reason": reason})
            continue
        start, end = span
        if answer[start:end].lower() == phrase.lower():
            taken.add(span)
        found.append(_expression(answer, start, end, phrase))
    return found, rejected


def _expression(answer: str, start: int, end: int, phrase: str) -> Expression:
    text = answer[start:end]
    noun = head_noun(text)
    looked_for = text if text.lower() == phrase.lower() else phrase
    nouns = [noun] if noun else []
    return {
        "text": text,
        "phrase": looked_for,
        "char_start": start,
        "char_end": end,
        "nouns": nouns,
    }


def _span_of(
    answer: str, phrase: str, taken: set[tuple[int, int]], whole_words: bool
) -> tuple[tuple[int, int] | None, str]:
    """Where a phrase stands, or None and why it stands nowhere."""
    if not phrase:
        return None, "empty"
    if phrase.strip(" .").lower() in english.REFUSALS:
        return None, "a refusal: not an expression"
    pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)" if whole_words else re.escape(phrase)
    spans = [m.span() for m in re.finditer(pattern, answer)]
    spans = spans or [m.span() for m in re.finditer(pattern, answer, re.IGNORECASE)]
    free = [span for span in spans if span not in taken]
    if free:
        return free[0], ""
    if spans:
        return None, "named twice: it stands in the answer once"
    if _one_word(answer):
        word = answer.strip(" \t\n.,;:!?\"'")
        if word:
            start = answer.index(word)
            return (start, start + len(word)), ""
    return None, "not in the answer"


def _one_word(answer: str) -> bool:
    return len(answer.split()) == 1


def prompt(question: str, answer: str) -> str:
    """What a model is asked: `prompts/key_expressions.jinja` for one question and answer."""
    return render("key_expressions", question=question, answer=answer)


def request(question: str, answer: str, image: Image.Image) -> list[dict[str, Any]]:
    """Chat messages for `Endpoint.ask_many`: the prompt and the image."""
    return message(prompt(question, answer), image)


def parse_reply(text: str) -> list[str]:
    """The expressions of a reply.

    Raises:
        ValueError: for anything but one JSON object (a code fence around it is allowed) whose only
            key is `key_expressions`, a list of strings.
    """
    phrases = json_object(text, {"key_expressions": list})["key_expressions"]
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        raise ValueError("key_expressions is not a list of strings")
    return phrases
