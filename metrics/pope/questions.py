"""POPE's questions: built from annotations, or read from published files, and joined with answers.

What it is: the three ways to choose absent objects (Li et al. 2023, arXiv 2305.10355, section 5),
and the file format of RUCAIBox/POPE. What it is not: a source of annotations; objects come as
`{image_id: names}`, say of `chair.objects_from_coco(instances)`.

    objects = sample_images(objects, n=500, seed=0)
    build_questions(objects, n_per_image=6, strategy="adversarial", seed=0)
    rows = join(read_questions("coco_pope_popular.json"), answers)
"""

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import permutations
from os import PathLike
from typing import Any, Literal

__all__ = ["build_questions", "existence_question", "join", "read_questions", "sample_images"]

Row = Mapping[str, Any]
Answer = Literal["yes", "no"]
_FIELDS = ("question_id", "image", "text", "label")


def existence_question(noun: str) -> str:
    """`Is there a dog in the image?`"""
    return f"Is there {'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun} in the image?"


def sample_images(
    objects: Mapping[Any, Iterable[str]], n: int = 500, min_objects: int = 3, seed: int = 0
) -> dict[Any, list[str]]:
    """The images to ask about: n drawn from those that show enough objects, as POPE does.

    Args:
        objects: image id -> names of the objects it shows; repeated names count once.
        n, min_objects: POPE's own values by default; it asks about 3 present objects an image.
        seed: of the draw, which does not depend on the order of images.

    Raises:
        ValueError: fewer than n images show that many objects.
    """
    shown = {image_id: sorted(set(names)) for image_id, names in objects.items()}
    enough = sorted((i for i, names in shown.items() if len(names) >= min_objects), key=str)
    if len(enough) < n:
        raise ValueError(
            f"Only {len(enough)} of {len(shown)} images show {min_objects} objects or more, and "
            f"{n} were asked for. Give more images, or a smaller n or min_objects."
        )
    return {image_id: shown[image_id] for image_id in random.Random(seed).sample(enough, n)}


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
            `adversarial`: most often together with the object just asked about, and where none that
            is left stands beside it anywhere, at random. No object is asked about twice.
        seed: an image's questions depend on it and its id, not on the order of images. It draws the
            present objects, too; POPE's own script takes the first ones of its annotations.
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
            if not together[noun, other]:
                other = rng.choice(absent)
        absent.remove(other)
        asked.append((noun, "yes"))
        asked.append((other, "no"))
    return asked


def read_questions(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The questions of a published file (COCO, A-OKVQA or GQA), in its order.

    Args:
        path: a file of `{question_id, image, text, label}`, an object a line (COCO's) or one JSON
            list (A-OKVQA's and GQA's); `.gz` is read as it is.

    Returns:
        Rows `{id, image_id, image, question, answer}`: `image` and `image_id` are the image's file
        name, `answer` "yes" or "no".

    Raises:
        ValueError: a file that is something else, or a question id that occurs twice.
    """
    rows, seen = [], set()
    for number, entry in enumerate(_entries(path), 1):
        if not isinstance(entry, Mapping) or not set(_FIELDS) <= set(entry):
            found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(
                f"{path}, question {number}: POPE's questions have {', '.join(_FIELDS)}; this one "
                f"has {found}."
            )
        label = str(entry["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, question {number}: the label {label!r} is no yes or no.")
        if entry["question_id"] in seen:
            raise ValueError(f"{path}: the question id {entry['question_id']!r} occurs twice.")
        seen.add(entry["question_id"])
        image = entry["image"]
        ids = {"id": entry["question_id"], "image_id": image, "image": image}
        rows.append(ids | {"question": entry["text"], "answer": label})
    return rows


def _entries(path: str | PathLike[str]) -> list[Any]:
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON list: {error}") from error
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return entries


def join(
    questions: Iterable[Row],
    answers: Iterable[Row],
    by: Literal["id", "order"] = "id",
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """Questions with their answers, ready to be scored.

    Args:
        questions: rows `{id, image_id, question, answer}` of `build_questions`, `read_questions`.
        answers: by "id": prediction rows `{id, prediction}`; an id may be a number here and its
            digits there. By "order": rows with `prediction`, one for each question, whatever their
            ids; nothing can then show that an answer belongs to its question.
        by: how they belong together.
        skip_bad: with "id", a question without an answer becomes a row with `error`, which
            `score` counts; an answer without a question is a row without `answer`, which
            `score(rows, skip_bad=True)` counts and names.

    Raises:
        ValueError: ids that only one side has, an id that occurs twice, or, by order, other numbers
            of answers than of questions. The first ids are named.
    """
    questions, answers = list(questions), list(answers)
    if by == "order":
        if len(questions) != len(answers):
            raise ValueError(f"{len(answers)} answers to {len(questions)} questions by order.")
        pairs = zip(questions, answers, strict=True)
        return [{**asked, **_answer(said)} for asked, said in pairs]
    if by != "id":
        raise ValueError(f"Answers are joined by id or by order, not by {by!r}.")
    said_of = {str(row["id"]): row for row in answers}
    asked_ids = [str(row["id"]) for row in questions]
    _refuse("ids occur twice among the answers", _twice(str(row["id"]) for row in answers))
    _refuse("ids occur twice among the questions", _twice(asked_ids))
    if not skip_bad:
        known = set(asked_ids)
        _refuse("questions have no answer", [i for i in asked_ids if i not in said_of])
        _refuse("answers belong to no question", [i for i in said_of if i not in known])
    joined = [
        {**asked, **_answer(said_of.pop(i, {"error": "no answer"}))}
        for i, asked in zip(asked_ids, questions, strict=True)
    ]
    return joined + [{"id": row["id"], "answer": None, **_answer(row)} for row in said_of.values()]


def _answer(said: Row) -> dict[str, Any]:
    return {k: said[k] for k in ("prediction", "error", "condition") if k in said}


def _twice(ids: Iterable[str]) -> list[str]:
    return [i for i, times in Counter(ids).items() if times > 1]


def _refuse(what: str, ids: list[str]) -> None:
    if ids:
        raise ValueError(
            f"{len(ids)} {what}, e.g. {', '.join(ids[:3])}. Questions and answers must be of one "
            "file and one model."
        )
