"""What do misleading instructions in the training data change? Trained arms on scenes, intervals.

What it is: the demo model and adapters of it that were trained with different shares of negative
instructions (several seeds each), asked the same questions about the same scenes: is an object
there, a question that takes an object for granted, a caption. What it is not: a training recipe;
the adapters come from `train_instruction`.

    python recipes/evaluate_instruction.py --arm neg0=neg0a,neg0b,neg0c --arm neg25=neg25a \
        --arm neg50=neg50a,neg50b,neg50c --compare neg50-neg0 --compare neg25-neg0 --split test \
        --split test_unseen --out docs/results/lrv_training.csv

Options as in `recipes/study.py`.
"""

from __future__ import annotations

from typing import Any

from firsthand.metrics import gavie, pope
from firsthand.metrics.gavie import rules
from firsthand.processing.generation import generate_answers
from firsthand.recipes import demo_rows, study
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS
from firsthand.recipes.measure_gavie import SCENE_WORDS, scene_objects
from firsthand.recipes.study import Measured, measured

DRAWN = ("denied_absent", "denied_existing", "accuracy_absent", "accuracy_existing")
PRESUMING = ("Where is the {}?", "What color is the {}?")  # as the demo model was asked, too

Row = dict[str, Any]


def presuming_rows(polled: list[Row]) -> list[Row]:
    """For each existence question one that takes the same object for granted, wordings by turns.

    `answer` says whether the object is there, so whether it may be taken for granted.
    """
    return [
        {
            **{name: row[name] for name in ("image_id", "image", "object", "answer")},
            "id": f"{row['id']}-presumed",
            "question": PRESUMING[number // 2 % 2].format(row["object"]),
            "presumed": True,
        }
        for number, row in enumerate(polled)
    ]


def questions_of(rows: list[Row], seed: int) -> list[Row]:
    """What is asked about some scenes: a caption, objects' existence, and objects presumed."""
    polled = demo_rows.existence_rows(rows, seed)
    return demo_rows.caption_rows(rows) + polled + presuming_rows(polled)


def denies(text: str) -> bool:
    """Whether an answer says no or not: "There is no zebra in the image."."""
    return pope.PARSERS["opera"](text) == "no"


def measure(said: list[Row], rows: list[Row]) -> Measured:
    """All figures of the answers about some scenes.

    `accuracy_existing` and `accuracy_absent` are of yes-or-no questions about objects that are
    there and that are not; `denied_absent` and `denied_existing` the shares of questions that take
    such an object for granted whose answer says no or not: high is right in the first, low in the
    second. `gavie_rule_...` are marks of all answers, captions too, where they claim something that
    the scene decides.
    """
    found = study.caption_measures(said, rows) | study.pope_measures(said)
    found |= rule_marks(said, rows)
    polled = [row for row in said if row.get("strategy")]
    for what, answer in (("existing", "yes"), ("absent", "no")):
        asked = [row for row in polled if row["answer"] == answer]
        found[f"accuracy_{what}"] = measured(pope.pairs(asked)["pope_accuracy"], asked)
        presumed = [row for row in said if row.get("presumed") and row["answer"] == answer]
        columns = [(denies(row["prediction"]), 1) for row in presumed]
        found[f"denied_{what}"] = measured(columns, presumed)
    return found


def rule_marks(said: list[Row], rows: list[Row]) -> Measured:
    """GAVIE's relevance and accuracy, 0 to 10, by rule from the scenes' annotations."""
    rated = rules.rate(said, scene_objects(rows), SCENE_WORDS)
    image_of = {row["id"]: row for row in rated}
    ids = gavie.pair_ids(rated)
    return {
        name: measured(columns, [image_of[one] for one in ids[name]])
        for name, columns in gavie.pairs(rated).items()
    }


def answered(model: Any, processor: Any, rows: list[Row], seed: int) -> Measured:
    """What one model answers about some scenes, measured."""
    asked = questions_of(rows, seed)
    return measure(list(generate_answers(model, processor, asked, MAX_NEW_TOKENS, 32)), rows)


if __name__ == "__main__":
    study.run(study.parse(None, "Measure arms that were trained on instructions."), answered, DRAWN)
