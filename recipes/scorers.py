"""What may stand for the critic: a number for each response to a prompt, higher is better.

What it is: CHAIR against ground truth (CHAIR-DPO, arXiv 2508.20181), the visual evidence of the
response's own words, which needs neither judge nor ground truth, and any function of yours. What it
is not: the critic, which compares responses (`augment critique --scorer critic`).

    scorer = load_scorer("my_package.scores:overlap")  # (image, question, responses, ground_truth)
    scorer(row, ["a dog", "a cat"])  # [Score(0.9, None), Score(0.1, None)]
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from firsthand.metrics import chair
from firsthand.processing.key_expressions import noun_phrases
from firsthand.recipes.inputs import stored_image
from firsthand.recipes.stages import Row


class Score(NamedTuple):
    """A response's score, and whether it is free of hallucination (None: not known)."""

    value: float
    clean: bool | None = None


Scorer = Callable[[Row, Sequence[str]], list[Score]]


@dataclass(frozen=True)
class ChairScorer:
    """recall_weight * recall - CHAIR_i of a response; clean where it names nothing that is absent.

    CHAIR-DPO's order has recall_weight 0, which also rewards saying less.

    Args:
        objects: image id -> objects shown. The id of a row is its image's file name without
            folder and ending, or the number that it ends with (COCO).
        lexicon, variant: as in `metrics.chair`.
        recall_weight: at least 0.
    """

    objects: Mapping[Any, Sequence[str]]
    lexicon: Any = chair.COCO
    variant: str = "original"
    recall_weight: float = 0.0

    def __call__(self, row: Row, responses: Sequence[str]) -> list[Score]:
        """Raises ValueError for an image without ground truth."""
        image_id = image_id_of(row, self.objects)
        if image_id is None:
            name = row["images"][0]["path"]
            raise ValueError(f"no ground truth: no objects are listed for the image {name!r}")
        shown = {image_id: list(self.objects[image_id])}
        return [self._score(image_id, shown, text) for text in responses]

    def _score(self, image_id: Any, shown: Mapping[Any, list[str]], text: str) -> Score:
        row = {"id": 0, "image_id": image_id, "prediction": text}
        found = chair.score([row], shown, lexicon=self.lexicon, variant=self.variant)
        absent, recall = (_or_zero(found[name]) for name in ("chair_i", "recall"))
        return Score(self.recall_weight * recall - absent, absent == 0)


def image_id_of(row: Row, known: Mapping[Any, Any]) -> Any:
    """The key that a row's image has in `known`: its file name's stem, or the number it ends with.

    None where there is none.
    """
    stem = re.sub(r"^.*/|\.\w+$", "", str(row["images"][0]["path"] or ""))
    number = re.search(r"\d+$", stem)
    candidates = [stem, *((number[0], int(number[0]), str(int(number[0]))) if number else ())]
    return next((one for one in candidates if one in known), None)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


@dataclass(frozen=True)
class EvidenceScorer:
    """What the model that will be trained sees of a response's object words; no judge, no truth.

    The score is the sum over words of log p + weight * min(support, ceiling) in nats, p being the
    word's probability with the image and support how much the image raises it
    (`processing/support.py`); a response without object words has 0. Clean where no word has less
    support than `threshold`.

    Args:
        model: Hub id or path; None is the demo model.
        weight: of the support.
        ceiling: above it more support adds nothing: a rare word is not better than a common one.
        threshold: in nats.
    """

    model: str | None = None
    weight: float = 0.5
    ceiling: float = 5.0
    threshold: float = 0.0

    def __call__(self, row: Row, responses: Sequence[str]) -> list[Score]:
        return [self._score(row, text) for text in responses]

    def _score(self, row: Row, text: str) -> Score:
        from firsthand.processing.support import word_log_likelihoods
        from firsthand.recipes.answering import opened_model

        image = stored_image(row["images"][0])
        words = [(start, end) for start, end, _ in noun_phrases(text)]
        found = word_log_likelihoods(*opened_model(self.model), image, row["question"], text, words)
        value = sum(a + self.weight * min(a - b, self.ceiling) for a, b in found)
        return Score(value, all(a - b >= self.threshold for a, b in found))


@dataclass(frozen=True)
class FunctionScorer:
    """A function of yours: (image, question, responses, ground_truth) -> a number each.

    Raises ValueError where it gives another number of scores, or one that is not finite.
    """

    name: str

    def __call__(self, row: Row, responses: Sequence[str]) -> list[Score]:
        function = imported(self.name)
        image = stored_image(row["images"][0])
        truth = row.get("ground_truth") or ""
        values = [float(v) for v in function(image, row["question"], list(responses), truth)]
        if len(values) != len(responses) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"bad scores: {self.name} gave {values} for {len(responses)} responses"
            )
        return [Score(value) for value in values]


def imported(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names, also from the working folder.

    Raises:
        ValueError: where there is none.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no scorer {name!r}: {error}; name it package.module:function") from None
