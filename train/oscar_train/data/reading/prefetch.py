"""Tars behind a URL, fetched before they are needed, as far ahead as the cache has room."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from oscar_common.errors import OperationError
from oscar_train.data.reading.tars import Tars

FETCHERS = 4  # tars fetched at once by a process; the processes of a machine fetch different ones
PAUSE = 1.0  # seconds until a full cache is looked at again
REST = 30.0  # seconds until a tar that could not be fetched is asked for again


class Ahead:
    """Threads that fetch what `want` names, in a block of `Tars.reading`.

    A tar that cannot be fetched is left to the one who reads it.
    """

    def __init__(self, tars: Tars) -> None:
        self._tars = tars
        self._wanted: Sequence[int] = ()
        self._next = 0  # the first of them that nobody has looked at
        self._failed: dict[int, float] = {}  # when
        self._changed = threading.Condition()
        self._over = False

    def want(self, shards: Sequence[int]) -> None:
        """Say which tars are needed now and next, in that order; what was said before is forgotten."""
        with self._changed:
            self._wanted, self._next = shards, 0
            self._changed.notify_all()

    def __enter__(self) -> "Ahead":
        for _ in range(FETCHERS):
            threading.Thread(target=self._work, name="ahead", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tars.stop()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (job_and_number := self._take()) is not None:
            job, n = job_and_number
            if not self._fetch(job, n):
                self._put_back(job, n)

    def _take(self) -> tuple[Sequence[int], int] | None:
        """Wait for the next tar to look at; None if it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._next < len(self._wanted))
            self._next += 1
            return None if self._over else (self._wanted, self._next - 1)

    def _put_back(self, shards: Sequence[int], n: int) -> None:
        """Let a tar that there was no room for be looked at again a little later."""
        with self._changed:
            if shards is self._wanted:
                self._next = min(self._next, n)
                self._changed.wait(PAUSE)

    def _fetch(self, shards: Sequence[int], n: int) -> bool:
        """Fetch a tar; False if there is no room for it beside those that are needed before."""
        if time.monotonic() - self._failed.get(shards[n], -REST) < REST:
            return True

        try:
            return self._tars.ahead(shards[n], shards[: n + 1])
        except (OperationError, OSError):
            self._failed[shards[n]] = time.monotonic()
            return True


@contextmanager
def fetching(tars: Tars, shards: Sequence[int]) -> Iterator[None]:
    """Fetch tars that are needed in this order while the block lasts; nothing if they lie here."""
    if tars.cache is None:
        yield
        return
    with tars.reading(), Ahead(tars) as ahead:
        ahead.want(shards)
        yield
