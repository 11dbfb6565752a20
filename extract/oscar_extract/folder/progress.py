"""How far the job of a folder is, read from the folder alone."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from oscar_common.errors import OperationError
from oscar_common.progress import plural
from oscar_extract.folder.claim import GIVEN_BACK, claim_numbers, claim_path, parse_claim, read_bytes
from oscar_extract.folder.job_file import read_job
from oscar_extract.plan import planned_record
from oscar_shards.index import index_path
from oscar_shards.read import is_whole, read_rejects
from oscar_shards.write import shard_path


@dataclass(frozen=True, kw_only=True)
class InWork:
    """A shard that is claimed, by which process, and since when in seconds since 1970 by that process' clock.

    Whether the process still lives only those know who watch it for a while: a killed one is listed, too, until its
    shard is taken over.
    """

    shard: int
    host: str
    pid: int
    since: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is. Every shard is done, in work, or left.

    done_at: when each shard that is done got its final name, in seconds since 1970 by the file server's clock, in
        order of time.
    images, images_done: those of the plan, and those of the shards that are done, rejects among them.
    rejects: images that were refused in the shards that are done, by reason.
    bytes_done: of the tars that are done.
    """

    out: Path
    shards: int
    done: int
    in_work: tuple[InWork, ...]
    images: int
    images_done: int
    rejects: Mapping[str, int]
    bytes_done: int
    done_at: tuple[float, ...]

    @property
    def left(self) -> int:
        """How many shards are neither done nor in work."""
        return self.shards - self.done - len(self.in_work)

    @property
    def is_complete(self) -> bool:
        """Whether all shards of the plan are done."""
        return self.done == self.shards


def progress_of(out: Path) -> Progress:
    """Return how far the job of a folder is. Nothing is written, and whoever works there is not disturbed.

    Raises:
        UsageError: it is no folder of a job.
    """
    settings, _ = read_job(out)
    record = planned_record(out)
    tars = {number: shard_path(out, settings.name, number) for number in range(record.num_shards)}
    whole = {number: tar for number, tar in tars.items() if is_whole(tar)}
    rejects = read_rejects([*whole.values()])

    return Progress(
        out=out,
        shards=record.num_shards,
        done=len(whole),
        in_work=tuple(shard for shard in _in_work(out) if shard.shard in tars.keys() - whole.keys()),
        images=record.num_images,
        images_done=sum(record.images_in(number) for number in whole),
        rejects=_counts(rejects["reason"]) if rejects is not None else {},
        bytes_done=sum(tar.stat().st_size for tar in whole.values()),
        done_at=tuple(sorted(index_path(tar).stat().st_mtime for tar in whole.values())),
    )


def as_json(progress: Progress) -> dict[str, object]:
    """Return what `--check --json` prints."""
    return {
        "out": str(progress.out),
        "complete": progress.is_complete,
        "shards": progress.shards,
        "done": progress.done,
        "in_work": [vars(shard) for shard in progress.in_work],
        "left": progress.left,
        "images": progress.images,
        "images_done": progress.images_done,
        "rejects": dict(progress.rejects),
        "bytes_done": progress.bytes_done,
    }


def print_progress(progress: Progress) -> None:
    """Print the progress of a job as a table."""
    table = Table("", progress.out.as_posix(), title="oscar-extract", title_justify="left")
    table.add_row("shards done", f"{progress.done:,} of {progress.shards:,}, {progress.bytes_done / 1e6:,.1f} MB")
    table.add_row("images done", f"{progress.images_done:,} of {progress.images:,}")

    for shard in progress.in_work:
        since = datetime.fromtimestamp(shard.since).astimezone().isoformat(" ", "seconds")
        table.add_row("in work", f"shard {shard.shard:06d} at {shard.host}, process {shard.pid}, since {since}")

    table.add_row("left", f"{progress.left:,}")
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in progress.rejects.items())
    total = sum(progress.rejects.values())
    table.add_row("rejects", f"{total:,}; {reasons}" if reasons else "0")

    console = Console()
    console.print(table, width=None if console.is_terminal else 130)
    sys.stdout.flush()


def check_complete(progress: Progress) -> None:
    """Raise an OperationError if shards are missing."""
    if not progress.is_complete:
        missing, shards = progress.shards - progress.done, plural(progress.shards, "shard")
        raise OperationError(
            f"{progress.out}: {missing:,} of {shards} are not done; oscar-extract --resume {progress.out} goes on"
        )


def _in_work(out: Path) -> list[InWork]:
    shards = []
    for shard, number in sorted(claim_numbers(out).items()):
        claim = parse_claim(read_bytes(claim_path(out, shard, number)))
        if claim is not None and claim.state != GIVEN_BACK:
            shards.append(InWork(shard=shard, host=claim.owner.host, pid=claim.owner.pid, since=claim.since))
    return shards


def _counts(reasons: "pc.ChunkedArray") -> dict[str, int]:
    return dict(Counter(reasons.to_pylist()).most_common())
