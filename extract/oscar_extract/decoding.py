"""Threads that decode ahead of the detector, and what becomes of an image that hangs or kills its decoder.

Which images are being decoded stands in a journal file beside the shard. It outlives a kill: whoever does the shard
again decodes these images in processes of their own, so that an image that brings the decoder down does so once.
"""

import os
import queue
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from oscar_common.files import TEMPORARY

SLOT = struct.Struct("<q")
LONGEST = 1 << 16  # bytes of a journal that are read
POLL = 1.0  # seconds


class Journal:
    """The file of one shard that says which of its images are being decoded, and which were when a worker died."""

    def __init__(self, handle: int) -> None:
        content = os.pread(handle, LONGEST, 0)
        numbers = [SLOT.unpack_from(content, at)[0] - 1 for at in range(0, len(content) - SLOT.size + 1, SLOT.size)]
        self.suspects = frozenset(n for n in numbers if n >= 0)
        self._handle: int | None = handle
        self._lock = threading.Lock()
        # They stay there: two images that kill their decoder would bring each other back, again and again.
        self._first = len(self.suspects) * SLOT.size
        os.pwrite(handle, b"".join(SLOT.pack(n + 1) for n in sorted(self.suspects)), 0)
        os.ftruncate(handle, self._first)

    def note(self, slot: int, number: int | None) -> None:
        """Write that a thread decodes an image, or none; on a full disk, do without."""
        with self._lock, suppress(OSError):
            if self._handle is not None:
                os.pwrite(self._handle, SLOT.pack(0 if number is None else number + 1), self._first + slot * SLOT.size)

    def close(self) -> None:
        """Write nothing more: a thread that was left behind may still try."""
        with self._lock:
            self._handle = None


@contextmanager
def journal(tar: Path) -> Iterator[Journal]:
    """Keep a journal of a shard while the block runs; what an earlier one says of its owner's end is in it.

    It is a new file that takes the earlier one's name, so that an owner that comes back writes into none of others.
    """
    path = tar.with_name(TEMPORARY + tar.with_suffix(".decoding").name)
    private_path = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    handle = os.open(private_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    with suppress(FileNotFoundError), path.open("rb") as earlier:
        os.pwrite(handle, earlier.read(LONGEST), 0)

    record = Journal(handle)
    private_path.replace(path)
    try:
        yield record
    finally:  # a process that comes here has been killed by no image
        record.close()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                path.unlink()
        os.close(handle)


@dataclass(eq=False, kw_only=True)
class Task:
    """An image to decode."""

    number: int
    future: "Future[Any]" = field(default_factory=Future)
    began: float | None = None
    abandoned: bool = False


class Decoders:
    """Threads that decode images. One whose image hangs is left behind and replaced; none keeps a process alive."""

    def __init__(self, work: Callable[[int], Any], count: int, timeout: float, record: Journal) -> None:
        self.work, self.timeout, self.record = work, timeout, record
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.threads = 0
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        threading.Thread(target=self._run, args=(self.threads,), daemon=True).start()
        self.threads += 1

    def _run(self, slot: int) -> None:
        while (task := self.tasks.get()) is not None:
            task.began = time.monotonic()
            self.record.note(slot, task.number)
            try:
                task.future.set_result(self.work(task.number))
            except BaseException as error:
                task.future.set_exception(error)

            self.record.note(slot, None)
            if task.abandoned:
                return

    def map(self, numbers: Sequence[int], ahead: int) -> Iterator[Any]:
        """Yield `work` of each number in turn, at most `ahead` early, and None for one that takes too long."""
        remaining = iter(numbers)
        pending: deque[Task] = deque()
        try:
            while True:
                for number in islice(remaining, ahead - len(pending)):
                    pending.append(Task(number=number))
                    self.tasks.put(pending[-1])
                if not pending:
                    return
                yield self._wait(pending.popleft())
        finally:
            for _ in range(self.threads):
                self.tasks.put(None)

    def _wait(self, task: Task) -> Any:
        while True:
            seconds = POLL if task.began is None else task.began + self.timeout - time.monotonic()
            try:
                return task.future.result(max(0.0, seconds))
            except WaitedTooLong:
                if task.future.done():  # in the meantime, or it was the work that timed out
                    return task.future.result()
                if task.began is not None and time.monotonic() >= task.began + self.timeout:
                    task.abandoned = True
                    self._start()
                    return None
