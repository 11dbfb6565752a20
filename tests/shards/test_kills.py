"""A shard written once more is the old one or the new one, whenever kill -9 comes; what others wrote stays."""

import dataclasses
from pathlib import Path

import pytest
from kills import is_killed
from small_shards import make_samples, write_folder

from oscar_common.errors import UsageError
from oscar_common.sample import Sample
from oscar_shards.manifest import Layout, read_manifest, write_manifest
from oscar_shards.read import is_whole, open_folder
from oscar_shards.write import Reject, finish_shards, remove_shards, shard_path, write_shard

LAYOUT = Layout(feature_dim=24)
SAMPLES = make_samples(3)
REFUSED = [Reject(path=f"{number}.jpg", reason="truncated", message="cut") for number in range(2)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([*SAMPLES[:1], *REFUSED], [*SAMPLES]),
        ([*SAMPLES[:1], *REFUSED], [*SAMPLES[:2], REFUSED[1]]),
        ([*SAMPLES], [*SAMPLES[:2], REFUSED[0]]),
    ],
    ids=["none is refused any more", "fewer are refused", "one is refused now"],
)
def test_a_kill_at_any_moment_leaves_the_old_shard_or_the_new_one(
    tmp_path: Path, old: list[Sample | Reject], new: list[Sample | Reject]
):
    expected = []
    for name, items in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        write_shard(shard_path(tmp_path / name, "shard", 0), items, LAYOUT)
        expected.append(contents(tmp_path / name))

    ends = set()
    for after in range(100):
        out = tmp_path / str(after)
        out.mkdir()
        tar = shard_path(out, "shard", 0)
        write_shard(tar, old, LAYOUT)
        killed = is_killed(lambda tar=tar: write_shard(tar, new, LAYOUT), after)
        finish_shards(out)
        assert is_whole(tar)
        left = {name: content for name, content in contents(out).items() if not name.startswith(".tmp-")}
        assert left in expected
        ends.add(expected.index(left))

        write_shard(tar, new, LAYOUT)
        assert contents(out) == expected[1]
        if not killed:
            break
    assert after >= 6
    assert ends == {0, 1}


def test_a_write_that_fails_leaves_the_old_shard_and_nothing_else(tmp_path: Path):
    tar = shard_path(tmp_path, "shard", 0)
    write_shard(tar, [*SAMPLES[:1], *REFUSED], LAYOUT)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="features"):
        write_shard(tar, SAMPLES, Layout(feature_dim=25))
    assert contents(tmp_path) == before


def test_only_what_a_job_wrote_is_removed(tmp_path: Path):
    write_folder(tmp_path, make_samples(20))
    made = read_manifest(tmp_path, "")
    write_manifest(tmp_path, dataclasses.replace(made, plan=dataclasses.replace(made.plan, sha256="ab")))
    last = made.plan.num_shards - 1
    theirs = {
        *("extra-202401.parquet", "shard-202401.parquet", f"shard-{last + 1:06d}.tar", "shard-1.tar"),
        *("shard-0000000.tar", "other-000000.tar", "a_shard-000000.tar", "notes.txt", "images.parquet"),
    }
    ours = {"_plan.parquet", "_left-out.parquet", "shard-000000.rejects.parquet", ".tmp-shard-000000.decoding"}
    for name in theirs | ours:
        (tmp_path / name).write_text("mine")
    remove_shards(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == theirs


def test_tars_that_were_only_indexed_here_are_not_removed(tmp_path: Path):
    write_folder(tmp_path, make_samples(5))
    made = read_manifest(tmp_path, "")
    write_manifest(tmp_path, dataclasses.replace(made, plan=dataclasses.replace(made.plan, sha256="")))
    with pytest.raises(UsageError, match="others may have written them"):
        remove_shards(tmp_path)
    assert len(open_folder(tmp_path).table) == 5
