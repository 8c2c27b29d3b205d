"""Result rows of the demo's answers: CHAIR, positions, POPE and visual reliance, with intervals.

rows = caption_results("plain", "test", answers, scenes_, protocol)
"""

from __future__ import annotations

from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.metrics import chair, pope, results, visual_reliance
from firsthand.recipes.demo_rows import objects_of

Row = dict[str, Any]
LEXICON = chair.lexicon_from_nouns(scenes.NOUNS, name="scenes")
KEPT = ("pope_accuracy", "pope_yes_ratio")


def captions(answers: list[Row]) -> list[Row]:
    """The captions among the answers."""
    return [a for a in answers if a["question"] == scenes.CAPTION_QUESTION]


def caption_scores(answers: list[Row], rows: list[Row]) -> dict[str, float]:
    """CHAIR's figures without intervals, for choosing on validation."""
    return chair.score(captions(answers), objects_of(rows), LEXICON)


def caption_results(
    arm: str, split: str, answers: list[Row], rows: list[Row], protocol: dict[str, Any]
) -> list[Row]:
    """chair_s, chair_i, recall, mean_length and position_accuracy; n is captions."""
    said = captions(answers)
    placed = {r["id"]: r["objects"] for r in rows}
    pairs = dict(chair.pairs(said, objects_of(rows), LEXICON))
    pairs["position_accuracy"] = chair.position_pairs(said, placed, LEXICON)
    return results.result_rows(pairs, arm=arm, split=split, protocol=protocol)


def pope_results(arm: str, split: str, answers: list[Row], protocol: dict[str, Any]) -> list[Row]:
    """pope_accuracy and pope_yes_ratio; n is questions, images are resampled."""
    said = [a for a in answers if a.get("strategy")]
    pairs = {name: columns for name, columns in pope.pairs(said).items() if name in KEPT}
    groups = [a["image_id"] for a in said]
    return results.result_rows(pairs, arm=arm, split=split, protocol=protocol, groups=groups)


def reliance_results(
    arm: str, split: str, answers: list[Row], protocol: dict[str, Any]
) -> list[Row]:
    """visual_reliance; n is questions about a present object, each under four conditions."""
    pairs = {"visual_reliance": visual_reliance.pairs(answers)["visual_reliance"]}
    return results.result_rows(pairs, arm=arm, split=split, protocol=protocol)


def hallucinated(answer: Row, row: Row) -> int:
    """How many mentions of one caption the scene does not show."""
    return chair.score([answer], objects_of([row]), LEXICON)["n_hallucinated"]
