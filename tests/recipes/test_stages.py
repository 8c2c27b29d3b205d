"""Stages: every row comes out once, kept or dropped with its reason, also after kill -9."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from firsthand.recipes import stages
from firsthand.recipes.stages import Dropped, Step, run_stages

ROWS = 1100  # five shards


class Number(Step):
    """Squares; every seventh row is dropped."""

    columns = {"square": pa.int64()}

    def process(self, row):
        if row["n"] % 7 == 0:
            raise Dropped("a seventh")
        return {**row, "square": row["n"] ** 2, "unwritten": 1}


class Slow(Number):
    """The same, slowly, so that it can be killed half-way."""

    name = "Number"

    def process(self, row):
        time.sleep(0.004)
        return super().process(row)


class After(Step):
    """Sees only the rows that the step before kept."""

    def process(self, row):
        assert row["n"] % 7 and row["square"] == row["n"] ** 2
        if row["n"] == 1:
            raise Dropped("one")
        return row


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    table = pa.table({"n": pa.array(range(ROWS), pa.int64())})
    parquet.write_table(table[:700], folder / "a.parquet", row_group_size=100)
    parquet.write_table(table[700:], folder / "b.parquet")
    return folder


def read(folder: Path) -> list[dict]:
    files = sorted(folder.glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def check(out: Path, result: dict) -> None:
    kept, dropped = read(out / "data"), read(out / "dropped")
    assert [r["n"] for r in kept] == [n for n in range(ROWS) if n % 7]
    assert all(r == {"n": r["n"], "square": r["n"] ** 2} for r in kept)
    assert [r["n"] for r in dropped] == list(range(0, ROWS, 7))
    assert {r["dropped"] for r in dropped} == {"Number: a seventh"}
    assert result == {"kept": len(kept), "dropped": len(dropped)}
    sizes = [parquet.read_metadata(f).num_rows for f in (out / "data").glob("*.parquet")]
    assert max(sizes) <= stages.SHARD_ROWS and len(sizes) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_every_row_comes_out_once(source, tmp_path, workers, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where workers find this module
    check(tmp_path, run_stages(source, tmp_path, [Number()], workers))


def test_a_killed_run_is_finished_by_the_same_call(source, tmp_path):
    code = (
        "import importlib.util, sys; sys.path.insert(0, sys.argv[2]);"
        "spec = importlib.util.spec_from_file_location('test_stages', sys.argv[1]);"
        "tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests);"
        "tests.run_stages(sys.argv[3], sys.argv[4], [tests.Slow()])"
    )
    here = Path(__file__)
    arguments = [str(p) for p in (here, here.parents[1], source, tmp_path)]
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], start_new_session=True, stderr=subprocess.DEVNULL
    )
    markers = tmp_path / "state" / "completions"
    limit = time.monotonic() + 120
    while not (markers.is_dir() and len(list(markers.iterdir())) >= 2):
        assert running.poll() is None and time.monotonic() < limit, "it never got half-way"
        time.sleep(0.02)
    time.sleep(0.2)  # into the third shard
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    finished = {f: f.stat().st_mtime_ns for f in (tmp_path / "data").glob("*.parquet")}
    assert 2 <= len(finished) < 5
    check(tmp_path, run_stages(source, tmp_path, [Number()]))
    done = sorted(finished)[:2]
    assert all(f.stat().st_mtime_ns == finished[f] for f in done), "a finished shard was redone"


def test_a_torn_shard_is_redone(source, tmp_path):
    run_stages(source, tmp_path, [Number()])
    (tmp_path / "data" / "00003.parquet").unlink()
    (tmp_path / "data" / "00003.aside").write_bytes(b"PAR1 half a file")
    (tmp_path / "state" / "completions" / "00003").unlink()
    check(tmp_path, run_stages(source, tmp_path, [Number()]))


class Lenient(Step):
    """Drops nothing: as when a server answers otherwise the second time."""

    name, columns = "Number", Number.columns

    def process(self, row):
        return {**row, "square": row["n"] ** 2}


def test_a_redone_shard_leaves_nothing_of_the_first_try(source, tmp_path):
    run_stages(source, tmp_path, [Number()])
    (tmp_path / "state" / "completions" / "00003").unlink()
    result = run_stages(source, tmp_path, [Lenient()])
    both = read(tmp_path / "data") + read(tmp_path / "dropped")
    assert sorted(r["n"] for r in both) == list(range(ROWS)) and sum(result.values()) == ROWS


def test_a_dropped_row_goes_no_further(source, tmp_path):
    result = run_stages(source, tmp_path, [Number(), After()])
    reasons = Counter(r["dropped"] for r in read(tmp_path / "dropped"))
    assert reasons == {"Number: a seventh": 158, "After: one": 1}
    assert sum(result.values()) == ROWS


def test_images_keep_their_feature_and_bytes(tmp_path):
    # here, so that the processes which load this file for its steps start at once
    from datasets import Dataset, Features, Image, Value, load_dataset
    from tiny_models import tiny_image

    features = Features({"n": Value("int64"), "image": Image()})
    rows = [{"n": n, "image": tiny_image(n)} for n in range(1, 4)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "in.parquet")
    run_stages(tmp_path / "in.parquet", tmp_path / "out", [Number()])
    files = str(tmp_path / "out" / "data" / "*.parquet")
    stored = load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "c")
    assert stored.features["image"] == Image()
    assert [r["square"] for r in stored] == [1, 4, 9]
    assert all(r["image"].tobytes() == tiny_image(r["n"]).tobytes() for r in stored)


def test_another_run_in_the_same_folder_is_refused(source, tmp_path):
    run_stages(source / "b.parquet", tmp_path, [Number()])
    for where, steps in ((source, [Number()]), (source / "b.parquet", [Number(), After()])):
        with pytest.raises(ValueError, match="other steps or another source"):
            run_stages(where, tmp_path, steps)


def test_nothing_to_do_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        run_stages(tmp_path, tmp_path / "out", [Number()])


class Loses(Step):
    def batch(self, rows):
        return rows[1:]


def test_a_step_may_not_lose_rows(source, tmp_path):
    with pytest.raises(ValueError, match="Loses.batch gave 255 rows for 256"):
        run_stages(source, tmp_path, [Loses()])
