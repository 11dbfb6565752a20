"""Signals that end a run early: SIGTERM and SIGUSR1 of schedulers, SIGINT of people."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from oscar_common.errors import Stopped
from oscar_common.signals import handled

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """What has arrived. Outside `deferred`, a signal ends what is going on at once, by an exception."""

    def __init__(self) -> None:
        # So many Ctrl-C end a run at once; torchrun passes each one on that the terminal has sent to all
        self._impatient = 2 if int(os.environ.get("WORLD_SIZE", 1)) == 1 else 3
        self._arrived: list[signal.Signals] = []
        self._defers = False

    @property
    def cause(self) -> signal.Signals | None:
        """The first signal that arrived, if any."""
        return self._arrived[0] if self._arrived else None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals, for the loop to see between two steps."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal in."""
        self._arrived.append(signal.Signals(number))
        if not self._defers:
            raise Stopped("before the first step; the same command again continues", self._arrived[0])
        if self._arrived.count(signal.SIGINT) >= self._impatient:
            raise Stopped("at once; the same command again continues from the last checkpoint", self._arrived[0])


@contextmanager
def watched_signals() -> Iterator[Stop]:
    """Watch for signals as long as the block lasts."""
    stop = Stop()
    with handled(SIGNALS, stop.note):
        yield stop
