"""`firsthand measure compare`: is one file of predictions better than another, or is it noise?

What it is: a metric of two files over the same ids, and their paired difference with its 95 %
bootstrap interval: both are resampled together, whole images at a time. What it is not: a
comparison of printed scores, whose intervals ignore that the questions are shared.

    firsthand measure compare a.jsonl b.jsonl --metric chair --objects objects.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from firsthand.metrics import results
from firsthand.recipes.measure import (
    Measured,
    Row,
    protocol_of,
    read_predictions,
    scorer_of,
)

SAME = ("image_id", "answer", "answers")  # what a question's truth hangs on


def run(args: argparse.Namespace) -> int:
    """Print both arms, the differences and what they show; write result rows where asked."""
    paths = (args.a, args.b)
    arms = _arms(paths, args.arms)
    a, b = (read_predictions(args, args.compared, path) for path in paths)
    a, b = shared_rows(paths, a, b, args.common)
    _require_same_questions(paths, a, b)
    scorer = scorer_of(args, args.compared)
    found = [scorer(path, rows) for path, rows in zip(paths, (a, b), strict=True)]
    _require_comparable(paths, *found)
    made = differences(args, arms, a, found[0], found[1])
    n_images = len({found[0].image_of[i] for ids in found[0].ids.values() for i in ids})
    print(results.table(made) + f"\n\nimages resampled: {n_images}")
    for row in made[2::3]:
        print(verdict(row, n_images))
    if args.out:
        results.write_results(args.out, made)
    return 0


def shared_rows(
    paths: tuple[str, str], a: list[Row], b: list[Row], common: bool
) -> tuple[list[Row], list[Row]]:
    """Both files' rows over the ids that both have.

    Raises ValueError naming the first ids that only one has, unless `common`, which counts them.
    """
    ids = [dict.fromkeys(row.get("id") for row in rows) for rows in (a, b)]
    alone = [[i for i in mine if i not in other] for mine, other in (ids, ids[::-1])]
    if not any(alone):
        return a, b
    told = "; ".join(
        f"{path} has {len(only)} that the other lacks ({', '.join(map(repr, only[:3]))})"
        for path, only in zip(paths, alone, strict=True)
        if only
    )
    both = len(ids[0]) - len(alone[0])
    if not both:
        raise ValueError(f"the files share no id: {told}. Compare answers to the same questions")
    if not common:
        raise ValueError(
            f"the files have different ids: {told}. Give both the same questions, or compare the "
            f"{both} shared ones with --common"
        )
    print(f"compared: the {both} shared ids; left out: {told}\n")
    return [r for r in a if r.get("id") in ids[1]], [r for r in b if r.get("id") in ids[0]]


def _require_same_questions(paths: tuple[str, str], a: list[Row], b: list[Row]) -> None:
    """Raise ValueError where one id stands for two images or has two right answers."""
    of = {(row.get("id"), str(row.get("condition"))): row for row in a}
    for row in b:
        other = of.get((row.get("id"), str(row.get("condition"))), row)
        for field in SAME:
            if str(row.get(field)) != str(other.get(field)):
                raise ValueError(
                    f"the id {row['id']!r} is not the same question in both: its {field} is "
                    f"{other.get(field)!r} in {paths[0]} and {row.get(field)!r} in {paths[1]}"
                )


def _require_comparable(paths: tuple[str, str], a: Measured, b: Measured) -> None:
    """Raise ValueError where the files' figures are in different units."""
    units = [found.scores.get("length_unit") for found in (a, b)]
    if units[0] != units[1]:
        raise ValueError(
            f"lengths are in {units[0]} in {paths[0]} and in {units[1]} in {paths[1]}: give "
            "`n_tokens` in every row of both, or in none"
        )


def _arms(paths: tuple[str, str], names: list[str] | None) -> tuple[str, str]:
    """What the two files are called: as asked, or by their names, or by their paths."""
    if names:
        if names[0] == names[1]:
            raise ValueError(f"--arms {names[0]} {names[1]}: give the two different names")
        return names[0], names[1]
    if paths[0] == paths[1]:
        return f"{paths[0]} (a)", f"{paths[1]} (b)"
    short = [Path(path).name.removesuffix(".gz").removesuffix(".jsonl") for path in paths]
    return (short[0], short[1]) if short[0] != short[1] else paths


def differences(
    args: argparse.Namespace, arms: tuple[str, str], rows: list[Row], a: Measured, b: Measured
) -> list[Row]:
    """Per figure three result rows: the first arm, the second, and first minus second.

    All three are over the ids that count in both files: an answer that failed in one is left out of
    both. `rows` are the first file's.
    """
    made: list[Row] = []
    in_b = {name: {i: k for k, i in enumerate(ids)} for name, ids in b.ids.items()}
    both = {name: [i for i in a.ids[name] if i in in_b[name]] for name in a.ids if name in in_b}
    about = {"split": args.split, "protocol": protocol_of(rows, a._replace(ids=both))}
    for name, ids in both.items():
        in_a = {i: k for k, i in enumerate(a.ids[name])}
        groups = [a.image_of[i] for i in ids]
        x = a.pairs[name][[in_a[i] for i in ids]]
        y = b.pairs[name][[in_b[name][i] for i in ids]]
        intervals = {
            arms[0]: results.bootstrap(x, results.ratio, groups=groups),
            arms[1]: results.bootstrap(y, results.ratio, groups=groups),
            " - ".join(arms): results.paired_difference(x, y, results.ratio, groups=groups),
        }
        made += [
            results.result_row(name, interval, len(ids), arm=arm, **about)
            for arm, interval in intervals.items()
        ]
    return made


def verdict(row: Row, n_images: int) -> str:
    """What a difference shows: whether its interval excludes 0."""
    name, value, low, high = (row[key] for key in ("metric", "value", "low", "high"))
    if math.isnan(value):
        return f"{name}: undefined in one of the files (n={row['n']}), so nothing is compared"
    shown = f"{name}: {row['arm']} = {value:+.4f} [{low:+.4f}, {high:+.4f}] (n={row['n']})"
    if n_images < 2:
        return f"{shown}: one image says nothing about others"
    if value == low == high == 0:
        return f"{shown}: the difference is exactly 0"
    if low <= 0 <= high:
        return f"{shown}: the interval includes 0, so no difference is shown"
    return f"{shown}: the interval excludes 0, so they differ"
