"""`firsthand augment responses`: a model's own answers to prompts about images, greedy and drawn.

What it is: SIMA's self-generation (arXiv 2405.15973, section 3.1) as a resumable stage: one greedy
answer and `candidates` drawn ones a prompt, the image encoded once for all of them. What it is not:
a judge of answers (`augment critique`).

    python -m firsthand.datasets_scripts.sima.sima prompts --source prompts.jsonl \
        --images train2017 --out prompts
    firsthand augment responses --data prompts --model org/model --out responses

A prompt that gets fewer than two usable answers goes no further and is kept in OUT/dropped with
the reason. On several devices: `accelerate launch -m firsthand.recipes.cli augment responses ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet

from firsthand.datasets_scripts.sima import sima
from firsthand.processing.endpoint import Reply
from firsthand.recipes import conversations
from firsthand.recipes.answering import Answerer, Request
from firsthand.recipes.inputs import asked_endpoint, load_rows, stored_image
from firsthand.recipes.stages import DROPPED, Row, Step, keep_plan, others_at_work, run_stages

GREEDY = "greedy"
RESPONSE = {"source": pa.string(), "text": pa.string(), "problem": pa.string()}


class Respond(Step):
    """Adds `responses` (each with its source, its text, and why it cannot be used) and `responder`.

    A row goes on where at least two different responses can be used.

    Args:
        answerer: who is asked.
        candidates: drawn answers beside the greedy one; SIMA draws one.
    """

    columns: ClassVar[dict[str, pa.DataType]] = {
        "prompt_key": pa.string(),
        "responses": pa.list_(pa.struct(RESPONSE)),
        "responder": pa.string(),
    }

    def __init__(self, answerer: Answerer, candidates: int = 1) -> None:
        super().__init__()
        self.answerer, self.candidates = answerer, candidates

    def batch(self, rows: list[Row]) -> list[Row]:
        draws = range(self.candidates + 1)
        problems = [prompt_problem(row) for row in rows]
        asked = [row for row, problem in zip(rows, problems, strict=True) if not problem]
        requests = [request for row in asked for request in _requests(row, draws)]
        replies = iter(self.answerer.ask(requests))
        done = []
        for row, problem in zip(rows, problems, strict=True):
            said = [] if problem else [next(replies) for _ in draws]
            responses = marked([self._response(draw, one) for draw, one in enumerate(said)])
            made: Row = {"responses": responses, "responder": self.answerer.name}
            if problem is None:
                made["prompt_key"] = prompt_key(row)
                problem = too_few(responses)
            reason = {DROPPED: f"{self.name}: {problem}"} if problem else {}
            done.append({**row, **made, **reason})
        return done

    def _response(self, draw: int, reply: Reply) -> Row:
        source = f"sampled_{draw}" if draw else GREEDY
        text, problem = reply.text.strip(), reply.error
        if problem is None and not text:
            problem = "empty"
        if problem is None and (token := self.answerer.control_token(text)):
            problem = f"control token: it spells {token}"
        return {"source": source, "text": text, "problem": problem}


def _requests(row: Row, draws: range) -> list[Request]:
    key = prompt_key(row)
    return [Request(row["images"][0], key, row["question"], draw) for draw in draws]


def prompt_key(row: Row) -> str:
    """The row's own key, or one made of its image and question."""
    return row.get("prompt_key") or sima.key_of(row["images"][0]["bytes"], row["question"])


def prompt_problem(row: Row) -> str | None:
    """Why a prompt cannot be asked; None where it can."""
    images = row.get("images") or []
    if not str(row.get("question") or "").strip():
        return "no question"
    if len(images) != 1:
        return f"{len(images)} images: a prompt has one"
    try:
        stored_image(images[0])
    except ValueError as error:
        return str(error)
    return None


def marked(responses: list[Row]) -> list[Row]:
    """The responses, those that repeat an earlier one marked as such."""
    seen: set[str] = set()
    out = []
    for one in responses:
        again = one["problem"] is None and one["text"] in seen
        out.append({**one, "problem": "the same as an earlier one"} if again else one)
        seen.add(one["text"])
    return out


