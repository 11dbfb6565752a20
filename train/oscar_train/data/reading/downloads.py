"""Downloads under way: each in a thread that nobody has to wait for, shared by all who need what it brings.

A thread that waits for a server cannot be stopped; who waits for that thread can. So closing a stream takes no time,
several readers of one tar are one download with one outcome, and people hear what a batch waits for.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from oscar_common.errors import OperationError
from oscar_shards.cache import Held

PATIENCE = 3.0  # seconds of waiting of which nothing is said
SILENCE = 10.0  # seconds between two lines about waiting


class Stopped(OperationError):
    """Nobody wants it any more."""


@dataclass
class Fetch:
    """A tar on its way. `held` keeps it in the cache until all who wait have opened it."""

    waiting: int = 0
    over: bool = False
    held: Held | None = None
    error: BaseException | None = None

    def let_go(self) -> None:
        """Leave the tar to the cache, if nobody waits for it."""
        if self.over and not self.waiting and self.held is not None:
            self.held.close()


class Fetches:
    """What is being fetched, by number.

    A reader with threads of its own works inside `reading`, and calls `stop` before it joins them, so that none of them
    keeps waiting for a server. A call outside `reading` is never stopped.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: dict[int, Fetch] = {}
        self._readers = 0
        self._stopped = False
        self._said = -SILENCE

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count a reader while the block lasts."""
        with self._changed:
            self._readers, self._stopped = self._readers + 1, False

        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._stopped = self._stopped and self._readers > 0

    def stop(self) -> None:
        """Raise Stopped in all waiting threads until the reader's block ends, unless another reader is active."""
        with self._changed:
            self._stopped = self._readers <= 1
            self._changed.notify_all()

    def check(self, number: int) -> None:
        """Raise Stopped if nobody needs the tar any more."""
        fetch = self._under_way.get(number)
        if self._stopped or not (self._readers or (fetch and fetch.waiting)):
            raise Stopped("nobody waits for it any more")

    @contextmanager
    def fetched(self, number: int, work: Callable[[], Held], name: str) -> Iterator[None]:
        """Wait until `work` is done, by a thread of its own or by whom it was begun; `name` is what messages call it.

        What it brought is not evicted in the block. It may not be there all the same: then `fetched` is to be used
        again.

        Raises:
            Stopped: nobody wants it any more.
            Exception: what `work` raised, to all who wait.
        """
        with self._changed:
            fetch = self._under_way.get(number)
            if fetch is None:
                fetch = self._under_way[number] = Fetch()
                threading.Thread(target=self._run, args=(number, fetch, work), name="fetch", daemon=True).start()
            fetch.waiting += 1

        try:
            self._wait(fetch, name)
            yield
        finally:
            with self._changed:
                fetch.waiting -= 1
                fetch.let_go()

    def ahead(self, number: int, work: Callable[[], bool]) -> bool:
        """Do `work`, and return what it does, unless it is under way: then True. Who comes meanwhile waits for it.

        Raises:
            Exception: what `work` raised.
        """
        with self._changed:
            if number in self._under_way:
                return True
            fetch = self._under_way[number] = Fetch()

        done = True

        def noted() -> None:
            nonlocal done
            done = work()

        self._run(number, fetch, noted)
        if fetch.error is not None:
            raise fetch.error

        return done

    def _run(self, number: int, fetch: Fetch, work: Callable[[], Held | None]) -> None:
        try:
            fetch.held = work()
        except BaseException as error:  # for those who wait
            fetch.error = error

        with self._changed:
            fetch.over = True
            del self._under_way[number]
            fetch.let_go()
            self._changed.notify_all()

    def _wait(self, fetch: Fetch, name: str) -> None:
        began = time.monotonic()
        with self._changed:
            while not self._changed.wait_for(lambda: fetch.over or self._stopped, PATIENCE):
                self._say(name, began)
            if not fetch.over:
                raise Stopped("nobody waits for it any more")
            if fetch.error is not None and not (isinstance(fetch.error, Stopped) and not self._stopped):
                raise fetch.error

    def _say(self, name: str, began: float) -> None:
        now = time.monotonic()
        if now - self._said >= SILENCE:
            self._said = now
            print(f"waiting for {name} ({now - began:.0f} s so far)", file=sys.stderr, flush=True)
