"""Claims on shards: one owner at a time gives a shard its names, whoever dies, stops, comes back or cannot be seen."""

import dataclasses
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from kills import is_killed
from small_shards import make_samples

from oscar_common.errors import Stopped
from oscar_common.sample import Sample
from oscar_common.settings import Detector, Extract
from oscar_extract.folder import claim as claim_module
from oscar_extract.folder import remaining as remaining_module
from oscar_extract.folder.claim import (
    FOLDER,
    SEALED,
    Claim,
    Process,
    claim_path,
    is_gone,
    parse_claim,
    read_bytes,
    this_process,
)
from oscar_extract.folder.finish import finish_shard
from oscar_extract.folder.naming import give_names
from oscar_extract.folder.remaining import DEATHS, Remaining
from oscar_extract.folder.stopping import STOP
from oscar_extract.folder.take import Held, change_claim, give_back_for_the_dead, holding, make_claim, take
from oscar_extract.folder.watch import PATIENCE, Watch
from oscar_extract.messages import Job, OpenShard
from oscar_shards.manifest import Layout, PlanRecord
from oscar_shards.read import is_whole
from oscar_shards.write import Reject, shard_path, write_shard

LAYOUT = Layout(feature_dim=24)
SAMPLES = make_samples(2)
REFUSED = Reject(path="broken.jpg", reason="truncated", message="cut")
ITEMS: list[Sample | Reject] = [*SAMPLES, REFUSED]
RECORD = PlanRecord(
    images="photos", captions=None, num_images=6, num_texts=0, images_per_shard=2, num_shards=3, sha256="0"
)
POLL = 5.0  # seconds between the looks of those who wait


class Clock:
    """One machine's seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def process(name: str) -> Process:
    """A process of another machine, of which nobody here knows whether it lives."""
    return Process(host=name, pid=1, machine=name, started=1)


def remaining(out: Path, name: str, clock: Clock, **settings: object) -> Remaining:
    job = Job(out=out, settings=Extract(out=str(out), **settings), entry=Detector())
    return Remaining(job, RECORD, process(name), clock)


def taken(out: Path, open_shard: OpenShard, name: str) -> Held:
    held = take(out, shard_path(out, "shard", open_shard.shard), open_shard, process(name))
    assert held is not None
    return held


def wait_until_dead(left: Remaining, clock: Clock) -> OpenShard:
    """What a process is offered that looks now and then, once the time has passed after which an owner is dead."""
    offered = None
    for _ in range(1 + int(PATIENCE / POLL)):
        assert offered is None
        offered = next(left.open_shards(), None)
        clock.seconds += POLL
    assert offered is not None
    return offered


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """Name, inode and content of all that has a final name."""
    return {
        path.name: (path.stat().st_ino, path.read_bytes())
        for path in out.iterdir()
        if path.is_file() and not path.name.startswith(".tmp-")
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder in which all shards but the first are done."""
    out = tmp_path / "out"
    out.mkdir()
    for number in (1, 2):
        write_shard(shard_path(out, "shard", number), SAMPLES, LAYOUT)
    return out


@pytest.fixture
def written(tmp_path: Path) -> dict[str, bytes]:
    """What the first shard comes to."""
    folder = tmp_path / "written"
    folder.mkdir()
    write_shard(shard_path(folder, "shard", 0), ITEMS, LAYOUT)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_is_written(out: Path, written: dict[str, bytes]) -> None:
    first = {name: content for name, (_, content) in files(out).items() if "000000" in name}
    assert first == written


def test_of_many_processes_that_claim_at_once_one_gets_the_shard(out: Path):
    begin, ready = os.pipe()
    children = []
    for number in range(20):
        child = os.fork()
        if child == 0:
            os.close(ready)
            os.read(begin, 1)  # until the other end is closed
            owner = Claim(owner=process(f"n{number}"), place=".tmp-a", since=0.0)
            os._exit(make_claim(out, 0, 1, owner))
        children.append(child)
    os.close(ready)
    winners = sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    os.close(begin)
    assert winners == 1
    assert [path.name for path in (out / FOLDER).iterdir()] == ["000000.1"]


