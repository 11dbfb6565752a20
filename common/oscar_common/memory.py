"""How much memory there is to fill, and how a lack of it shows."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60  # what cgroups of version 1 have for no limit is a little less than 2^63
LACKS = ("DefaultCPUAllocator", "bad_alloc", "can't allocate memory", "out of memory", "can't start new thread")


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is lacking: Python's, the system's, or a GPU's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LACKS)


def free_memory(processes: int = 1) -> int:
    """Return the bytes of memory that this process may still fill.

    That is what is free on this machine and in each control group (cgroup) that this process belongs to, shared with
    the others of `processes`; and within its own limit of address space (`ulimit -v`).
    """
    import psutil

    shared = min(
        [psutil.virtual_memory().available, *_free_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    )
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    alone = UNLIMITED if soft_limit == resource.RLIM_INFINITY else soft_limit - psutil.Process().memory_info().vms

    return int(max(0, min(shared // processes, alone)))


def neighbours() -> int:
    """Return how many processes of torchrun share this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _free_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """Yield what each control group of a process still allows, of version 2 or 1; its parents' limits count, too."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if "memory" not in (controllers or "memory").split(","):
            continue

        top = root / "memory" if controllers else root
        place = top / name.strip("/")
        for folder in [place, *place.parents]:
            if folder.is_relative_to(top):
                yield from _free_in(folder)


def _free_in(folder: Path) -> Iterator[int]:
    """Yield what a group still allows, if it has a limit. Cached files may be dropped, so they count as free."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue

        if most < UNLIMITED:
            yield most - used + int(stat.get(cached, 0))
