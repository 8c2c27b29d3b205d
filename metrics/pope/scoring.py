"""POPE: balanced yes/no questions about objects that are, or are not, in an image.

What it is: the question builder and the score (Li et al. 2023, arXiv 2305.10355, section 5), plain
functions over rows. What it is not: a model runner; answers come as prediction rows.

    from firsthand.metrics import pope
    questions = pope.build_questions(objects, n_per_image=6, strategy="adversarial", seed=0)
    pope.score(answered)  # the same rows with `prediction`
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import permutations
from typing import Any, Literal

import numpy as np

__all__ = ["PARSERS", "build_questions", "existence_question", "pairs", "parse_strict", "score"]

Row = Mapping[str, Any]
Answer = Literal["yes", "no"]
_ANSWERS: dict[str, Answer] = {"yes": "yes", "no": "no"}


def parse_strict(text: str) -> Answer | None:
    """`yes` or `no` if the text begins with that word, in any case; else None.

    >>> parse_strict("Yes, there is."), parse_strict("Not sure."), parse_strict("There is no dog.")
    ('yes', None, None)
    """
    match = re.match(r"[\W_]*(yes|no)\b", text, re.IGNORECASE)
    return _ANSWERS[match.group(1).lower()] if match else None


def parse_pope(text: str) -> Answer:
    """As POPE's own script reads: `no` if the first sentence has the token No, no or not, else yes.

    It takes "NO" and "I cannot see a dog." for yes; kept to compare with published numbers.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_exact(text: str) -> Answer | None:
    """Only the bare word counts, as in lmms-eval: "Yes." with its full stop is unparsed."""
    return _ANSWERS.get(text.strip().lower())


PARSERS: dict[str, Callable[[str], Answer | None]] = {
    "strict": parse_strict,
    "pope": parse_pope,
    "exact": parse_exact,
}


def score(rows: Iterable[Row], parser: str = "strict") -> dict[str, Any]:
    """Score answered questions; "yes" is the positive class.

    Args:
        rows: `{id, prediction, answer}` rows, `answer` being "yes" or "no" ("Yes." is fine); rows
            that carry an `error` are counted, not scored.
        parser: a key of `PARSERS`: "strict", "pope" or "exact".

    Returns:
        Fractions in 0..1: `pope_accuracy, precision, recall, f1` (higher is better) and
        `pope_yes_ratio` (predicted yes / all; near the share of gold yes, 0.5 if balanced, is
        better). An unparsed prediction is neither yes nor no, hence always wrong; `n_unparsed`
        counts them. Further `n`, `n_errors`, `parser`. A ratio without a denominator is NaN.

    Raises:
        ValueError: unknown parser, duplicate ids, or an `answer` that is neither yes nor no.
        TypeError: a prediction that is no string.
    """
    parsed, n_errors = _parsed(rows, parser)
    columns = _columns(parsed)
    return {
        "pope_accuracy": _ratio(columns["pope_accuracy"]),
        "precision": _ratio(columns["pope_precision"]),
        "recall": _ratio(columns["pope_recall"]),
        "f1": _ratio(columns["pope_f1"]),
        "pope_yes_ratio": _ratio(columns["pope_yes_ratio"]),
        "n_unparsed": sum(said is None for _, said in parsed),
        "n": len(parsed),
        "n_errors": n_errors,
        "parser": parser,
    }


def pairs(rows: Iterable[Row], parser: str = "strict") -> dict[str, np.ndarray]:
    """Per-question (numerator, denominator) columns [n, 2] of every figure, for bootstrap
    intervals.

    Names: pope_accuracy, pope_precision, pope_recall, pope_f1, pope_yes_ratio. Resample images, not
    questions (`groups=[row["image_id"] ...]`). Arguments and errors as in `score`.
    """
    return _columns(_parsed(rows, parser)[0])


Parsed = tuple[Answer, Answer | None]


def _parsed(rows: Iterable[Row], parser: str) -> tuple[list[Parsed], int]:
    """(gold, said) of every scorable row, and the number of failed rows."""
    if parser not in PARSERS:
        raise ValueError(f"Unknown parser {parser!r}; choose one of {', '.join(PARSERS)}.")
    parsed, seen, n_errors = [], set(), 0
    for row in rows:
        if row["id"] in seen:
            raise ValueError(
                f"The id {row['id']!r} occurs twice. Score one model under one condition at a time."
            )
        seen.add(row["id"])
        gold = parse_strict(str(row["answer"]))
        if gold is None:
            raise ValueError(f"Row {row['id']!r}: the answer {row['answer']!r} is no yes or no.")
        if row.get("error"):
            n_errors += 1
        elif not isinstance(row["prediction"], str):
            raise TypeError(
                f"Row {row['id']!r}: the prediction is of type {type(row['prediction']).__name__}, "
                "not str. A prediction that failed belongs in a row with `error`."
            )
        else:
            parsed.append((gold, PARSERS[parser](row["prediction"])))
    return parsed, n_errors


