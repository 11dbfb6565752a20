"""The folders that --shards names, here or behind a URL: which shards there are, and their indexes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from oscar_common.errors import UsageError
from oscar_common.files import digest
from oscar_shards.index import index_path, open_index
from oscar_shards.manifest import FILE, Manifest, parse_manifest, read_manifest
from oscar_shards.remote import RemoteFolder, Stamp, open_remote
from oscar_shards.retries import Gone, RemoteError
from oscar_shards.samples import entries
from oscar_shards.tar import Window, members
from oscar_shards.url import local_path

FLAG = "--shards"
INDEX_LIMIT = 1 << 30  # bytes of an index that is fetched
MANIFEST_LIMIT = 64 << 20
UNKNOWN = -1
ASKERS = 16  # files that a server is asked about at once


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of shards.

    place: as the user named it. tars: names, in order. sizes: of the tars in bytes, None if one is gone, UNKNOWN if the
    server does not say. stamp: changes with the manifest and the indexes (their names, sizes and times), not with the
    place. folder: where it is, or remote: behind which URL.
    """

    place: str
    manifest: Manifest
    tars: list[str]
    sizes: list[int | None]
    stamp: str
    folder: Path | None = None
    remote: RemoteFolder | None = None

    def named(self, number: int) -> str:
        """Return how messages call a shard."""
        return f"{self.place.rstrip('/')}/{self.tars[number]}"

    def index(self, number: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        """Open the index of a shard: how many bytes the tar had then, and the rows, some at a time.

        Raises:
            ValueError: it is missing, damaged, or of another version; also while the rows are read.
        """
        tar = Path(self.tars[number])
        if self.remote is not None:
            return _fetched_index(self.remote, tar)

        assert self.folder is not None
        try:
            return open_index(index_path(self.folder / tar), self.folder / tar)
        except ValueError as error:
            raise ValueError(f"{error}{self.suspect(number)}") from None

    def check_size(self, number: int, tar_bytes: int) -> None:
        """Check that a tar is as long as its index says.

        Raises:
            UsageError: it is not; reads would go to the wrong bytes.
        """
        if (size := self.sizes[number]) not in (None, UNKNOWN, tar_bytes):
            raise UsageError(
                f"{FLAG}: {self.named(number)} has {size} bytes, its index says {tar_bytes}: it is cut or changed"
                f"{self.suspect(number)}; delete it and run its oscar-extract command again, or go on without: "
                "--skip-corrupt"
            )

    def suspect(self, number: int) -> str:
        """Return `suspect` of a shard; "" if it lies behind a URL."""
        return "" if self.folder is None else suspect(self.folder / self.tars[number])

    def answers(self) -> bool:
        """Whether a server still answers: then a tar that cannot be fetched is itself at fault."""
        assert self.remote is not None
        try:
            return bool(self.remote.read(FILE, MANIFEST_LIMIT))
        except RemoteError:
            return False


def open_source(place: str, skip_corrupt: bool, flag: str = FLAG) -> Source:
    """Look at a folder of shards that a flag names; with `skip_corrupt`, some may be missing.

    Raises:
        UsageError: it is missing, empty, unfinished, of a form that is refused, or cannot be reached.
    """
    folder = local_path(place)
    source = _remote(place, flag) if folder is None else _local(place, folder, flag)
    num_whole = sum(size is not None for size in source.sizes)
    if num_whole != source.manifest.plan.num_shards and not (skip_corrupt and source.tars):
        raise UsageError(
            f"{flag} {place}: {num_whole} of {source.manifest.plan.num_shards} shards are there; run its oscar-extract "
            "command again, or go on without the others: --skip-corrupt"
        )

    return source


def manifest_sha256(source: Source) -> str:
    """Return the SHA-256 of a folder's manifest, which names its shards."""
    if source.folder is not None:
        return sha256((source.folder / FILE).read_bytes()).hexdigest()
    assert source.remote is not None
    return sha256(source.remote.read(FILE, MANIFEST_LIMIT)).hexdigest()


def check_together(sources: list[Source]) -> None:
    """Check that the features of all sources are of one kind.

    Raises:
        UsageError: they are of different detectors, whose features mean different things.
    """
    first = sources[0]
    for other in sources[1:]:
        for name in ("feature_dim", "weights_sha256", "preset"):
            one, two = (getattr(source.manifest.detector, name) for source in (first, other))
            if one != two:
                raise UsageError(
                    f"{FLAG} {other.place}: its detector has {name} {two!r}, that of {first.place} {one!r}; features "
                    "of different detectors cannot be mixed: extract both with the same one"
                )


def suspect(tar: Path) -> str:
    """Return what is wrong with a tar or refused in it, as the end of a message about it; "" if nothing is found."""
    try:
        with Window(tar) as window:
            faults = (f"{entry.key}: {entry.faults[0]}" for entry in entries(window, members(window)) if entry.faults)
            fault = next(faults, "")
    except ValueError as error:
        fault = str(error)
    except OSError:
        fault = ""

    return f" ({fault})" if fault else ""


def _local(place: str, folder: Path, flag: str) -> Source:
    if not folder.is_dir():
        reason = "a file; give its folder" if folder.exists() else "no such folder; give one made by oscar-extract"
        raise UsageError(f"{flag} {folder}: {reason}")

    manifest = read_manifest(folder, flag)
    stats = {path.name: path.stat() for path in folder.iterdir() if path.suffix in (".tar", ".parquet")}
    tars = manifest.tar_names(stats)
    stamps = [stats.get(index_path(Path(tar)).name) for tar in tars]

    return Source(
        place=place,
        manifest=manifest,
        tars=tars,
        sizes=[stats[tar].st_size if tar in stats else None for tar in tars],
        stamp=_stamp(manifest, tars, [(s.st_size, s.st_mtime_ns) if s else None for s in stamps]),
        folder=folder,
    )


def _remote(place: str, flag: str) -> Source:
    remote = open_remote(place, flag)
    try:
        manifest = remote.parsed(FILE, MANIFEST_LIMIT, lambda content: parse_manifest(content, remote.at(FILE)))
    except Gone as error:
        raise UsageError(
            f"{flag} {remote.url}: no {FILE} there ({error.cause}); give the URL of a folder made by oscar-extract"
        ) from None

    listing = _listed(remote, manifest)
    tars = manifest.tar_names(listing)
    return Source(
        place=remote.url,
        manifest=manifest,
        tars=tars,
        sizes=[_size(listing.get(tar)) for tar in tars],
        stamp=_stamp(manifest, tars, [listing.get(index_path(Path(tar)).name) for tar in tars]),
        remote=remote,
    )


def _fetched_index(remote: RemoteFolder, tar: Path) -> tuple[int, Iterator[pa.RecordBatch]]:
    """Read all of an index, to see whether it came as it should."""

    def parse(content: bytes) -> tuple[int, list[pa.RecordBatch]]:
        tar_bytes, rows = open_index(pa.py_buffer(content), tar)
        if tar_bytes < 0:
            raise ValueError(f"its index {index_path(tar).name} does not say how long it is; run: oscar-shards index")
        return tar_bytes, list(rows)

    try:
        tar_bytes, rows = remote.parsed(index_path(tar).name, INDEX_LIMIT, parse)
    except Gone:
        raise ValueError(f"it has no index {index_path(tar).name}; make it: oscar-shards index") from None

    return tar_bytes, iter(rows)


def _listed(remote: RemoteFolder, manifest: Manifest) -> dict[str, Stamp]:
    """Return the files of a folder; web servers often have no listing, or one without sizes, but answer for a name."""
    try:
        listing = remote.listing()
    except Gone:
        listing = {}

    if not manifest.tar_names(listing):
        if not manifest.name:
            raise UsageError(f"{FLAG} {remote.url}: it cannot be listed, and its {FILE} does not name the shards")

        listing = {
            name: Stamp(None, "")
            for number in range(manifest.plan.num_shards)
            for name in (f"{manifest.name}-{number:06d}.tar", f"{manifest.name}-{number:06d}.parquet")
        }

    unknown = [n for n, stamp in listing.items() if n.endswith(".parquet") and stamp == Stamp(None, "")]
    with ThreadPoolExecutor(ASKERS) as askers:
        answers = dict(zip(unknown, askers.map(lambda name: _asked(remote, name), unknown), strict=True))

    return {name: stamp for name, stamp in {**listing, **answers}.items() if stamp is not None}


def _asked(remote: RemoteFolder, name: str) -> Stamp | None:
    try:
        return remote.stamp(name)
    except Gone:
        return None


def _size(stamp: Stamp | None) -> int | None:
    if stamp is None:
        return None
    return UNKNOWN if stamp.size is None else stamp.size


def _stamp(manifest: Manifest, tars: list[str], stamps: list[Any]) -> str:
    return digest((manifest, tars, stamps))
