"""Training logs as CSV and as one picture.

python recipes/training_curve.py adapter1/log.json adapter2/log.json --out training
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "validation_token_accuracy", "validation_existence_accuracy")
SIZE, MARGIN = (720, 300), 46
COLORS = {
    "loss": "#6b7a8f",
    "validation_token_accuracy": "#2a6f97",
    "validation_existence_accuracy": "#e07a3f",
}


def joined(logs: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
    """The logs of runs that went on from one another, with steps counted through."""
    rows, offset = [], 0
    for log in logs:
        for entry in log:
            found = {k: float(entry[k]) for k in COLUMNS if k in entry}
            if len(found) > 1:
                rows.append({**found, "step": offset + entry["step"]})
        offset += max(int(entry["step"]) for entry in log)
    return rows


def svg(rows: list[dict[str, float]]) -> str:
    """Each column as a line over steps; the vertical axis runs from 0 to 1, losses are clipped."""
    width, height = SIZE
    last = max(r["step"] for r in rows)

    def place(step: float, value: float) -> str:
        x = MARGIN + (width - 2 * MARGIN) * step / last
        y = height - MARGIN - (height - 2 * MARGIN) * min(value, 1.0)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        start, end = place(0, value).split(","), place(last, value).split(",")
        parts.append(
            f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="#dfe4ea"/>'
            f'<text x="{MARGIN - 8}" y="{float(start[1]) + 4}" text-anchor="end">{value:g}</text>'
        )
    for number, (name, color) in enumerate(COLORS.items()):
        line = " ".join(place(r["step"], r[name]) for r in rows if name in r)
        label = name.replace("_", " ")
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
            f'<text x="{MARGIN + 220 * number}" y="22" fill="{color}">{label}</text>'
        )
    parts.append(f'<text x="{width // 2}" y="{height - 12}">steps (to {last:g})</text></svg>')
    return "".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Training logs as CSV and as one picture.")
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .csv and .svg")
    args = parser.parse_args(argv)
    rows = joined([json.loads(p.read_text()) for p in args.logs])
    with args.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    args.out.with_suffix(".svg").write_text(svg(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
