"""Labels of people on expressions and masks: kept on disk, exported, and compared.

What it is: an append-only file that survives a crash, a Parquet export, and the agreement between
annotators. What it is not: the page (`app.py`).

    store = Labels("labels.jsonl"); store.add("s1/0/0", "ann", {"correct": True, ...})
    agreement(store.latest())
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

QUESTIONS = {  # FiVL's three, in its order
    "correct": "Does the mask show the expression?",
    "key": "Does the answer need the image for it?",
    "good": "Is the example good enough for a data set?",
}
Label = dict[str, Any]  # item, annotator, correct, key, good


class Labels:
    """Labels in a JSONL file; of one item and annotator the last counts.

    Raises ValueError naming the first line that is no label.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._lock = Path(path), Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._latest: dict[tuple[str, str], Label] = {}
        for label in self._read():
            self._latest[label["item"], label["annotator"]] = label

    def _read(self) -> list[Label]:
        """The labels on disk; a line that was cut off while it was written is dropped."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        labels = []
        for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                labels.append(_checked(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is no label: {error}") from None
        return labels

    def add(self, item: str, annotator: str, answers: Mapping[str, bool]) -> None:
        """Keep one label, on disk before this returns."""
        label = _checked({"item": item, "annotator": annotator, **answers})
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(label, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._latest[item, annotator] = label

    def of(self, item: str, annotator: str) -> Label | None:
        """What an annotator said about an item, last."""
        return self._latest.get((item, annotator))

    def latest(self) -> list[Label]:
        """One label for each item and annotator."""
        with self._lock:
            return list(self._latest.values())

    def export(self, path: str | Path) -> Path:
        """Write the latest labels as Parquet: item, annotator, correct, key, good."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        kinds = {
            "item": pa.string(),
            "annotator": pa.string(),
            **dict.fromkeys(QUESTIONS, pa.bool_()),
        }
        target = Path(path)
        aside = target.with_name(target.name + ".aside")
        parquet.write_table(pa.Table.from_pylist(self.latest(), pa.schema(kinds)), aside)
        aside.replace(target)
        return target


def _checked(label: Any) -> Label:
    wanted = {"item", "annotator", *QUESTIONS}
    if not isinstance(label, dict) or set(label) != wanted:
        raise ValueError(f"it needs exactly {', '.join(sorted(wanted))}")
    if not all(isinstance(label[name], bool) for name in QUESTIONS):
        raise ValueError(f"{', '.join(QUESTIONS)} must be true or false")
    if not isinstance(label["annotator"], str) or not label["annotator"].strip():
        raise ValueError("the annotator has no name")
    return label


def agreement(labels: Iterable[Label]) -> list[dict[str, Any]]:
    """How far annotators agree, a line for each question and pair, and one for all.

    Returns:
        `{question, annotators, n, agreement, kappa, alpha}`: `agreement` is the share of equal
        answers (0 to 1), `kappa` Cohen's (1960) for a pair, `alpha` Krippendorff's (nominal) for
        all; n counts items that the annotators share, for alpha those with two or more labels.
        None where it is undefined: nothing shared, or only one answer was ever given.
    """
    by_item: dict[str, dict[str, Label]] = {}
    for label in labels:
        by_item.setdefault(label["item"], {})[label["annotator"]] = label
    names = sorted({name for item in by_item.values() for name in item})
    lines = []
    for question in QUESTIONS:
        for one, other in combinations(names, 2):
            shared = [
                (item[one][question], item[other][question])
                for item in by_item.values()
                if one in item and other in item
            ]
            lines.append(_pair_line(question, f"{one}, {other}", shared))
        units = [[label[question] for label in item.values()] for item in by_item.values()]
        lines.append(_all_line(question, [unit for unit in units if len(unit) > 1]))
    return lines


def _pair_line(question: str, names: str, shared: list[tuple[bool, bool]]) -> dict[str, Any]:
    line = {"question": question, "annotators": names, "n": len(shared), "alpha": None}
    if not shared:
        return line | {"agreement": None, "kappa": None}
    equal = sum(a == b for a, b in shared) / len(shared)
    yes = [sum(pair[i] for pair in shared) / len(shared) for i in (0, 1)]
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    kappa = None if chance == 1 else (equal - chance) / (1 - chance)
    return line | {"agreement": equal, "kappa": kappa}


def _all_line(question: str, units: list[list[bool]]) -> dict[str, Any]:
    line = {"question": question, "annotators": "all", "n": len(units), "kappa": None}
    if not units:
        return line | {"agreement": None, "alpha": None}
    pairs = [sum(a == b for a, b in combinations(u, 2)) for u in units]
    possible = [len(u) * (len(u) - 1) / 2 for u in units]
    counts = sum(map(len, units))
    yes = sum(map(sum, units))
    expected = 2 * yes * (counts - yes) / (counts * (counts - 1))
    observed = sum(2 * sum(u) * (len(u) - sum(u)) / (len(u) - 1) for u in units) / counts
    alpha = None if expected == 0 else 1 - observed / expected
    return line | {"agreement": sum(pairs) / sum(possible), "alpha": alpha}
