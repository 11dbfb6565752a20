"""kill -9 at each moment at which something is about to change on disk."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")


def is_killed(action: Callable[[], object], after: int) -> bool:
    """Run `action` in a process of its own, which kill -9 ends before one more than `after` changes; say if it did."""
    child = os.fork()
    if child == 0:
        _do(action, after)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the action failed"
    return status != 0


def _do(action: Callable[[], object], after: int) -> None:
    left = after

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES and not opens:
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    try:
        sys.addaudithook(count)
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
