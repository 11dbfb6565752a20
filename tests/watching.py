"""How much a folder holds, looked at all the time."""

import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def scan(folder: Path) -> dict[tuple[str, int], tuple[int, int]]:
    """The bytes that `ls` and `du` see of each file, by name and inode."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if stat.S_ISREG((at := path.lstat()).st_mode):
                found[path.name, at.st_ino] = at.st_size, at.st_blocks * 512
    return found


def taken(folder: Path) -> int:
    """The bytes of all files that were there at one instant, as `ls` or `du` sees them, whichever is more.

    A file may go and another come while the folder is read. Two readings that say the same show what was there between
    them.
    """
    found, again = scan(folder), scan(folder)
    while found != again:
        found, again = again, scan(folder)
    return max(sum(size for size, _ in found.values()), sum(size for _, size in found.values()))


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Look at the size of a folder for as long as the block runs."""
    sizes: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            sizes.append(taken(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()