def _columns(parsed: list[Parsed]) -> dict[str, np.ndarray]:
    gold = np.array([gold == "yes" for gold, _ in parsed], dtype=float)
    yes = np.array([said == "yes" for _, said in parsed], dtype=float)
    right = np.array([said == gold for gold, said in parsed], dtype=float)
    hit, one = gold * yes, np.ones(len(parsed))
    figures = {
        "pope_accuracy": (right, one),
        "pope_precision": (hit, yes),
        "pope_recall": (hit, gold),
        "pope_f1": (2 * hit, yes + gold),
        "pope_yes_ratio": (yes, one),
    }
    return {name: np.stack(columns, axis=1) for name, columns in figures.items()}


def _ratio(column: np.ndarray) -> float:
    numerator, denominator = column.sum(axis=0)
    return float(numerator / denominator) if denominator else math.nan


def existence_question(noun: str) -> str:
    """`Is there a dog in the image?`"""
    return f"Is there {'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun} in the image?"


def build_questions(
    objects: Mapping[Any, Iterable[str]],
    n_per_image: int = 6,
    strategy: Literal["random", "popular", "adversarial"] = "random",
    seed: int = 0,
    question: Callable[[str], str] = existence_question,
) -> list[dict[str, Any]]:
    """Balanced existence questions: per image as many about absent objects as about present ones.

    Args:
        objects: image id -> names of the objects it shows; repeated names count once. The
            candidates for absent objects are all names in it.
        n_per_image: questions an image, even; an image with fewer than half of it in objects gets
            twice its number of objects.
        strategy: how absent objects are chosen: `random`; `popular`: in the most images;
            `adversarial`: most often together with the object just asked about.
        seed: an image's questions depend on it and its id, not on the order of images.
        question: noun -> question.

    Returns:
        Rows `{id, image_id, question, answer, object, strategy}`, answers "yes", "no" by turns.

    Raises:
        ValueError: odd or too small n_per_image, unknown strategy, or too few absent objects.
    """
    if strategy not in ("random", "popular", "adversarial"):
        raise ValueError(f"Unknown strategy {strategy!r}; use random, popular or adversarial.")
    if n_per_image < 2 or n_per_image % 2:
        raise ValueError(
            f"n_per_image must be even and at least 2 to be balanced, not {n_per_image}."
        )
    shown = {image_id: sorted(set(names)) for image_id, names in objects.items()}
    counts = Counter(name for names in shown.values() for name in names)
    together = Counter(pair for names in shown.values() for pair in permutations(names, 2))
    rows = []
    for image_id, names in shown.items():
        rng = random.Random(f"{seed}:{image_id}")
        present = rng.sample(names, min(n_per_image // 2, len(names)))
        absent = sorted(set(counts) - set(names))
        if len(absent) < len(present):
            raise ValueError(
                f"Image {image_id!r} needs {len(present)} absent objects but all images together "
                f"show only {len(absent)} others. Give more images or a smaller n_per_image."
            )
        asked = _ask(present, absent, strategy, rng, counts, together)
        for k, (noun, answer) in enumerate(asked):
            rows.append(
                {
                    "id": f"{image_id}-{strategy}-{k}",
                    "image_id": image_id,
                    "question": question(noun),
                    "answer": answer,
                    "object": noun,
                    "strategy": strategy,
                }
            )
    return rows


def _ask(
    present: list[str],
    absent: list[str],
    strategy: str,
    rng: random.Random,
    counts: Counter[str],
    together: Counter[tuple[str, str]],
) -> list[tuple[str, Answer]]:
    """A present and an absent noun by turns; ties go to the more frequent, then by the alphabet."""
    if strategy == "random":
        rng.shuffle(absent)
    else:
        absent.sort(key=lambda candidate: (-counts[candidate], candidate))
    asked: list[tuple[str, Answer]] = []
    for noun in present:
        other = absent[0]
        if strategy == "adversarial":
            other = max(absent, key=lambda candidate: together[noun, candidate])
        absent.remove(other)
        asked.append((noun, "yes"))
        asked.append((other, "no"))
    return asked
