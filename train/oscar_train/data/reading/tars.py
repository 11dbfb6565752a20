"""The tars of a corpus, opened for reading: local ones stay open, those behind a URL are fetched into the cache."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from xxhash import xxh3_64

from oscar_common.errors import OperationError, UsageError
from oscar_common.progress import warn
from oscar_shards.cache import Held, ShardCache, cost, gigabytes
from oscar_shards.index import PLACES, places
from oscar_shards.retries import RemoteError, retried
from oscar_shards.samples import Span, entries
from oscar_shards.tar import TarFault, Window, members
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.downloads import Fetches
from oscar_train.data.texts.collection import FLOAT16, UNREADABLE

OPEN = 256  # local tars that stay open


class Lost(OperationError):
    """A tar that is gone, or not what its index says: what `--skip-corrupt` is for. Networks that fail are not."""


class Corrupt(RemoteError):
    """What was fetched is not what the index says; another try may help."""


class _Handle:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Tars:
    """Opens tars by their number in a corpus. `cache` is needed for those behind a URL alone.

    Raises:
        UsageError: the cache is smaller than one of them.
    """

    def __init__(self, corpus: Corpus, cache: ShardCache | None) -> None:
        self.corpus, self.cache = corpus, cache
        self._places = [corpus.place(shard) for shard in range(len(corpus.tar_bytes))]
        self._opened = lru_cache(maxsize=OPEN)(_Handle)
        self._name = lru_cache(maxsize=None)(self._make_name)
        self._fetches = Fetches()
        self._lost: dict[int, str] = {}
        self._sound: dict[int, int] = {}  # which copies were doubted and found sound, by inode
        self._doubting = threading.Lock()
        if cache is not None:
            check_largest(corpus, cache)

    def reading(self) -> AbstractContextManager[None]:
        """Return the context in which batches are read by other threads; they are gone when it ends."""
        return self._fetches.reading()

    def stop(self) -> None:
        """Have these threads wait for nothing any more; see `Fetches`."""
        self._fetches.stop()

    @contextmanager
    def open(self, shard: int) -> Iterator[int]:
        """Yield a handle to read a tar with.

        Raises:
            Lost: there is no such tar, or it was damaged each time it was fetched.
            OperationError: it could not be fetched.
        """
        source, number = self._places[shard]
        if source.folder is not None:
            try:
                handle = self._opened(f"{source.folder}/{source.tars[number]}")
            except FileNotFoundError as error:
                raise Lost(f"its tar cannot be read: {error.strerror}") from None
            yield handle.number
            return

        with self._hold(shard) as held:
            yield held.fd

    def renew(self, shard: int) -> bool:
        """Throw away the copy of a tar that proves damaged; False if reading it again is of no use."""
        if self.corpus.place(shard)[0].folder is not None or shard in self._lost:
            return False

        assert self.cache is not None
        with self._doubting:  # one after the other, not to throw away what another has just renewed
            held = self.cache.open(self._name(shard), int(self.corpus.tar_bytes[shard]))
            if held is None:
                return True

            with held:
                copy = os.fstat(held.fd).st_ino
                if self._sound.get(shard) == copy:  # then the index is at fault
                    return False

                if fault := self._fault(Path(held.file.name), shard):
                    warn(
                        f"{self.corpus.shard_name(shard)}: its copy in --cache is damaged ({fault}); fetching it again"
                    )
                    self.cache.drop(self._name(shard), held)
                else:
                    self._sound[shard] = copy

        return True

    def ahead(self, shard: int, keep: Iterable[int]) -> bool:
        """Fetch a tar that will be needed; False if there is no room without the tars `keep`.

        Raises:
            OperationError: it could not be fetched.
        """
        size = int(self.corpus.tar_bytes[shard])
        unused = self.corpus.shard_triples[shard] == self.corpus.shard_triples[shard + 1]
        if self.corpus.place(shard)[0].folder is not None or shard in self._lost or unused or size < 0:
            return True

        assert self.cache is not None
        name, cache = self._name(shard), self.cache
        if (held := cache.open(name, size)) is not None:
            held.close()
            return True

        kept_names = {self._name(other) for other in keep}
        return self._fetches.ahead(shard, lambda: cache.ahead(name, size, self._fetcher(shard), kept_names))

    def _hold(self, shard: int) -> Held:
        if (size := int(self.corpus.tar_bytes[shard])) < 0:
            raise Lost("its index does not say how long it is; run: oscar-shards index")

        assert self.cache is not None
        name, cache, held = self._name(shard), self.cache, None
        while held is None:
            if shard in self._lost:
                raise Lost(self._lost[shard])

            held = cache.open(name, size)
            if held is None:
                shard_name = self.corpus.shard_name(shard)
                with self._fetches.fetched(shard, lambda: cache.hold(name, size, self._fetcher(shard)), shard_name):
                    held = cache.open(name, size)

        return held

    def _make_name(self, shard: int) -> str:
        """Return a name in the cache, which stands for the content: the same shard from another URL is the same."""
        source, number = self.corpus.place(shard)
        content = xxh3_64(self.corpus.tar_bytes[shard].tobytes())
        for hashes in (self.corpus.images.frame_xxh3, self.corpus.images.features_xxh3):
            content.update(np.ascontiguousarray(hashes[self._images(shard)]).data)
        return f"{content.hexdigest()}-{source.tars[number]}"

    def _images(self, shard: int) -> slice:
        return slice(*self.corpus.shard_images[shard : shard + 2].tolist())

    def _fetcher(self, shard: int) -> Callable[[Path], None]:
        """Return what fetches a tar to a path, or raises Lost, or an OperationError if the server is at fault."""
        source, number = self.corpus.place(shard)
        remote, size = source.remote, int(self.corpus.tar_bytes[shard])
        assert remote is not None

        def attempt(path: Path) -> None:
            try:
                remote.download(source.tars[number], path, size)
            except RemoteError:
                self._fetches.check(shard)  # no further try if nobody waits
                raise

            if fault := self._fault(path, shard):
                raise Corrupt(source.named(number), fault)

        def fetch(path: Path) -> None:
            try:
                retried(lambda: attempt(path), source.named(number))
            except RemoteError as error:
                if not source.answers():
                    raise
                self._lost[shard] = error.cause
                raise Lost(error.cause) from None

        return fetch

    def _fault(self, path: Path, shard: int) -> str | None:
        """Read all bytes of a tar; say what is refused, or not as the index says."""
        expected = self._expected(shard)
        try:
            with Window(path) as window:
                for entry in entries(window, members(window)):
                    if entry.faults:
                        return f"{entry.key} in it: {entry.faults[0]}"

                    def xxh3(span: Span) -> int:
                        return window.xxh3((span.begin, span.end))

                    faults = places(entry, window.xxh3(*entry.frame()), xxh3)
                    if expected.pop(entry.begin, None) not in (None, _comparable(faults)):
                        return f"{entry.key} in it is not what the index says (checksum)"
        except TarFault as error:
            return str(error)

        return f"{len(expected)} images of the index are not in it" if expected else None

    def _expected(self, shard: int) -> dict[int, tuple[int, ...]]:
        """Return what the index says of the images of a shard, as far as it can be true, by the offset of each."""
        rows = zip(*(getattr(self.corpus.images, n)[self._images(shard)].tolist() for n in _COMPARED), strict=True)
        records = (dict(zip(_COMPARED, row, strict=True)) for row in rows)
        return {row["sample_offset"]: (*row.values(),) for row in records if row["features_offset"] != UNREADABLE}


_COMPARED = [name for name in PLACES.names if name.partition("_")[2] != "bytes" or name == "sample_bytes"]


def _comparable(found: tuple[int | None, ...]) -> tuple[int, ...]:
    """Return places as a corpus has them: null offsets are FLOAT16, other nulls 0, and arrays have no length."""
    named = dict(zip(PLACES.names, found, strict=True))
    return tuple((FLOAT16 if name == "scales_offset" else 0) if (v := named[name]) is None else v for name in _COMPARED)


def check_largest(corpus: Corpus, cache: ShardCache) -> None:
    """Check that each tar behind a URL fits the cache.

    Raises:
        UsageError: one does not.
    """
    for shard in np.argsort(corpus.tar_bytes)[::-1].tolist():
        if corpus.place(shard)[0].remote is not None:
            if (needed := cost(int(corpus.tar_bytes[shard]))) > cache.limit:
                raise UsageError(
                    f"{cache.flag}: {corpus.shard_name(shard)} takes {gigabytes(needed)} GB; give at least as much"
                )
            return


def check_window(corpus: Corpus, cache: ShardCache, window: int) -> bool:
    """Return whether the tars behind URLs that are shuffled together fit the cache; warn if they may not."""
    needed = 0
    for source, begin, end in zip(corpus.sources, corpus.source_shards, corpus.source_shards[1:], strict=False):
        if source.remote is not None:
            needed += sum(sorted(map(cost, corpus.tar_bytes[begin:end].tolist()))[-window:])

    if needed > cache.limit:
        warn(
            f"--shuffle-window {window}: the shards of a window take up to {gigabytes(needed)} GB, more than "
            f"{cache.flag}, so they will be fetched again and again; give a smaller --shuffle-window or a larger "
            "--cache-size"
        )

    return needed <= cache.limit
