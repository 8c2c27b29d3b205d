"""What the training recipes share: options from a file, where to go on, and errors in one line.

What it is: the frame around a recipe's `run` under `accelerate launch`. What it is not: a recipe or
a trainer.

    def main() -> None:
        launch(run, parse)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def launch(run: Callable[..., Any], parse: Callable[[Sequence[str]], tuple[Any, ...]]) -> None:
    """`run` with the options of the command line; what it refuses is told in one line."""
    try:
        run(*parse(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def parse_options(kinds: list[type], arguments: Sequence[str]) -> Any:
    """Options from the command line over those of `--config` over the defaults.

    Args:
        kinds: the option classes of a recipe; the first of them has `config`.
        arguments: the command line.

    Raises:
        ValueError: naming the keys of the file that are no options.
    """
    from transformers import HfArgumentParser

    parser: Any = HfArgumentParser(kinds)  # type: ignore[arg-type]
    file = parser.parse_known_args(arguments)[0].config
    if file is not None:
        import yaml

        values = yaml.safe_load(Path(file).read_text("utf-8")) or {}
        unknown = sorted(set(values) - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"{file} holds unknown options: {', '.join(unknown)}")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(args=list(arguments), look_for_args_file=False)


def checkpoint_of(settings: Any) -> str | None:
    """Where training goes on: the folder that is named; for `true` the last that is whole, if any.

    A checkpoint's state is written last, so that one which a stop cut short has none.
    """
    wanted = settings.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        return str(wanted)
    found = Path(str(settings.output_dir)).glob("checkpoint-*/trainer_state.json")
    whole = [path.parent for path in found if _is_json(path)]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return True
