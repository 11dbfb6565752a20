"""Ranks, parts and faults: `torchrun` as a user starts it, on gloo."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from running import finish, has_row, launch_fresh, launch_ranks, rows, wait
from small_shards import make_samples, write_folder
from support import error_line, train

COMMON = ("--init", "random:tiny", "--batch-size", "16", "--lr", "1e-3", "--device", "cpu")
EXACT = ("step", "epoch", "skipped", "skipped_steps", "lr")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ranks") / "shards", make_samples(20))


def assert_alike(some: Path, others: Path, tolerance: float = 1e-5) -> None:
    """The same steps, and numbers that differ by rounding alone."""
    one, other = rows(some), rows(others)
    assert [[row[name] for name in EXACT] for row in one] == [[row[name] for name in EXACT] for row in other]
    for name in ("loss", "mlm_loss", "match_loss", "grad_norm"):
        theirs = [float(row[name]) for row in other]
        np.testing.assert_allclose([float(row[name]) for row in one], theirs, rtol=tolerance, atol=tolerance)


def poisoned(shards: Path, folder: Path, number: int) -> tuple[Path, str]:
    """A copy of shards in which the features of one image are no numbers, and nothing else tells; and its key."""
    copy = Path(shutil.copytree(shards, folder))
    index = copy / "shard-000000.parquet"
    table = pq.read_table(index)
    row = table.slice(number, 1).to_pylist()[0]
    raw = np.full(row["features_bytes"] // 2, np.nan, np.float16).tobytes()
    with (copy / "shard-000000.tar").open("r+b") as tar:
        tar.seek(row["features_offset"])
        tar.write(raw)
    hashes = table["features_xxh3"].to_pylist()
    hashes[number] = xxhash.xxh3_64_intdigest(raw)
    place = table.schema.get_field_index("features_xxh3")
    column = pq.read_table(index).column(place).type
    changed = table.set_column(place, table.schema.field(place), [np.array(hashes, column.to_pandas_dtype())])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), index, write_page_checksum=True)
    return copy, row["key"]


def run(ranks: int, code: int, *arguments: object) -> str:
    """Train to the end expected, here or by torchrun, and return what was said on stderr."""
    if ranks > 1:
        return finish(launch_fresh(*arguments, ranks=ranks), code)[1]
    done = train(*arguments)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_ranks_and_parts_change_only_the_rounding(shards: Path, tmp_path: Path):
    arguments = ("--shards", shards, *COMMON, "--steps", "8", "--checkpoint-every", "4")
    assert train(*arguments, "--out", tmp_path / "one").returncode == 0
    assert train(*arguments, "--out", tmp_path / "parts", "--accumulate", "4").returncode == 0
    for process in launch_ranks(*arguments, "--out", tmp_path / "two", "--accumulate", "2", ranks=2):
        assert "warning" not in finish(process)[1]
    assert_alike(tmp_path / "parts", tmp_path / "one")
    assert_alike(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "checkpoint-000008")
    done = train("--resume", tmp_path / "two")
    assert "going on after step 4 of 8" in done.stdout
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_fifty_steps_on_one_two_and_four_ranks_are_alike_and_go_on_as_each_other(shards: Path, tmp_path: Path):
    arguments = ("--shards", shards, *COMMON, "--steps", "50", "--checkpoint-every", "25")
    for name, ranks, parts in (("one", 1, 1), ("parts", 1, 4), ("two", 2, 1), ("four", 4, 2)):
        finish(launch_fresh(*arguments, "--out", tmp_path / name, "--accumulate", parts, ranks=ranks))
    for name in ("parts", "two", "four"):
        assert_alike(tmp_path / name, tmp_path / "one", tolerance=1e-4)
    shutil.rmtree(tmp_path / "one" / "checkpoint-000050")
    finish(launch_fresh("--resume", tmp_path / "one", ranks=2))
    assert_alike(tmp_path / "one", tmp_path / "two", tolerance=1e-4)


@pytest.mark.slow
def test_all_ranks_stop_after_the_same_step_and_say_so_once(shards: Path, tmp_path: Path):
    arguments = ("--shards", shards, *COMMON, "--steps", "4000", "--out", tmp_path / "run")
    process = launch_fresh(*arguments, ranks=2)
    wait(process, lambda: has_row(tmp_path / "run", 3))
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("error: stopped by SIGTERM after step") == 1
    last = rows(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{int(last):06d}"]
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert printed.count("triples of") == 1


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_is_no_number_is_skipped_and_its_image_named(shards: Path, tmp_path: Path, ranks: int):
    copy, key = poisoned(shards, tmp_path / "shards", 2)
    arguments = ("--shards", copy, *COMMON, "--out", tmp_path / "run", "--steps", "6", "--batch-size", "8")
    errors = run(ranks, 0, *arguments, "--max-skipped", "6")
    warnings = [line for line in errors.splitlines() if line.startswith("warning: step ")]
    found = rows(tmp_path / "run")
    skipped = [int(row["skipped_steps"]) for row in found]
    assert 1 <= skipped[-1] == len(warnings) < 6
    for line in warnings:
        assert f"images: {key}; the step is skipped" in line
    for before, row in zip([0, *skipped], found, strict=False):
        assert (row["loss"] == "nan") == (int(row["skipped_steps"]) > before)
    errors = run(ranks, 1, *arguments, "--max-skipped", "0", "--overwrite")
    assert f"images: {key}; 1 steps were skipped, --max-skipped allows 0" in errors


def test_a_batch_that_cannot_be_spread_is_one_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = train("--shards", shards, *COMMON, "--out", tmp_path / "run", "--accumulate", "3")
    assert done.returncode == 2
    assert "--batch-size 16: not a multiple of 1 ranks times --accumulate 3" in error_line(done)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    done = train("--shards", shards, *COMMON, "--out", tmp_path / "run")
    assert "--batch-size 16: not a multiple of 3 ranks times --accumulate 1" in error_line(done)