def too_few(responses: list[Row]) -> str | None:
    """Why fewer than two responses can be used, None where that many can."""
    if sum(one["problem"] is None for one in responses) >= 2:
        return None
    why = sorted({one["problem"] for one in responses if one["problem"]})
    return f"fewer than two usable responses: {'; '.join(why) or 'only one was given'}"


def parquet_source(data: str, split: str, out: Path) -> Path:
    """Where the rows of `data` lie as Parquet: a file, a folder (its `data`), or OUT/source.

    Raises:
        ValueError: naming the columns that the rows lack.
    """
    path = Path(data)
    if path.is_dir():
        return path / "data" if (path / "data").is_dir() else path
    if path.is_file():
        return path
    target = out / "source" / "rows.parquet"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".aside")
        load_rows(data, split).to_parquet(aside)
        aside.replace(target)
    return target


def require_columns(source: Path, data: str, needed: Mapping[str, str]) -> None:
    """Raises ValueError where the rows lack one of the columns, saying what writes it."""
    file = next(iter(sorted(source.rglob("*.parquet"))), None) if source.is_dir() else source
    if file is None:
        raise ValueError(f"{data} holds no rows of Parquet")
    present = set(parquet.read_schema(file).names)
    if missing := [name for name in needed if name not in present]:
        hints = dict.fromkeys(needed[name] for name in missing)
        raise ValueError(
            f"{data} has no column {', '.join(missing)}: {'; '.join(hints)} "
            f"(it has {', '.join(sorted(present))})"
        )


def respond(
    data: str, out: str | Path, answerer: Answerer, candidates: int = 1,
    split: str = "train", workers: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Put the prompts of `data`, each with its responses, into `out/data`; again to go on.

    Args:
        data: Parquet (a file or folder) or a Hub id of rows with `images` and `question`.
        out: a folder of its own.
        answerer: who is asked.
        candidates: drawn answers beside the greedy one, at least 1.
        split: of the Hub's data set.
        workers: shards of 256 rows under way at once.

    Returns:
        Rows `kept` and `dropped`.

    Raises:
        ValueError: for settings that cannot work, rows without these columns, or an `out` that
            holds a run with other settings.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; a preference needs at least 1 drawn answer")
    source = parquet_source(data, split, Path(out))
    hint = "prompts are written by firsthand.datasets_scripts.sima"
    require_columns(source, data, {"images": hint, "question": hint})
    about = {"data": conversations.fingerprint(data, split), **spoken(answerer)}
    keep_plan(Path(out) / "state" / "about.json", about | {"candidates": candidates})
    return run_stages(source, out, [Respond(answerer, candidates)], workers)


def spoken(answerer: Answerer) -> dict[str, Any]:
    """What must be equal for a stopped run to be gone on with: who answers, and how."""
    about = {k: v for k, v in asdict(answerer).items() if k not in ("cache", "batch_size")}
    if answerer.model and Path(answerer.model).is_dir():
        files = sorted(Path(answerer.model).glob("*.safetensors"))
        about["weights"] = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return about


def answerer_of(args: argparse.Namespace) -> Answerer:
    """Who is asked, from the command line. Raises ValueError for half an endpoint."""
    return Answerer(
        str(Path(args.out) / "state" / "answers"),
        model=args.model,
        endpoint=asked_endpoint(args),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def run(args: argparse.Namespace) -> int:
    """The verb: respond, and print what came out."""
    counts = respond(
        args.data, args.out, answerer_of(args), args.candidates, args.split, args.workers
    )
    report(Path(args.out), counts)
    return 0


def report(out: Path, counts: Mapping[str, int]) -> None:
    """Print the fate of the rows. Raises ValueError where none was kept, with the reasons."""
    if others_at_work(counts):
        return
    why = ", ".join(f"{kind}: {n}" for kind, n in conversations.reasons(out).items())
    if not counts["kept"]:
        raise ValueError(f"all {counts['dropped']} rows were dropped ({why}); see {out}/dropped")
    dropped = f" ({why})" if why else ""
    print(f"kept {counts['kept']} rows, dropped {counts['dropped']}{dropped}; see {out}")
