"""Whole files on local disk, within a bound: fetched once for all processes of a machine, the least recently used go.

Everything in the folder's sub-folder `FOLDER` is the cache's own: it counts and may be evicted. What else lies in the
folder is left alone and not counted. State is nothing but files and locks on them (flock), which a killed process lets
go, so there is nothing to repair:

    NAME        a whole file; locked shared by each reader. Its mtime says when it was last used
    .tmp-NAME   of `size` bytes from the start; locked by the one who fetches it. Unlocked, it is a dead one's leftover
    .lock       locked for as long as it takes to count, to evict and to allocate; never during a download
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import TEMPORARY, hold, release, temporary

FOLDER = "oscar-shard-cache"  # not "shards": somebody's own could be there, and what is there is evicted
LOCK = ".lock"
BLOCK = 4096  # bytes that a file system allocates at once, as a rule
EXTENTS = 4 << 20  # bytes of a file that may take one block more, in which the file system keeps where they are
POLL = 0.02  # seconds between looks at what another process has locked
PATIENCE = 300.0  # seconds to wait until a reader lets a file go
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Held:
    """A whole file, open for reading; it is not evicted before it is closed."""

    file: FileIO

    @property
    def fd(self) -> int:
        """The handle to read from."""
        return self.file.fileno()

    def close(self) -> None:
        """Let the file go; a second time does nothing."""
        self.file.close()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _File(NamedTuple):
    path: Path
    cost: int  # bytes that it counts for
    used: int  # when last, in ns

    @property
    def whole(self) -> bool:
        return not self.path.name.startswith(TEMPORARY)


class ShardCache:
    """Files of at most `limit` bytes in all, unfinished ones too, in whole blocks as `du` counts; never more.

    It has no state of its own: many threads may use it at once, and many processes the same folder. A dropped file
    still takes space, uncounted, while a reader holds it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Use `folder` (made if absent), and free what dead processes left there.

        Raises:
            UsageError: it cannot be written, or its file system has no locks.
        """
        self.folder, self.limit = folder / FOLDER, limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._make_room(0)
        except OSError as error:
            raise UsageError(f"--cache {folder}: cannot be used: {error.strerror}; give another --cache") from None

    @property
    def flag(self) -> str:
        """What messages about the limit begin with."""
        return f"--cache-size {_decimal(self.limit)}"

    def open(self, name: str, size: int) -> Held | None:
        """Return the file of that name and size; None if it is not there. The caller closes it."""
        path = self.folder / name
        with suppress(FileNotFoundError):
            file = FileIO(path)
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())

            with suppress(FileNotFoundError):  # evicted before it was locked
                if os.path.samestat(status, path.stat()) and status.st_size == size:
                    os.utime(file.fileno())
                    return Held(file)

            file.close()

        return None

    def hold(self, name: str, size: int, fetch: Callable[[Path], None]) -> Held:
        """Return the file of that name, fetched if it is not there; the caller closes it.

        One thread of one process calls `fetch` while the others wait; if it dies or fails, the next one does.

        Args:
            name: a safe file name of this content alone.
            size: bytes of the file.
            fetch: fills the file at the path given with just `size` bytes, and sees that they are right. The file is
                there in full length, so that the space is taken: it is written in place, not truncated or replaced.

        Raises:
            OperationError: the limit is smaller than the file, or everything is in use for minutes.
            OSError: the disk is full although nothing is left to evict.
            Exception: what `fetch` raised.
        """
        self._check(name, size)
        while True:
            if held := self.open(name, size):
                return held

            handle = hold(self._unfinished(name))
            if handle is None:
                time.sleep(POLL)
            elif held := self._complete(handle, name, size, fetch, None):
                return held

    def ahead(self, name: str, size: int, fetch: Callable[[Path], None], keep: Collection[str]) -> bool:
        """Fetch a file that will be needed, if there is room without evicting those named in `keep`; see `hold`.

        It waits for nobody.

        Returns:
            Whether the file is there or on its way; if not, there was no room.
        """
        self._check(name, size)
        held = self.open(name, size)
        if held is None:
            handle = hold(self._unfinished(name))
            if handle is None:
                return True
            held = self._complete(handle, name, size, fetch, keep)

        if held is None:
            return False

        held.close()
        return True

    def drop(self, name: str, wrong: Held) -> None:
        """Throw a file away that was found to be wrong, so that it is fetched again; who reads it may go on.

        If it is another one by now, that stays.
        """
        with self._alone(), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(wrong.fd), (self.folder / name).stat()):
                (self.folder / name).unlink()

    def _check(self, name: str, size: int) -> None:
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"{name!r} is no safe file name")
        if (needed := cost(size)) > self.limit:
            raise UsageError(f"{self.flag}: {name} takes {gigabytes(needed)} GB; give at least as much")

    def _unfinished(self, name: str) -> Path:
        return temporary(self.folder / name)

    def _complete(
        self, handle: int, name: str, size: int, fetch: Callable[[Path], None], keep: Collection[str] | None
    ) -> Held | None:
        """Fetch a file through an unfinished one that is this thread's alone; None if there is no room."""
        try:
            held = self.open(name, size)  # another finished it before this thread's turn came
            with _naming(self.folder / name):
                filled = held is None and self._reserve(handle, name, size, keep)
                if filled:
                    self._fill(handle, name, size, fetch, keep or ())
        except BaseException:
            release(handle, self._unfinished(name))
            raise

        if filled:
            return self._finish(handle, name, size)

        release(handle, self._unfinished(name))
        return held

    def _reserve(self, handle: int, name: str, size: int, keep: Collection[str] | None) -> bool:
        """Allocate a file's bytes; with `keep` only if there is room now, else as soon as readers let files go."""
        deadline = time.monotonic() + PATIENCE
        while not self._allocate(handle, size, keep):
            if keep is not None:
                return False
            if time.monotonic() > deadline:
                raise OperationError(
                    f"{self.flag}: all files were in use for {PATIENCE:g} s, so that there was no room for {name} "
                    f"({gigabytes(cost(size))} GB); give a larger one"
                )

            time.sleep(POLL)

        return True

    def _allocate(self, handle: int, size: int, keep: Collection[str] | None) -> bool:
        with self._alone():
            os.ftruncate(handle, 0)  # a dead one's bytes
            if not self._make_room(cost(size), keep or ()):
                return False

            while True:
                try:
                    _preallocate(handle, size)
                    return True
                except OSError as error:  # the disk has less than the limit
                    os.ftruncate(handle, 0)
                    if error.errno in FULL and self._evict(1, keep or ()):
                        continue
                    if error.errno in FULL and keep is not None:
                        return False
                    raise

    def _fill(self, handle: int, name: str, size: int, fetch: Callable[[Path], None], keep: Collection[str]) -> None:
        try:
            fetch(self._unfinished(name))
        except OSError as error:  # only where space cannot be allocated beforehand
            with self._alone():
                freed = error.errno in FULL and self._evict(cost(size), keep)
            if not freed:
                raise
            fetch(self._unfinished(name))

        if (size_on_disk := os.fstat(handle).st_size) != size:
            raise OperationError(f"{name}: {size_on_disk:,} bytes were fetched, not {size:,}")

        os.fsync(handle)  # what has its final name is whole, after a power cut, too

    def _finish(self, handle: int, name: str, size: int) -> Held:
        with self._alone():  # so that it is not evicted between the two locks
            try:
                self._unfinished(name).replace(self.folder / name)
            finally:
                os.close(handle)
            held = self.open(name, size)

        assert held
        return held

    @contextmanager
    def _alone(self) -> Iterator[None]:
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _make_room(self, needed: int, keep: Collection[str] = ()) -> bool:
        for file in list(self._files()):
            if not file.whole and (handle := hold(file.path)) is not None:
                release(handle, file.path)  # its owner is dead
        over = sum(file.cost for file in self._files()) + needed - self.limit
        return over <= 0 or self._evict(over, keep)

    def _evict(self, least: int, keep: Collection[str]) -> bool:
        """Remove the least recently used files that nobody holds, `least` bytes of them; or none if it is less."""
        with ExitStack() as stack:
            victims: list[Path] = []
            for file in sorted(self._files(), key=lambda file: file.used):
                if least <= 0:
                    break
                if file.whole and file.path.name not in keep and (handle := hold(file.path)) is not None:
                    stack.callback(os.close, handle)
                    victims.append(file.path)
                    least -= file.cost

            if least > 0:
                return False

            for path in victims:
                path.unlink()

        return True

    def _files(self) -> Iterator[_File]:
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # unfinished ones are removed without `_alone`
                status = path.lstat()
                if path.name != LOCK and stat.S_ISREG(status.st_mode):
                    yield _File(path, max(cost(status.st_size), status.st_blocks * 512), status.st_mtime_ns)


def cost(size: int) -> int:
    """Return how many bytes of disk a file of `size` bytes takes at most."""
    return (-(-size // BLOCK) + size // EXTENTS) * BLOCK


def gigabytes(size: int) -> str:
    """Return bytes as --cache-size has them: in GB, to four digits, rounded up so that it is enough."""
    digits = 10 ** max(len(str(size)) - 4, 0)
    return _decimal(-(-size // digits) * digits)


def _decimal(size: int) -> str:
    return f"{size / 1e9:.9f}".rstrip("0").rstrip(".")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)  # "no space left" alone does not say where
        raise


def _preallocate(handle: int, size: int) -> None:
    if size == 0:
        return

    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(handle, size)  # a file system that cannot: at least its length counts
