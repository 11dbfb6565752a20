"""To take a shard, to hold it while it is in work, and to let it go.

What makes this right, on NFS and Lustre too, and with clocks that differ:

1. To claim is to make a file of a name that is not there yet, which the file server grants to one process only.
2. The numbers of a shard's claims only grow until it is done. An owner that was taken for dead and comes back finds the
   next number gone, and with it the right to finish.
3. An owner writes into a folder of its own. When all is on disk there, it claims the next number as a seal: from then
   on these files, and no others, are the shard, and whoever sees the seal may give them their final names.
4. After any claim its maker looks whether the shard is done by now.
"""

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from oscar_common.files import TEMPORARY
from oscar_extract.folder.claim import (
    FOLDER,
    GIVEN_BACK,
    SEALED,
    WORKING,
    Claim,
    Process,
    as_bytes,
    claim_numbers,
    claim_path,
    is_gone,
    now,
    parse_claim,
    private_name,
    read_bytes,
    this_process,
)
from oscar_extract.folder.stopping import STOP
from oscar_extract.messages import OpenShard
from oscar_shards.write import rejects_path

BEAT = 10.0  # seconds between two signs of life
TRIES = 20  # to make a claim in a folder that others remove when they have finished
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # what a file system without hard links says


class Held:
    """A shard that a process has taken.

    place: the folder of its own in which it writes the shard's files.
    is_lost: whether another process has taken the shard over.
    """

    def __init__(self, out: Path, tar: Path, shard: int, number: int, claim: Claim) -> None:
        self.out, self.tar, self.shard, self.number, self.claim = out, tar, shard, number, claim
        self.place = out / claim.place
        self.is_lost = False
        self._lock = threading.RLock()  # a signal may arrive while it is held, and gives the shard back

    @property
    def is_sealed(self) -> bool:
        """Whether its files are the shard and may get their names."""
        return self.claim.state == SEALED

    def beat(self) -> None:
        """Give a sign of life, and look whether another process has taken the shard over."""
        with self._lock:
            if self.claim.state == WORKING:
                self._change(replace(self.claim, beat=self.claim.beat + 1))
                self.is_lost |= claim_path(self.out, self.shard, self.number + 1).exists()

    def give_back(self) -> None:
        """Let anybody take the shard, at once."""
        with self._lock, suppress(OSError):
            if self.claim.state == WORKING:
                self._change(replace(self.claim, state=GIVEN_BACK))

    def seal(self) -> bool:
        """Make the files in `place`, which must be on disk, the shard; False if another process has taken it over."""
        with self._lock:
            if self.claim.state != WORKING:
                return False

            has_rejects = (self.place / rejects_path(self.tar).name).exists()
            token = secrets.token_hex(8)
            sealed = replace(self.claim, state=SEALED, token=token, has_rejects=has_rejects)
            if not make_claim(self.out, self.shard, self.number + 1, sealed):
                self.is_lost = True
                return False

            self.number, self.claim = self.number + 1, sealed

        # A higher number is there if all claims were removed, as the shard was done, and it was begun once more.
        self.is_lost = claim_numbers(self.out).get(self.shard) != self.number
        return not self.is_lost

    def _change(self, claim: Claim) -> None:
        """Write into the claim's file, unless it is gone."""
        path = claim_path(self.out, self.shard, self.number)
        self.is_lost |= not change_claim(path, claim)
        self.claim = claim


@contextmanager
def holding(out: Path, tar: Path, open_shard: OpenShard, process: Process | None = None) -> Iterator[Held | None]:
    """Take a shard and give signs of life while the block runs; None if another process was faster.

    An exception that ends the block gives the shard back.
    """
    held: Held | None = None
    try:
        with STOP.deferred():  # a signal between the two would leave the shard to a process that has ended
            held = take(out, tar, open_shard, process or this_process())
            if held is not None:
                STOP.first.append(held.give_back)

        if held is None:
            yield None
        else:
            with _beating(held):
                yield held
    except BaseException:
        if held is not None:
            held.give_back()
        raise
    finally:
        if held is not None:
            STOP.first.remove(held.give_back)
            if not held.is_sealed:  # else it is gone, or others find the shard in it
                shutil.rmtree(held.place, ignore_errors=True)


def take(out: Path, tar: Path, open_shard: OpenShard, process: Process) -> Held | None:
    """Claim a shard and make a folder for its files; None if another process was faster."""
    claim = Claim(owner=process, place=private_name(tar), since=now(), deaths=open_shard.deaths)
    if not make_claim(out, open_shard.shard, open_shard.number, claim):
        return None

    held = Held(out, tar, open_shard.shard, open_shard.number, claim)
    try:
        held.place.mkdir()
    except OSError:  # a full disk, say
        held.give_back()
        raise

    return held


def make_claim(out: Path, shard: int, number: int, claim: Claim) -> bool:
    """Make the file of a claim, whole from the beginning; False if there is one of this number."""
    path, private_path = claim_path(out, shard, number), out / FOLDER / f"{TEMPORARY}{claim.token}"
    for _ in range(TRIES):
        path.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # a process that had finished has just removed the folder
            private_path.write_bytes(as_bytes(claim))
            try:
                return _link(private_path, path, claim)
            finally:
                private_path.unlink(missing_ok=True)

    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(private_path))


def change_claim(path: Path, claim: Claim) -> bool:
    """Write into the file of a claim; False if it is gone."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False

    try:
        os.pwrite(handle, as_bytes(claim), 0)
    finally:
        os.close(handle)  # only then others see it on NFS

    return True


def give_back_for_the_dead(out: Path) -> None:
    """Give back what processes of this machine have left that were killed, so that other machines need not wait."""
    process = this_process()
    for shard, number in claim_numbers(out).items():
        path = claim_path(out, shard, number)
        claim = parse_claim(read_bytes(path))
        if claim is not None and claim.state == WORKING and is_gone(claim.owner, process):
            change_claim(path, replace(claim, state=GIVEN_BACK, deaths=claim.deaths + 1))


def _link(own: Path, path: Path, claim: Claim) -> bool:
    try:
        os.link(own, path)
        return True
    except FileExistsError:  # perhaps by this very call: NFS repeats one whose answer was lost
        existing = parse_claim(read_bytes(path))
        return existing is not None and existing.token == claim.token
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise

    with suppress(FileExistsError), path.open("xb") as file:
        file.write(as_bytes(claim))
        return True

    return False


@contextmanager
def _beating(held: Held) -> Iterator[None]:
    """Give signs of life while the block runs."""
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(held, ended), daemon=True)
    heart.start()

    try:
        yield
    finally:
        ended.set()
        heart.join()


def _beat(held: Held, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # the next one may come through
            held.beat()
