"""Every `firsthand ...` line of README and docs is a line that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from firsthand.recipes.cli import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = [
    *sorted((ROOT / "metrics").glob("*/README.md")),
    *sorted((ROOT / "spaces").glob("*/README.md")),
]


def commands(page: Path) -> list[str]:
    """The commands in a page's plain and bash blocks, continued lines joined."""
    kept, kind = [], None  # the language of the block that a line stands in
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("```"):
            kind = line[3:].strip() if kind is None else None
        elif kind in ("", "bash"):
            kept.append(line)
    lines = "\n".join(kept).replace("\\\n", " ").splitlines()
    found = [part.strip() for line in lines for part in line.split("&&")]
    found = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part) for part in found]
    return [part for part in found if part.startswith("firsthand ")]


@pytest.mark.parametrize("page", PAGES + CARDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_taken(page):
    for command in commands(page):
        try:
            build_parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_the_readme_shows_every_verb():
    shown = {shlex.split(command)[1] for command in commands(ROOT / "README.md")}
    assert {"augment", "demo", "explain", "measure", "steer"} <= shown
