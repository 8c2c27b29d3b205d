"""Instructions about a chart from its data table alone, positive and misleading.

What it is: values, extremes and comparisons of a table's numbers, and the same with a label that is
not there, an order turned round, or a false figure, which is LRV's knowledge manipulation (arXiv
2306.14565) on charts. What it is not: a reader of charts, or a writer of trends and causes.

    chart_instructions({"table": [{"year": 2001, "sales": 3}, ...], ...}, random.Random(0))
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from firsthand.processing.instructions import Instruction, negative, positive

ABSENT = ("Atlantis", "Freedonia", "Ruritania", "Lilliput", "Narnia", "Utopia")  # no table's labels


def is_number(value: Any) -> bool:
    """Whether a cell is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def columns_of(table: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The column that names the rows (the first with text, else the first), and those of numbers.

    A column of numbers has one in every row.
    """
    numeric = [name for name in table[0] if all(is_number(row[name]) for row in table)]
    named = [name for name in table[0] if name not in numeric]
    label = named[0] if named else next(iter(table[0]))
    return label, [name for name in numeric if name != label]


def chart_instructions(record: Mapping[str, Any], rng: random.Random) -> list[Instruction]:
    """All instructions that templates make of a chart's `table`.

    None without numbers, or where two rows have one label: which of them is meant cannot be said.
    """
    label, measured = columns_of(record["table"])
    rows = {str(row[label]): row for row in record["table"]}
    if len(rows) < len(record["table"]):
        return []
    made = []
    for column in measured:
        values = {name: row[column] for name, row in rows.items()}
        made += _values(column, values, rng) + _extremes(label, column, values)
        made += _orders(column, values) + _absent(column, values, rng)
    return made


def _values(column: str, values: dict[str, Any], rng: random.Random) -> list[Instruction]:
    made = []
    for name, value in values.items():
        said = f"The {column} of {name} is {value}."
        wrong = _other(value, rng)
        false = f"Why is the {column} of {name} {wrong}?"
        made += [
            positive("value retrieval", f"What is the {column} of {name}?", said),
            positive("value retrieval", f"Read the {column} of {name} off the chart.", said),
            negative("knowledge", name, false, f"{said[:-1]}, not {wrong}."),
            negative("knowledge", name, f"Explain how {name} reached a {column} of {wrong}.",
                      f"{said[:-1]}, not {wrong}."),
        ]  # fmt: skip
    return made


def _other(value: Any, rng: random.Random) -> Any:
    """A value that differs by a third to twice as much; of a whole number a whole one."""
    changed = value * rng.choice((0.67, 1.34, 1.5, 2)) or rng.randint(1, 9)
    if isinstance(value, int):
        changed = round(changed)
        return changed if changed != value else value + 1
    return round(changed, 2) if round(changed, 2) != value else value + 1


def _extremes(label: str, column: str, values: dict[str, Any]) -> list[Instruction]:
    made = []
    for word, end in (("highest", max), ("lowest", min)):
        best = end(values.values())
        names = [name for name, value in values.items() if value == best]
        if len(names) == 1:
            asked = f"Which {label} has the {word} {column}?"
            said = f"{names[0]} has the {word} {column}, {best}."
            made.append(positive("extreme value", asked, said))
    return made


def _orders(column: str, values: dict[str, Any]) -> list[Instruction]:
    made = []
    for pair in pairwise(values.items()):
        (low, small), (high, large) = sorted(pair, key=lambda item: item[1])
        if small == large:
            continue
        said = f"{high} has a higher {column}, {large}, than {low} with {small}."
        asked = f"Is the {column} of {high} higher than that of {low}?"
        turned = f"Is the {column} of {low} higher than that of {high}?"
        why = f"Why is the {column} of {low} higher than that of {high}?"
        made += [
            positive("value comparison", asked, f"Yes, {said}"),
            negative("existent object", low, turned, f"No, {said}"),
            negative("existent object", low, why, f"It is not: {said}"),
        ]
    return made


def _absent(column: str, values: dict[str, Any], rng: random.Random) -> list[Instruction]:
    known = {name.lower() for name in values}
    made = []
    for name in rng.sample([name for name in ABSENT if name.lower() not in known], 2):
        no = f"The chart does not show {name}."
        for asked in (f"What is the {column} of {name}?", f"Compare the {column} of {name}."):
            made.append(negative("nonexistent object", name, asked, no))
    return made
