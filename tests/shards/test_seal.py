"""Every byte of what lies beside the tars is covered: a bit that flips, a file that is cut or gone, is noticed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import P, make_samples, write_folder
from support import shards

from oscar_shards import seal
from oscar_shards.manifest import FILE, LEFT_OUT_FILE, PLAN_FILE, Layout, read_manifest
from oscar_shards.seal import write_sealed
from oscar_shards.verify import check, check_folder
from oscar_shards.write import Reject, rejects_path, shard_path, write_shard

TABLE = pa.table({"image": ["a", "b"], "reason": ["missing", "missing"]})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, the second with a reject, and the files of a job beside them."""
    samples = make_samples(8)
    folder = write_folder(tmp_path_factory.mktemp("seal") / "shards", samples, per_shard=4)
    refused = Reject(path="x.jpg", reason="cut", message="it is cut")
    write_shard(shard_path(folder, "shard", 1), [*samples[4:7], refused], Layout(feature_dim=P))
    for name in (PLAN_FILE, LEFT_OUT_FILE):
        with (folder / name).open("wb") as file:
            write_sealed(TABLE, file, compression="zstd")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def faults_of(folder: Path) -> tuple[list[str], list[Path]]:
    """What verify says of a folder, and which files it says are not covered."""
    reports = {tar: check(tar, quick=True) for tar in sorted(folder.glob("*.tar"))}
    unsealed = [path for report in reports.values() for path in report.unsealed]
    faults = [message for report in reports.values() for _, message in report.faults]
    return [*faults, *check_folder(folder, reports, unsealed)], unsealed


def beside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".tar")


def flips(content: bytes, count: int) -> Iterator[bytes]:
    draw = np.random.default_rng(len(content))
    for at, bit in zip(draw.integers(0, len(content), count), draw.integers(0, 8, count), strict=True):
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        yield bytes(changed)


def test_a_whole_folder_is_covered(folder: Path):
    assert [path.name for path in beside(folder)] == [
        *("_left-out.parquet", "_plan.parquet", "manifest.json"),
        *("shard-000000.parquet", "shard-000001.parquet", "shard-000001.rejects.parquet"),
    ]
    assert faults_of(folder) == ([], [])


@pytest.mark.parametrize("number", range(6))
def test_every_flip_and_cut_is_noticed(folder: Path, number: int):
    path = beside(folder)[number]
    content = path.read_bytes()
    cuts = [content[:size] for size in np.linspace(0, len(content) - 1, 10).astype(int)]
    for changed in [*flips(content, 60), *cuts, content + b"\n", content + content]:
        path.write_bytes(changed)
        assert faults_of(folder)[0], path.name


@pytest.mark.parametrize("number", range(6))
def test_a_seal_alone_notices_a_flip_of_any_byte(folder: Path, number: int, tmp_path: Path):
    content, changed = beside(folder)[number].read_bytes(), tmp_path / "changed"
    of_json = beside(folder)[number].name == FILE
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        if of_json:
            assert seal.broken_json(bytes(damaged)) is not False, at
        else:
            changed.write_bytes(damaged)
            assert seal.broken(changed), at


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_what_is_gone_is_noticed(folder: Path, number: int):
    beside(folder)[number].unlink()
    assert faults_of(folder)[0]


def test_a_file_whose_seal_was_taken_away_is_not_one_of_an_older_version(folder: Path):
    path = folder / "shard-000000.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    assert faults_of(folder) == (["shard-000000.parquet: its seal is not there"], [])


def test_a_folder_of_an_older_version_is_read_and_what_is_not_covered_is_said(folder: Path):
    content = json.loads((folder / FILE).read_text())
    del content["seal"]
    (folder / FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table, path, compression="zstd")
    assert read_manifest(folder, "--shards").seal is None

    faults, unsealed = faults_of(folder)
    assert (faults, sorted(unsealed)) == ([], beside(folder))
    done = shards("verify", folder)
    assert done.returncode == 0
    assert "not covered: 6 files of an older version without a seal" in done.stdout


def test_a_file_alone_is_verified_too(folder: Path):
    path = rejects_path(shard_path(folder, "shard", 1))
    assert shards("verify", path).returncode == 0
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    done = shards("verify", path)
    assert done.returncode == 1
    assert "its seal does not fit its bytes" in done.stdout
    path.write_bytes(bytes(damaged)[:-100])
    assert shards("verify", path).returncode == 1


def test_shards_come_by_number_and_those_of_another_set_do_not_belong_to_them(tmp_path: Path):
    folder = write_folder(tmp_path / "shards", make_samples(8), per_shard=4)
    for number in (1_000_000, 999_999):
        for path in folder.glob("shard-000001.*"):
            shutil.copy(path, folder / f"shard-{number}{path.suffix}")
    shutil.copy(folder / "shard-000001.tar", folder / "shard-x-000000.tar")
    manifest = read_manifest(folder, "--shards")
    names = [f"shard-{number}.tar" for number in ("000000", "000001", "999999", "1000000")]
    assert [path.name for path in manifest.tars(folder)] == names
    assert manifest.tar_names(path.name for path in folder.iterdir()) == names
