"""What is left of a job, and which of it a process may take next."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from oscar_common.files import TEMPORARY, remove
from oscar_extract.folder.claim import FOLDER, GIVEN_BACK, PREPARED, SEALED, Process, claim_numbers, this_process
from oscar_extract.folder.naming import clear, give_names
from oscar_extract.folder.watch import Standing, Watch
from oscar_extract.messages import Job, OpenShard, Stamp, index_stamp, is_done
from oscar_shards.index import index_path
from oscar_shards.manifest import PlanRecord
from oscar_shards.write import shard_path

DEATHS = 4  # owners that a shard may kill before it is given up


class Remaining:
    """The shards of a job that are not done.

    left: by number, with what their indexes were when this process began: another one means that it was done since.
    done_by_others: those that were left and that another process has done.
    given_up: those that killed one owner after the other.
    """

    def __init__(
        self,
        job: Job,
        record: PlanRecord,
        process: Process | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out, self._retries = job.out, job.settings.retry_rejects
        self._tars = [shard_path(job.out, job.settings.name, number) for number in range(record.num_shards)]
        self._indexes = [index_path(tar).name for tar in self._tars]
        self._watch = Watch(job.out, process or this_process(), clock)

        self.left = self._not_done()
        self.done_by_others: list[int] = []
        self.given_up: list[int] = []

        claims, todo = claim_numbers(job.out), [*self.left]
        self._deaths_before = {n: self._deaths(self._watch.look(n, claims[n])) for n in todo if n in claims}
        self._order = self._starting_somewhere(todo) if claims else todo

    def open_shards(self) -> Iterator[OpenShard]:
        """Yield the shards that may be taken now, each once, and look at the folder again before each."""
        offered: set[int] = set()
        while (open_shard := self._next(offered)) is not None:
            offered.add(open_shard.shard)
            yield open_shard

    def finish(self) -> bool:
        """Tidy up after all processes, if no other is at work; return whether this was the one to do so."""
        if not self._retries:
            self._clear_done()

        self.sweep()
        for unnamed in self._out.glob(f"{PREPARED}*"):  # of a process that was killed as it began; all is written now
            with suppress(OSError):
                remove(unnamed)

        for unborn in (self._out / FOLDER).glob(f"{TEMPORARY}*"):  # claims whose makers were killed
            unborn.unlink(missing_ok=True)

        with suppress(OSError):
            (self._out / FOLDER).rmdir()
            return True

        return False

    def sweep(self) -> None:
        """Remove what processes that were killed, or were too late, have left of shards that are done."""
        claims = claim_numbers(self._out)
        stems = {tar.stem for number, tar in enumerate(self._tars) if number not in self.left and number not in claims}
        for name in os.listdir(self._out):
            if name.startswith(TEMPORARY) and name.removeprefix(TEMPORARY).partition(".")[0] in stems:
                with suppress(OSError):  # one that was too late may still write there
                    remove(self._out / name)

    def _not_done(self) -> dict[int, Stamp | None]:
        names = self._names()
        not_done: dict[int, Stamp | None] = {}
        for number, tar in enumerate(self._tars):
            if self._indexes[number] not in names:
                not_done[number] = None
                continue
            stamp = index_stamp(tar)  # before the look at the shard, which may be done in that moment
            if not is_done(tar, self._retries):
                not_done[number] = stamp

        return not_done

    def _names(self) -> set[str]:
        try:
            return set(os.listdir(self._out))
        except FileNotFoundError:
            return set()

    def _next(self, offered: set[int]) -> OpenShard | None:
        claims = claim_numbers(self._out)
        self._drop_done()

        waiting = [number for number in self._order if number in self.left and number not in offered]
        unclaimed = next((number for number in waiting if number not in claims), None)
        if unclaimed is not None:
            return OpenShard(shard=unclaimed, number=1, before=self.left[unclaimed])

        # Only now: to look at each claim before each shard would be most of what the file server has to do.
        open_shards = (self._abandoned(number, claims[number]) for number in waiting)
        return next((open_shard for open_shard in open_shards if open_shard is not None), None)

    def _abandoned(self, shard: int, number: int) -> OpenShard | None:
        """Return a shard for the taking if its owner has given it back, or is dead; finish one that is sealed."""
        standing = self._watch.look(shard, number)
        claim, tar = standing.claim, self._tars[shard]
        open_shard = OpenShard(shard=shard, number=number + 1, deaths=self._deaths(standing), before=self.left[shard])

        if claim is not None and claim.state == SEALED and not is_newly_done(tar, open_shard):
            give_names(tar, claim)

        if is_newly_done(tar, open_shard):
            clear(tar, shard, number)
            self._drop(shard)
            return None

        is_free = standing.is_dead or (claim is not None and claim.state == GIVEN_BACK)
        if is_free and open_shard.deaths - self._deaths_before.get(shard, 0) >= DEATHS:
            self.left.pop(shard)
            self.given_up.append(shard)
            return None

        return open_shard if is_free else None

    def _drop_done(self) -> None:
        names = self._names()
        for number, before in [*self.left.items()]:
            is_there = self._indexes[number] in names
            if is_there and (before is None or index_stamp(self._tars[number]) != before):
                self._drop(number)

    def _drop(self, shard: int) -> None:
        self.left.pop(shard)
        self.done_by_others.append(shard)

    def _clear_done(self) -> None:
        for shard, number in claim_numbers(self._out).items():
            is_done = shard not in self.left and shard not in self.given_up
            if is_done and shard < len(self._tars):
                clear(self._tars[shard], shard, number)

    @staticmethod
    def _deaths(standing: Standing) -> int:
        claim = standing.claim
        if claim is None:
            return int(standing.is_dead)
        return claim.deaths + (standing.is_dead and claim.state != GIVEN_BACK)

    @staticmethod
    def _starting_somewhere(todo: list[int]) -> list[int]:
        """Return shards from a random one on: a process that comes later seldom meets those that are at work."""
        start = random.randrange(len(todo)) if todo else 0
        return todo[start:] + todo[:start]


def is_newly_done(tar: Path, open_shard: OpenShard) -> bool:
    """Whether a shard was done since the process began that offered it."""
    return index_stamp(tar) != open_shard.before and is_done(tar, retry_rejects=False)
