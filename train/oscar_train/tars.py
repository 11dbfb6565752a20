"""The tars of a corpus, opened for reading: local ones stay open, those behind a URL are fetched into the cache."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from xxhash import xxh3_64

from oscar_common.errors import OperationError
from oscar_shards.cache import ShardCache
from oscar_shards.index import PLACES, places
from oscar_shards.manifest import FILE
from oscar_shards.retries import RemoteError, retried
from oscar_shards.samples import Span, entries
from oscar_shards.tar import TarFault, Window, members
from oscar_train.collection import FLOAT16
from oscar_train.corpus import Corpus
from oscar_train.sources import MANIFEST_LIMIT, Source

OPEN = 256  # local tars that stay open


class Lost(OperationError):
    """A tar that is gone, or not what its index says: what `--skip-corrupt` is for. Networks that fail are not."""


class Corrupt(RemoteError):
    """What was fetched is not what the index says; another try may help."""


class _Handle:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Tars:
    """Opens tars by their number in a corpus. `cache` is needed for those behind a URL alone."""

    def __init__(self, corpus: Corpus, cache: ShardCache | None) -> None:
        self.corpus, self.cache = corpus, cache
        self._opened = lru_cache(maxsize=OPEN)(_Handle)
        self._lost: dict[int, str] = {}

    @contextmanager
    def open(self, shard: int) -> Iterator[int]:
        """Yield a handle to read a tar with.

        Raises:
            Lost: there is no such tar, or it was damaged each time it was fetched.
            OperationError: it could not be fetched.
        """
        source, number = self.corpus.place(shard)
        if source.folder is not None:
            try:
                handle = self._opened(source.folder / source.tars[number])
            except FileNotFoundError as error:
                raise Lost(f"its tar cannot be read: {error.strerror}") from None
            yield handle.number
            return
        if shard in self._lost:
            raise Lost(self._lost[shard])
        assert self.cache is not None
        try:
            held = self.cache.hold(*self._wanted(shard))
        except Lost as error:
            self._lost[shard] = error.message
            raise
        with held:
            yield held.fd

    def renew(self, shard: int) -> bool:
        """Throw away the copy of a tar that proved damaged, so that it is fetched again; False if there is none."""
        if self.corpus.place(shard)[0].folder is not None or shard in self._lost:
            return False
        assert self.cache is not None
        self.cache.drop(self._name(shard))
        return True

    def ahead(self, shard: int, keep: Collection[int]) -> bool:
        """Fetch a tar that will be needed; False if there is no room without the tars `keep`.

        Raises:
            OperationError: it could not be fetched.
        """
        if self.corpus.place(shard)[0].folder is not None or shard in self._lost:
            return True
        assert self.cache is not None
        return self.cache.ahead(*self._wanted(shard), keep={self._name(other) for other in keep})

    def _name(self, shard: int) -> str:
        """Return a name in the cache, which stands for the content: the same shard from another URL is the same."""
        source, number = self.corpus.place(shard)
        content = xxh3_64(self.corpus.tar_bytes[shard].tobytes())
        for hashes in (self.corpus.images.frame_xxh3, self.corpus.images.features_xxh3):
            content.update(np.ascontiguousarray(hashes[self._images(shard)]).data)
        return f"{content.hexdigest()}-{source.tars[number]}"

    def _images(self, shard: int) -> slice:
        return slice(*self.corpus.shard_images[shard : shard + 2].tolist())

    def _wanted(self, shard: int) -> tuple[str, int, Callable[[Path], None]]:
        """Return name, size, and how to fetch a tar."""
        source, number = self.corpus.place(shard)
        size = int(self.corpus.tar_bytes[shard])

        def attempt(path: Path) -> None:
            assert source.remote is not None
            source.remote.download(source.tars[number], path, size)
            if fault := self._fault(path, shard):
                raise Corrupt(source.named(number), f"{fault}: not what the index says")

        def fetch(path: Path) -> None:
            try:
                retried(lambda: attempt(path), source.named(number))
            except RemoteError as error:
                if not _answers(source):
                    raise
                raise Lost(error.cause) from None

        return self._name(shard), size, fetch

    def _fault(self, path: Path, shard: int) -> str | None:
        """Read all bytes of a tar; say what is not as the index says, or refused."""
        expected = self._expected(shard)
        try:
            with Window(path) as window:
                for entry in entries(window, members(window)):
                    if entry.faults:
                        return f"{entry.key}: {entry.faults[0]}"

                    def xxh3(span: Span) -> int:
                        return window.xxh3((span.begin, span.end))

                    found = places(entry, window.xxh3(*entry.frame()), xxh3)
                    if expected.pop(entry.begin, None) not in (None, _comparable(found)):
                        return f"image {entry.key} is damaged"
        except TarFault as error:
            return str(error)
        return f"{len(expected)} of its images are not there" if expected else None

    def _expected(self, shard: int) -> dict[int, tuple[int, ...]]:
        """Return what the index says of the images of a shard, by the offset of their sample."""
        rows = zip(*(getattr(self.corpus.images, n)[self._images(shard)].tolist() for n in _COMPARED), strict=True)
        return {row[_COMPARED.index("sample_offset")]: row for row in rows}


_COMPARED = [name for name in PLACES.names if name.partition("_")[2] != "bytes" or name == "sample_bytes"]


def _comparable(found: tuple[int | None, ...]) -> tuple[int, ...]:
    """Return places as a corpus has them: null offsets are FLOAT16, other nulls 0, and arrays have no length."""
    named = dict(zip(PLACES.names, found, strict=True))
    return tuple((FLOAT16 if name == "scales_offset" else 0) if (v := named[name]) is None else v for name in _COMPARED)


def _answers(source: Source) -> bool:
    """Whether a server still answers: then a tar that cannot be fetched is itself at fault."""
    assert source.remote is not None
    try:
        return bool(source.remote.read(FILE, MANIFEST_LIMIT))
    except RemoteError:
        return False
