"""What tests of `firsthand measure` share: rows of four captions, calls of the command line.

from measuring import measured, refused, rows_of, run, save
"""

import gzip
import json

from firsthand.metrics import results
from firsthand.recipes import cli

OBJECTS = {"1": ["dog", "car"], "2": ["cat"], "3": [], "4": ["bus", "person"]}
SAID = {
    "a": "A dog and a cat in a car.",
    "b": "A cat.",
    "c": "An empty street with a truck.",
    "d": "",
}
"""Of images 1 to 4. Hallucinated: cat in a, truck in c."""


def rows_of(said=SAID):
    return [
        {"id": i, "image_id": number, "question": "Describe.", "prediction": text}
        for number, (i, text) in enumerate(said.items(), 1)
    ]


def save(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    with (gzip.open if path.endswith(".gz") else open)(path, "wt") as file:
        file.write(text)


def run(*words):
    return cli.main(["measure", *map(str, words)])


def measured(*words, out="results.json"):
    assert run(*words, "--out", out) == 0
    return {row["metric"]: row for row in results.read_results(out)}


CHAIR = ("chair", "--predictions", "rows.jsonl", "--objects", "objects.json")


def refused(capsys, *words):
    """The one line that a refused command ends in."""
    assert run(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def questions(said):
    return [
        {
            "id": str(i),
            "image_id": f"{i // 2}.jpg",
            "prediction": text,
            "answer": "yes no".split()[i % 2],
        }
        for i, text in enumerate(said)
    ]


def compared(*words):
    """Result rows by (metric, arm)."""
    assert run("compare", *words, "--out", "difference.json") == 0
    found = results.read_results("difference.json")
    return {(row["metric"], row["arm"]): row for row in found}


def save_captions(folder):
    """rows.jsonl and objects.json, for CHAIR."""
    save("rows.jsonl", rows_of())
    (folder / "objects.json").write_text(json.dumps(OBJECTS))
