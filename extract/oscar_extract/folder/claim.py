"""A claim: a small file that says which process works on a shard.

`_claims/000042.3` is the third claim on shard 42. Whoever takes a shard over makes the file of the next number, which
only one process can (see `take.py`), so the highest number says whose the shard is. Its owner writes a count into it
now and then; others see by it, and by their own clocks alone, that the owner lives.
"""

import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from oscar_common.config import parse
from oscar_common.errors import UsageError
from oscar_common.files import TEMPORARY

FOLDER = "_claims"
PREPARED = f"{TEMPORARY}job-"  # begins the name of the folder in which a process writes plan and settings
NAME = re.compile(r"(\d{6,})\.(\d+)")  # shard and number of a claim
PLACE = re.compile(rf"{re.escape(TEMPORARY)}[\w.-]+")  # a folder beside the shards, and no other path
LENGTH = 1024  # bytes of the file: it is changed in place, and so never seen half-written
WORKING, SEALED, GIVEN_BACK = "working", "sealed", "given back"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process, as others on any node tell it from all others.

    machine: the running kernel and its namespace of process ids, as one text; empty where that is not known.
    started: when it began, in the kernel's clock ticks.
    """

    host: str
    pid: int
    machine: str
    started: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The content of a claim file.

    state: WORKING; SEALED: the shard's files are whole in the folder `place` and only lack their final names;
        GIVEN_BACK: anybody may take the shard.
    since: when the shard was taken, in seconds since 1970 by the owner's clock. For people: clocks differ.
    deaths: how many owners of the shard died before this one.
    has_rejects: whether a file of rejects is among the files in `place`; of a sealed one.
    token: of this claim alone.
    beat: is higher each time that the owner says it is alive.
    """

    owner: Process
    place: str
    since: float
    deaths: int = 0
    has_rejects: bool = False
    state: str = WORKING
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    beat: int = 0


def claim_path(out: Path, shard: int, number: int) -> Path:
    """Return the file of a claim."""
    return out / FOLDER / f"{shard:06d}.{number}"


def claim_numbers(out: Path) -> dict[int, int]:
    """Return the number of the newest claim on each shard that has one."""
    newest: dict[int, int] = {}
    with suppress(FileNotFoundError):
        for name in os.listdir(out / FOLDER):
            if (match := NAME.fullmatch(name)) is not None:
                shard, number = int(match[1]), int(match[2])
                newest[shard] = max(number, newest.get(shard, 0))

    return newest


def as_bytes(claim: Claim) -> bytes:
    """Return a claim as the content of its file, of LENGTH bytes."""
    return json.dumps(asdict(claim)).encode().ljust(LENGTH)


def read_bytes(path: Path) -> bytes:
    """Return the content of a claim's file; nothing if it is gone."""
    with suppress(FileNotFoundError), path.open("rb") as file:  # opening is what makes NFS ask the server
        return file.read(LENGTH)
    return b""


def parse_claim(content: bytes) -> Claim | None:
    """Return the claim that a file holds, or None if it is gone or holds none."""
    try:
        claim = parse(Claim, json.loads(content), "")
    except (ValueError, RecursionError, UsageError):
        return None
    return claim if PLACE.fullmatch(claim.place) else None


def private_name(tar: Path) -> str:
    """Return a name for the folder in which one owner of a shard writes its files."""
    return f"{TEMPORARY}{tar.stem}.{secrets.token_hex(8)}"


def this_process() -> Process:
    """Return what others may know of this process."""
    return Process(host=socket.gethostname(), pid=os.getpid(), machine=_machine(), started=_start_of(os.getpid()) or 0)


def is_gone(process: Process, here: Process) -> bool:
    """Whether it is known at once that a process has ended, as it ran on the machine of this one, `here`."""
    if not here.machine or process.machine != here.machine:
        return False

    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False

    started = _start_of(process.pid)
    return started is not None and started != process.started


def _machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _start_of(pid: int) -> int | None:
    """Return when a process began, in clock ticks, -1 if it has ended but is still listed, or None if it is hidden."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if status[0] in "ZX" else int(status[19])


def now() -> float:
    """Return the time for people."""
    return time.time()
