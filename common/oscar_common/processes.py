"""The same function on many things, in several processes of this machine."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from oscar_common.errors import OperationError

T = TypeVar("T")
R = TypeVar("R")
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def each(function: Callable[[T], R], things: Sequence[T], workers: int | None = None) -> Iterator[tuple[T, R]]:
    """Yield each thing with what the function makes of it, as they are ready, from so many processes (default: cores).

    One process is this one. The function and what it takes and returns must be picklable.

    Raises:
        OperationError: a process was killed. What the function itself raises comes through.
    """
    count = min(workers or len(os.sched_getaffinity(0)), len(things))
    if count <= 1:
        yield from ((thing, function(thing)) for thing in things)
        return

    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin)
    try:
        waiting = {pool.submit(function, thing): thing for thing in things}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool:
        raise OperationError("a worker process was killed (out of memory?); fewer need less: --workers 1") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Leave Ctrl-C to the parent, and end with it: what is left of a killed one must not write any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
