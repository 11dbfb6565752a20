"""What passes between a run and its workers. It loads no torch: only those who do the work need it."""

from dataclasses import dataclass
from pathlib import Path

from oscar_common.errors import OperationError
from oscar_common.settings import Detector, Extract
from oscar_extract.plan import PlannedImage
from oscar_extract.sources.remote import Root
from oscar_shards.index import index_path
from oscar_shards.manifest import Manifest, PlanRecord
from oscar_shards.read import is_whole
from oscar_shards.write import rejects_path


class DeviceFailure(OperationError):
    """A GPU has failed; the process can do nothing more with it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker must know. `threads`: how many detect at once on a CPU, each with one core."""

    out: Path
    settings: Extract
    entry: Detector
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a worker tries before the work: some images of a plan, for about so many seconds.

    apart: whether these are decoded in processes of their own, as nothing else would tell which of them kills a worker.
    """

    plan: PlanRecord
    roots: list[Root]
    images: list[PlannedImage]
    seconds: float = 0.0
    apart: bool = True


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a worker says before the work: the manifest, and from a few images the pace, memory and bytes of one."""

    manifest: Manifest
    device: str
    images_per_second: float
    bytes_per_image: float
    memory: int


Stamp = tuple[int, int]  # of a file: its inode, and when it was changed, in nanoseconds


@dataclass(frozen=True, kw_only=True)
class OpenShard:
    """A shard that a worker may take.

    number: of the claim that it is to make on it; see oscar_extract.folder.claim.
    deaths: how many owners have died with it in hand.
    before: what its index was when the job was looked at; another one means that it was done since.
    """

    shard: int
    number: int = 1
    deaths: int = 0
    before: Stamp | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a worker says of a shard: its number, images and rejects, and the most memory it has had, in bytes.

    taken: whether it was this worker that did the shard; another process may have been faster.
    """

    shard: int
    images: int
    rejects: int
    memory: int
    taken: bool = True


def is_done(tar: Path, retry_rejects: bool) -> bool:
    """Whether nothing is left to do for a shard."""
    return is_whole(tar) and not (retry_rejects and rejects_path(tar).exists())


def index_stamp(tar: Path) -> Stamp | None:
    """Return what tells the index of a shard from another that takes its place, or None if there is none."""
    try:
        status = index_path(tar).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
