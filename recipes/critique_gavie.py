"""GAVIE in the critic's place: a judge behind an endpoint marks every response (`--scorer gavie`).

What it is: the step of `augment critique` that asks the judge about all responses of a shard at
once; a response's score is the mean of relevance and accuracy, 0 to 10. What it is not: the metric
(`metrics/gavie`), or a judge that sees images: it reads their dense captions.

    firsthand augment critique --data responses --out critiques --scorer gavie \
        --regions region_descriptions.json --endpoint URL --endpoint-model NAME
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from firsthand.metrics import gavie
from firsthand.processing.endpoint import Endpoint
from firsthand.recipes.augment_critique import Judge
from firsthand.recipes.judge import judge_of
from firsthand.recipes.scorers import Score, image_id_of
from firsthand.recipes.stages import DROPPED, Row


class Gavie(Judge):
    """Adds GAVIE's marks as scores; a response whose reply could not be read has none.

    Args:
        url, model: of the judge.
        cache: folder of its replies.
        regions: image id -> dense captions with boxes; ids as in `ChairScorer`.
    """

    def __init__(self, url: str, model: str, cache: str, regions: Mapping[str, list[Row]]) -> None:
        super().__init__()
        self.url, self.model, self.cache, self.regions = url, model, cache, regions

    def batch(self, rows: list[Row]) -> list[Row]:
        rows = [self._with_regions(self.checked(row)) for row in rows]
        asked = [(n, i) for n, row in enumerate(rows) for i in _usable(row)]
        rated = self._rate([self._question(rows[n], n, i) for n, i in asked])
        scores: dict[int, dict[int, Score]] = {n: {} for n in range(len(rows))}
        for (n, i), one in zip(asked, rated, strict=True):
            if "ratings" in one:
                marks = one["ratings"][0]
                scores[n][i] = Score((marks["relevance"] + marks["accuracy"]) / 2)
        return [self._decided(row, scores[n]) for n, row in enumerate(rows)]

    def _with_regions(self, row: Row) -> Row:
        if DROPPED not in row and image_id_of(row, self.regions) is None:
            row[DROPPED] = f"{self.name}: no regions of the image {row['images'][0]['path']!r}"
        return row

    def _question(self, row: Row, number: int, place: int) -> Row:
        return {
            "id": f"{number}/{place}",
            "question": row["question"],
            "prediction": row["responses"][place]["text"],
            "regions": self.regions[image_id_of(row, self.regions)],
        }

    def _rate(self, asked: list[Row]) -> list[Row]:
        """Raises ValueError where the judge answered nothing; the same call goes on later."""
        key = os.environ.get("OPENAI_API_KEY")
        endpoint = Endpoint(self.url, self.model, key, cache_dir=self.cache)
        settings: dict[str, Any] = gavie.SETTINGS
        rated = gavie.rate(asked, [judge_of(endpoint, gavie.parse, **settings)])
        report = endpoint.report()
        if asked and not report.get("answered") and not report.get("cached"):
            raise ValueError(f"{self.url} marked none of {len(asked)} responses: {report}")
        return rated

    def _decided(self, row: Row, scores: dict[int, Score]) -> Row:
        if DROPPED in row:
            return row
        unread = "unparsed" if len(scores) < 2 else "tie"
        return self.scored(row, scores, f"gavie {self.model}", unread)


def _usable(row: Row) -> list[int]:
    if DROPPED in row:
        return []
    return [i for i, one in enumerate(row["responses"]) if one["problem"] is None]


def gavie_step(
    asked: tuple[str, str], cache: str, source: str | None
) -> tuple[Gavie, dict[str, Any]]:
    """The step, and what must be equal for a stopped run to be gone on with.

    Args:
        asked: base URL and name of the judge.
        cache: folder of its replies.
        source: of regions, as `measure gavie` reads them.

    Raises:
        ValueError: without regions, or where the file holds none.
    """
    from firsthand.recipes.measure_gavie import read_regions

    if source is None:
        raise ValueError("--scorer gavie needs --regions FILE: what the images show, in captions")
    about = {"endpoint": asked, "regions": source, "prompt": gavie.PROMPT_HASH}
    return Gavie(*asked, cache, read_regions(source)), about
