"""Folders of shards, here or behind a URL: what is there, what is missing, and what is refused by name."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from remotes import Fault, serve

from oscar_common.errors import UsageError
from oscar_shards import remote, retries
from oscar_shards.index import SIZE, index_path
from oscar_shards.manifest import FILE
from oscar_train.data.sources import UNKNOWN, open_source, suspect

TARS = [f"shard-{number:06d}.tar" for number in range(5)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DELAY", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 10)


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def rows(source: object, number: int) -> tuple[int, list[str]]:
    """The tar's length and the keys that an index has."""
    tar_bytes, batches = source.index(number)  # type: ignore[attr-defined]
    return tar_bytes, [key for batch in batches for key in batch.column("key").to_pylist()]


def test_a_folder_is_the_same_here_and_behind_a_url(shards: Path):
    local = open_source(str(shards), False)
    sizes = [(shards / tar).stat().st_size for tar in TARS]
    assert (local.tars, local.sizes, local.named(1)) == (TARS, sizes, f"{shards}/shard-000001.tar")
    assert open_source(f"file://{shards}/", False).sizes == sizes
    with serve(shards) as server:
        for listing in (True, False):
            server.faults |= {} if listing else {"": Fault.GONE}
            there = open_source(f"{server.url}/", False)
            assert (there.tars, there.sizes) == (TARS, [UNKNOWN] * 5)
            assert there.named(1) == f"{server.url}/shard-000001.tar"
            assert [rows(there, n) for n in range(5)] == [rows(local, n) for n in range(5)]
            assert there.suspect(0) == ""


def test_a_stamp_changes_with_an_index(copy: Path):
    with serve(copy) as server:
        before = open_source(server.url, False).stamp
        assert open_source(server.url, False).stamp == before
        index = copy / "shard-000002.parquet"
        index.write_bytes(index.read_bytes() + b"x")
        assert open_source(server.url, False).stamp != before


def test_a_server_without_a_listing_needs_the_name(copy: Path):
    manifest = copy / FILE
    manifest.write_text(manifest.read_text().replace('"name": "shard"', '"name": ""'))
    with serve(copy) as server:
        assert open_source(server.url, False).tars == TARS
        server.faults[""] = Fault.GONE
        with pytest.raises(
            UsageError, match=rf"{server.url}: it cannot be listed, and its manifest.json does not name"
        ):
            open_source(server.url, False)


def test_shards_that_are_missing_behind_a_url_are_counted(copy: Path):
    (copy / "shard-000003.tar").unlink()
    with serve(copy) as server:
        with pytest.raises(UsageError, match=rf"--shards {server.url}: 4 of 5 shards are there"):
            open_source(server.url, False)
        source = open_source(server.url, True)
        assert [size is None for size in source.sizes] == [False, False, False, True, False]


def test_an_index_that_was_damaged_on_its_way_is_read_again(shards: Path, capsys: pytest.CaptureFixture[str]):
    good = rows(open_source(str(shards), False), 2)
    with serve(shards) as server:
        source = open_source(server.url, False)
        server.faults["shard-000002.parquet"] = Fault.SHORT
        server.times["shard-000002.parquet"] = 1
        assert rows(source, 2) == good
        said = f"warning: {server.url}/shard-000002.parquet: it is damaged; reading it again\n"
        assert capsys.readouterr().err == said
        del server.times["shard-000002.parquet"]
        asked = server.gets("shard-000002.parquet")
        with pytest.raises(ValueError, match=r"its index shard-000002\.parquet is damaged"):
            source.index(2)
        assert server.gets("shard-000002.parquet") == asked + 2  # the same bytes twice: no third time


def test_an_index_behind_a_url_has_to_say_how_long_its_tar_is(copy: Path):
    index = copy / "shard-000002.parquet"
    table = pq.read_table(index)
    assert table.schema.metadata.keys() == {SIZE}
    pq.write_table(table.replace_schema_metadata({}), index)
    with serve(copy) as server, pytest.raises(ValueError, match="does not say how long it is; run: oscar-shards index"):
        open_source(server.url, False).index(2)


def add(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())

    return spoil


def link(path: Path) -> None:
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("z.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda path: None, ""),
        (add("z.pkl"), " (z: z.pkl: a pickle is refused)"),
        (add("image-017.features.pickle"), " (image-017: image-017.features.pickle: a pickle is refused)"),
        (add("../z.json"), " ('../z.json' would lie outside the folder that it is unpacked into: refused)"),
        (add("/z.json"), " ('/z.json' would lie outside the folder that it is unpacked into: refused)"),
        (link, " ('z.json' is a link: refused)"),
        (cut, " (cut off: "),
        (Path.unlink, ""),
    ],
)
def test_what_is_wrong_with_a_tar_is_found_in_its_headers(spoil: Callable[[Path], None], found: str, copy: Path):
    spoil(copy / "shard-000001.tar")
    said = suspect(copy / "shard-000001.tar")
    assert said == found or (found.startswith(" (cut") and said.startswith(found))
    assert open_source(str(copy), True).suspect(1) == said


def test_a_tar_without_an_index_is_told_of_with_what_is_refused_in_it(copy: Path):
    add("z.pkl")(copy / "shard-000001.tar")
    index_path(copy / "shard-000001.tar").unlink()
    source = open_source(str(copy), False)
    with pytest.raises(
        ValueError, match=r"it has no index shard-000001.parquet; .* \(z: z.pkl: a pickle is refused\)$"
    ):
        source.index(1)
