"""SIGTERM and SIGUSR1, by which schedulers announce a time limit or a preemption: what is in work is given back."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from oscar_common.errors import Stopped
from oscar_common.signals import handled

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """What happens when one of SIGNALS arrives: `first` is called, then Stopped ends what is going on."""

    def __init__(self) -> None:
        self.first: list[Callable[[], None]] = []
        self._cause: signal.Signals | None = None
        self._is_deferred = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch for signals as long as the block lasts."""
        with handled(SIGNALS, self._note):
            yield

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Have a signal wait for the end of the block: for what takes an instant and must not be cut in two.

        Raises:
            Stopped: at the end, if one has arrived.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self._end()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._cause = signal.Signals(number)
        if not self._is_deferred:
            self._end()

    def _end(self) -> None:
        if self._cause is None:
            return
        for action in self.first:
            action()
        cause, self._cause = self._cause, None
        raise Stopped("before all was done; the same command again continues", cause)


STOP = Stop()  # there is one of each signal in a process