def test_a_file_system_without_hard_links_grants_a_claim_once_too(out: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    first, second = (Claim(owner=process(name), place=".tmp-a", since=0.0) for name in "ab")
    assert make_claim(out, 0, 1, first)
    assert not make_claim(out, 0, 1, second)
    assert parse_claim(read_bytes(claim_path(out, 0, 1))) == first


def test_a_claim_whose_answer_was_lost_is_known_as_ones_own(out: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS sends a request again if there is no answer; the second one finds what the first has made."""
    link = os.link

    def link_twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr(os, "link", link_twice)
    assert make_claim(out, 0, 1, Claim(owner=process("a"), place=".tmp-a", since=0.0))
    assert not make_claim(out, 0, 1, Claim(owner=process("b"), place=".tmp-b", since=0.0))


def test_an_owner_that_gives_signs_of_life_keeps_its_shard_whatever_the_clocks_say(out: Path):
    held = taken(out, OpenShard(shard=0), "a")
    clock = Clock(1e9)
    left = remaining(out, "b", clock)
    for _ in range(100):
        assert next(left.open_shards(), None) is None
        clock.seconds += POLL
        held.beat()


def test_a_file_server_that_hangs_makes_nobody_dead(out: Path):
    """Who could not look for an hour has seen nothing, either."""
    taken(out, OpenShard(shard=0), "a")
    clock = Clock(0.0)
    left = remaining(out, "b", clock)
    clock.seconds += 3600
    assert next(left.open_shards(), None) is None


@pytest.mark.parametrize("comes_back", ["while the other works", "after the other has finished"])
def test_an_owner_that_comes_back_after_it_was_taken_over_changes_nothing(
    out: Path, written: dict[str, bytes], comes_back: str
):
    first = taken(out, OpenShard(shard=0), "a")
    write_shard(first.place / first.tar.name, ITEMS[:1], LAYOUT)  # it stopped here
    clock = Clock(50.0)
    left = remaining(out, "b", clock)
    open_shard = wait_until_dead(left, clock)
    second = taken(out, open_shard, "b")

    if comes_back == "while the other works":
        assert not finish_shard(first, OpenShard(shard=0), iter(ITEMS[:1]), LAYOUT)
        assert first.is_lost
        assert not is_whole(first.tar)
    assert finish_shard(second, open_shard, iter(ITEMS), LAYOUT)
    before = files(out)
    assert not finish_shard(first, OpenShard(shard=0), iter(ITEMS[:1]), LAYOUT)
    first.beat()
    first.give_back()
    assert files(out) == before
    assert_is_written(out, written)

    left = remaining(out, "c", clock)
    assert left.left == {}
    assert left.finish()
    assert {path.name for path in out.iterdir()} == {*before}


def test_an_owner_that_is_taken_over_learns_it_with_its_next_sign_of_life(out: Path):
    first = taken(out, OpenShard(shard=0), "a")
    first.beat()
    assert not first.is_lost
    taken(out, OpenShard(shard=0, number=2), "b")
    first.beat()
    assert first.is_lost


def test_after_kill_9_at_any_moment_another_process_finishes_to_the_same_bytes(out: Path, written: dict[str, bytes]):
    """What is sealed is given its names, not written again; what is not is done anew. Nothing else is left."""
    done = files(out)
    ends = set()
    for after in range(100):
        for path in [*out.glob("shard-000000.*")]:
            path.unlink()

        def do() -> None:
            open_shard = OpenShard(shard=0)
            finish_shard(taken(out, open_shard, "a"), open_shard, iter(ITEMS), LAYOUT)

        killed = is_killed(do, after)
        (out / ".tmp-job-0123456789abcdef").mkdir()  # of a process that was killed as it began
        clock = Clock(0.0)
        left = remaining(out, "b", clock)
        while left.left:
            open_shard = next(left.open_shards(), None)
            if open_shard is not None:
                ends.add("done anew")
                assert finish_shard(taken(out, open_shard, "b"), open_shard, iter(ITEMS), LAYOUT)
                left.left.pop(0)
            clock.seconds += POLL
        ends.update("named" for _ in left.done_by_others)
        left.finish()

        assert_is_written(out, written)
        assert {path.name for path in out.iterdir()} == {*written, *done}
        if not killed:
            break
    assert after > 10
    assert ends == {"done anew", "named"}


def test_two_that_give_a_sealed_shard_its_names_lose_no_file(out: Path, written: dict[str, bytes]):
    """The owner is stopped between two of its files; another one names the rest, and then the owner goes on."""
    held = taken(out, OpenShard(shard=0), "a")
    write_shard(held.place / held.tar.name, ITEMS, LAYOUT)
    assert held.seal()
    (held.place / "shard-000000.tar").rename(out / "shard-000000.tar")
    (held.place / "shard-000000.rejects.parquet").rename(out / "shard-000000.rejects.parquet")

    left = remaining(out, "b", Clock(0.0))
    assert next(left.open_shards(), None) is None
    assert (left.left, left.done_by_others) == ({}, [0])
    assert_is_written(out, written)
    give_names(held.tar, held.claim)
    assert_is_written(out, written)


def test_a_shard_that_is_given_back_can_be_taken_at_once(out: Path):
    left = remaining(out, "b", Clock(0.0))

    def fail() -> None:
        with holding(out, shard_path(out, "shard", 0), OpenShard(shard=0), process("a")):
            assert next(left.open_shards(), None) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [*left.open_shards()] == [OpenShard(shard=0, number=2)]
    assert [path.name for path in out.glob(".tmp-*")] == []


def test_a_signal_at_the_very_moment_of_the_claim_gives_the_shard_back(out: Path, monkeypatch: pytest.MonkeyPatch):
    def take_and_be_told(*arguments: Any) -> Held | None:
        held = take(*arguments)
        os.kill(os.getpid(), signal.SIGUSR1)
        return held

    monkeypatch.setattr("oscar_extract.folder.take.take", take_and_be_told)
    with STOP.watched(), pytest.raises(Stopped), holding(out, shard_path(out, "shard", 0), OpenShard(shard=0)):
        raise AssertionError("the signal came before any work")

    assert [*remaining(out, "b", Clock(0.0)).open_shards()] == [OpenShard(shard=0, number=2)]
    assert [path.name for path in out.glob(".tmp-*")] == []


def test_a_process_of_this_machine_that_was_killed_is_dead_at_once(out: Path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"x" * (take(out, shard_path(out, "shard", 0), OpenShard(shard=0), this_process()) is not None))
        signal.pause()
    assert os.read(read, 1) == b"x"
    here, job = this_process(), Job(out=out, settings=Extract(out=str(out)), entry=Detector())
    left = Remaining(job, RECORD, here, Clock(0.0))
    assert [*left.open_shards()] == []

    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it is still listed
    assert [*left.open_shards()] == [OpenShard(shard=0, number=2, deaths=1)]
    os.waitpid(child, 0)
    assert [*left.open_shards()] == [OpenShard(shard=0, number=2, deaths=1)]
    give_back_for_the_dead(out)  # for machines that cannot see it
    assert [*remaining(out, "b", Clock(0.0)).open_shards()] == [OpenShard(shard=0, number=2, deaths=1)]


def test_another_process_with_the_same_id_is_not_the_owner():
    here = this_process()
    assert not is_gone(here, here)
    assert is_gone(dataclasses.replace(here, started=here.started - 1), here)
    assert not is_gone(dataclasses.replace(here, started=here.started - 1, machine="another"), here)


def test_a_shard_that_kills_one_owner_after_the_other_is_given_up_by_those_who_saw_it(out: Path):
    clock = Clock(0.0)
    left = remaining(out, "b", clock)
    open_shard = next(left.open_shards())
    for _ in range(DEATHS):
        assert open_shard is not None
        taken(out, open_shard, "a")
        for _ in range(1 + int(PATIENCE / POLL)):
            open_shard = next(left.open_shards(), None)  # type: ignore[assignment]
            clock.seconds += POLL
    assert open_shard is None
    assert (left.left, left.given_up) == ({}, [0])

    again = remaining(out, "c", clock)  # the same command again tries it again
    assert wait_until_dead(again, clock).number == DEATHS + 1


def test_a_shard_that_is_done_while_a_process_begins_is_not_done_again(out: Path, monkeypatch: pytest.MonkeyPatch):
    tar = shard_path(out, "shard", 0)
    write_shard(tar, SAMPLES, LAYOUT)
    os.truncate(tar, 0)  # by a power cut
    is_done = remaining_module.is_done

    def look(path: Path, retry_rejects: bool) -> bool:
        done = is_done(path, retry_rejects)
        if path == tar and not done:
            write_shard(tar, ITEMS, LAYOUT)  # in the moment after
        return done

    monkeypatch.setattr(remaining_module, "is_done", look)
    left = remaining(out, "b", Clock(0.0))
    assert [*left.left] == [0]
    assert [*left.open_shards()] == []
    assert (left.left, left.done_by_others) == ({}, [0])


def test_with_retry_rejects_each_shard_that_has_some_is_done_once_by_one_process(out: Path):
    tar = shard_path(out, "shard", 1)
    write_shard(tar, ITEMS, LAYOUT)
    lefts = [remaining(out, name, Clock(0.0), retry_rejects=True) for name in "ab"]
    write_shard(shard_path(out, "shard", 0), SAMPLES, LAYOUT)
    open_shard = next(lefts[0].open_shards())
    assert open_shard.shard == 1
    assert finish_shard(taken(out, open_shard, "a"), open_shard, iter(ITEMS), LAYOUT)  # it is refused again
    assert [*lefts[1].open_shards()] == []
    assert lefts[1].left == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[" * 1000, b'{"owner": 3}', "a place outside"],
    ids=["empty", "cut", "null", "deep", "wrong types", "a place outside"],
)
def test_a_damaged_claim_counts_as_one_until_it_has_not_changed_for_long(out: Path, tmp_path: Path, content: object):
    if content == "a place outside":
        (tmp_path / "precious").mkdir()
        bad = Claim(owner=process("a"), place="../precious", since=0.0, state=SEALED)
        content = claim_module.as_bytes(bad)
    (out / FOLDER).mkdir()
    claim_path(out, 0, 1).write_bytes(content)  # type: ignore[arg-type]
    clock = Clock(0.0)
    open_shard = wait_until_dead(remaining(out, "b", clock), clock)
    assert (open_shard.shard, open_shard.number) == (0, 2)


def test_a_sign_of_life_changes_the_file_in_place(out: Path):
    held = taken(out, OpenShard(shard=0), "a")
    path = claim_path(out, 0, 1)
    inode, size = path.stat().st_ino, path.stat().st_size
    watch, seen = Watch(out, process("b"), Clock(0.0)), set()
    for _ in range(3):
        held.beat()
        standing = watch.look(0, 1)
        assert standing.claim is not None
        seen.add(standing.claim.beat)
    assert (path.stat().st_ino, path.stat().st_size, len(seen)) == (inode, size, 3)
    path.unlink()
    assert not change_claim(path, held.claim)
    assert not path.exists()
