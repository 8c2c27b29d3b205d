"""Resumable stages over Parquet: the only stage runner, on datatrove's executors.

What it is: a small Arrow reader and writer around datatrove steps, because datatrove's own drop
rows without `text` and lose the Image feature. Input is cut into shards of at most 256 rows, one
task each. A finished shard is written aside, renamed, and only then marked as completed; so a run
that was killed is started again with the same call, redoes the shards that were under way, and
neither loses nor doubles a row. What it is not: a cache of servers' answers (`Endpoint` has one).

    class Short(Step):
        columns = {"words": pa.int32()}

        def process(self, row):
            if len(row["caption"]) > 80:
                raise Dropped("long caption")
            return {**row, "words": len(row["caption"].split())}

    run_stages("scenes/train", "out", [Short()], workers=8)
    load_dataset("parquet", data_files="out/data/*.parquet")
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

SHARD_ROWS = 256
DROPPED = "dropped"  # the key under which a row carries why it goes no further

Row = dict[str, Any]
Shard = tuple[str, int, int]  # file, first row, rows


class Dropped(Exception):
    """Raised by `Step.process`: this row goes no further, for the reason given."""


class Step(PipelineStep):
    """One stage over rows (dicts). Override `process`, or `batch` where rows are served together.

    `columns` names the columns that it adds or retypes; other new keys are not written.
    """

    type = "stage"
    columns: ClassVar[dict[str, pa.DataType]] = {}

    @property
    def name(self) -> str:  # type: ignore[override]
        return type(self).__name__

    def process(self, row: Row) -> Row:
        """The row that goes on. Raises Dropped with the reason where none does."""
        raise NotImplementedError(f"{self.name} needs a `process` or a `batch` method")

    def batch(self, rows: list[Row]) -> list[Row]:
        """The rows of one shard, in order; a row with the key DROPPED (why) goes no further."""
        return [self._process(row) for row in rows]

    def _process(self, row: Row) -> Row:
        try:
            return self.process(row)
        except Dropped as reason:
            return {**row, DROPPED: f"{self.name}: {reason}"}

    def run(self, data: Iterable[Row], rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        rows = list(data)
        going = [row for row in rows if DROPPED not in row]
        done = self.batch(going)
        if len(done) != len(going):
            raise ValueError(
                f"{self.name}.batch gave {len(done)} rows for {len(going)}; give one for each, "
                f"with the key {DROPPED!r} for those that go no further"
            )
        after = iter(done)
        for row in rows:
            yield row if DROPPED in row else next(after)


class ArrowReader(PipelineStep):
    """Reads shard `rank` of Parquet files as rows; images stay as they are stored, undecoded."""

    name, type = "rows of Parquet", "reader"

    def __init__(self, shards: list[Shard]) -> None:
        super().__init__()
        self.shards = shards

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        file, start, count = self.shards[rank]
        yield from _slice(parquet.ParquetFile(file), start, count)


class ArrowWriter(PipelineStep):
    """Writes a shard's rows to `data/` and its dropped rows, with reasons, to `dropped/`."""

    name, type = "rows to Parquet", "writer"

    def __init__(self, out: Path, schema: pa.Schema, kept: pa.Schema | None = None) -> None:
        super().__init__()
        self.out, self.schema, self.kept = out, schema, kept or schema

    def run(self, data: Iterable[Row], rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        rows = list(data)
        with_reason = self.schema.append(pa.field(DROPPED, pa.string()))
        self._write("dropped", rank, [row for row in rows if DROPPED in row], with_reason)
        self._write("data", rank, [row for row in rows if DROPPED not in row], self.kept)
        yield from rows

    def _write(self, folder: str, rank: int, rows: list[Row], schema: pa.Schema) -> None:
        target = self.out / folder / f"{rank:05d}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".aside")
        with parquet.ParquetWriter(aside, schema) as writer:
            if rows:  # an empty row group is more than some readers can bear
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        aside.replace(target)


class _Executor(LocalPipelineExecutor):
    """datatrove's, with one line a shard in place of its pages of statistics."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")
        done = super()._run_for_rank(rank, local_rank, node_rank)
        print(f"shard {rank + 1} of {self.world_size}: done", file=sys.stderr)
        return done


def run_stages(
    source: str | Path,
    out: str | Path,
    steps: Sequence[Step],
    workers: int = 1,
    kept: pa.Schema | None = None,
) -> dict[str, int]:
    """Put the rows of `source` through the steps into `out`; call it again to go on after a stop.

    Args:
        source: a Parquet file, or a folder of them. Columns keep their types and features (Image).
        out: a folder of its own: `data/` and `dropped/` (Parquet, a file a shard in each; dropped
            rows have the reason in the column `dropped`), `state/` (completion markers).
        steps: at least one.
        workers: shards under way at once, each in a process of its own above 1.
        kept: the columns of `data/` where they are others than the source's and the steps';
            `dropped/` always has those.

    Under `accelerate launch` or `torchrun` each process takes its share of the shards.

    Returns:
        How many rows there were, by fate: `kept` and `dropped`; where other processes are not done,
        also how many shards are `left`.

    Raises:
        ValueError: where the source has no rows, `out` holds a run of other steps or another
            source, or a step breaks its contract. Other errors of steps come through: mend, rerun.
    """
    out, shards = Path(out), _shards(Path(source))
    schema = parquet.read_schema(shards[0][0])
    for step in steps:
        for name, kind in step.columns.items():
            at, field = schema.get_field_index(name), pa.field(name, kind)
            schema = schema.append(field) if at < 0 else schema.set(at, field)
    keep_plan(out / "state" / "plan.json", {"shards": shards, "steps": [s.name for s in steps]})
    first, count = _share(len(shards))
    _Executor(
        pipeline=[ArrowReader(shards), *steps, ArrowWriter(out, schema, kept)],
        tasks=len(shards),
        local_tasks=count,
        local_rank_offset=first,
        workers=max(min(workers, count), 1),
        logging_dir=str(out / "state"),
    ).run()
    counts = {"kept": _count(out / "data"), "dropped": _count(out / "dropped")}
    left = len(shards) - len(list((out / "state" / "completions").glob("*")))
    return counts | ({"left": left} if left else {})


def others_at_work(counts: Mapping[str, int]) -> bool:
    """Whether other processes have shards to do yet, which is then said; nothing is final."""
    if counts.get("left"):
        print(f"this process is done; {counts['left']} shards of other processes are not")
    return bool(counts.get("left"))


def _share(shards: int) -> tuple[int, int]:
    """First shard of this process and how many: all, or under a launcher those of its RANK."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = shards * rank // world
    return first, shards * (rank + 1) // world - first


def _shards(source: Path) -> list[Shard]:
    """The source cut into shards. Raises ValueError where it has no rows."""
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    rows = {str(file.resolve()): parquet.read_metadata(file).num_rows for file in files}
    shards = [
        (file, start, min(SHARD_ROWS, count - start))
        for file, count in rows.items()
        for start in range(0, count, SHARD_ROWS)
    ]
    if not shards:
        raise ValueError(f"{source} holds no rows of Parquet")
    return shards


def keep_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write down what is run in `<out>/state/<file>`, or make sure that it is what was run before.

    Raises:
        ValueError: where the file holds another plan.
    """
    text = json.dumps(plan)
    if path.exists() and path.read_text("utf-8") != text:
        raise ValueError(
            f"{path.parents[1]} holds a run of other steps or another source; choose another "
            f"folder, or remove it to start anew (it ran {path.read_text('utf-8')[:300]})"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.aside")
    aside.write_text(text, "utf-8")
    aside.replace(path)


def _slice(file: parquet.ParquetFile, start: int, count: int) -> Iterator[Row]:
    """Rows [start, start + count) of a file, holding SHARD_ROWS of them at a time."""
    at = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if at + size > start and at < start + count:
            for batch in file.iter_batches(SHARD_ROWS, row_groups=[group]):
                low, high = max(start - at, 0), min(start + count - at, len(batch))
                if low < high:
                    yield from batch.slice(low, high - low).to_pylist()
                at += len(batch)
        else:
            at += size


def _count(folder: Path) -> int:
    return sum(parquet.read_metadata(f).num_rows for f in folder.glob("*.parquet"))
