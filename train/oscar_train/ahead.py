"""Tars behind a URL, fetched before they are needed, as far ahead as the cache has room."""

import threading
from collections.abc import Sequence
from types import TracebackType

from oscar_common.errors import OperationError
from oscar_train.tars import Tars

FETCHERS = 4  # tars fetched at once by a process; the processes of a machine fetch different ones
PAUSE = 1.0  # seconds until a full cache is looked at again


class Ahead:
    """Threads that fetch what `want` names. A tar that cannot be fetched is left to the one who reads it."""

    def __init__(self, tars: Tars) -> None:
        self._tars = tars
        self._wanted: Sequence[int] = ()
        self._failed: set[int] = set()
        self._changed = threading.Condition()
        self._over = False
        self._threads = [threading.Thread(target=self._work, name="ahead", daemon=True) for _ in range(FETCHERS)]
        for thread in self._threads:
            thread.start()

    def want(self, shards: Sequence[int]) -> None:
        """Say which tars are needed now and next, in that order; what was said before is forgotten."""
        with self._changed:
            self._wanted = shards
            self._changed.notify_all()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _work(self) -> None:
        while not self._over:
            wanted = self._wanted
            self._fetch(wanted)
            with self._changed:
                if not self._over and wanted is self._wanted:
                    self._changed.wait(PAUSE)

    def _fetch(self, wanted: Sequence[int]) -> None:
        """Go through what is wanted until there is no room for more, or something else is wanted."""
        for n, shard in enumerate(wanted):
            if self._over or wanted is not self._wanted:
                return
            if shard in self._failed:
                continue
            try:
                if not self._tars.ahead(shard, wanted[: n + 1]):
                    return
            except (OperationError, OSError):
                self._failed.add(shard)
