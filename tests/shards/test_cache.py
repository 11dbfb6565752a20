"""The cache of shards: a bound that holds at every instant, one download for all, and killed processes."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm
from support import until
from watching import taken, watched

from oscar_common.errors import OperationError, UsageError
from oscar_shards import cache as cache_module
from oscar_shards.cache import FOLDER, ShardCache

SIZE = 100 * 1024  # bytes of a file, in whole blocks
TICK = 0.02  # seconds; more than a tick of the file system's clock, by which files are told apart


def content(name: str, size: int = SIZE) -> bytes:
    return (name.encode() * size)[:size]


def fetcher(name: str, size: int = SIZE, log: list[str] | None = None) -> Callable[[Path], None]:
    """Fills a file with the content of that name, and notes that it did."""

    def fetch(path: Path) -> None:
        if log is not None:
            log.append(name)
        with path.open("r+b") as file:
            file.write(content(name, size))

    return fetch


def read(cache: ShardCache, name: str, size: int = SIZE, log: list[str] | None = None) -> bytes:
    with cache.hold(name, size, fetcher(name, size, log)) as held:
        return os.pread(held.fd, size + 1, 0)


def never(path: Path) -> None:
    raise AssertionError(f"{path} is fetched")


def names(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock")


def run(code: str, *arguments: object) -> warm.Process:
    """Start a Python process that knows this module's helpers."""
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    helpers = f"import sys\nsys.path[:0] = {places}\nfrom test_cache import *\n"
    return warm.Process("-c", helpers + code, *arguments)


def finished(process: warm.Process) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_a_file_is_fetched_once_and_read_many_times(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path, 10 * SIZE), list[str]()
    assert [read(cache, "a", log=log) for _ in range(3)] == [content("a")] * 3
    assert read(ShardCache(tmp_path, 10 * SIZE), "a", log=log) == content("a")
    assert log == ["a"]
    assert names(cache) == ["a"]


def test_a_file_of_no_bytes_and_one_of_an_odd_number(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    assert read(cache, "empty", 0) == b""
    assert read(cache, "odd", 4097) == content("odd", 4097)


def test_a_held_file_cannot_be_written(tmp_path: Path) -> None:
    with ShardCache(tmp_path, SIZE).hold("a", SIZE, fetcher("a")) as held, pytest.raises(OSError, match="Bad file"):
        os.write(held.fd, b"x")


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    for name in "abcad":
        read(cache, name)
        time.sleep(TICK)
    assert names(cache) == ["a", "c", "d"]


def test_held_files_survive(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    with cache.hold("a", SIZE, fetcher("a")) as held:
        for name in "bcde":
            read(cache, name)
            time.sleep(TICK)
        assert names(cache) == ["a", "d", "e"]
        assert os.pread(held.fd, SIZE, 0) == content("a")
    read(cache, "f")
    assert names(cache) == ["d", "e", "f"]


def test_a_file_is_let_go_only_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    held = cache.hold("a", SIZE, fetcher("a"))
    held.close()
    with cache.hold("b", SIZE, fetcher("b")) as other:
        held.close()
        assert os.pread(other.fd, SIZE, 0) == content("b")
    with pytest.raises(ValueError, match="closed"):
        _ = held.fd


def test_ahead_spares_what_is_needed(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    keep = {"a", "b", "c", "d"}
    assert [cache.ahead(name, SIZE, fetcher(name), keep) for name in "abc"] == [True, True, True]
    assert cache.ahead("a", SIZE, never, keep)  # it is there
    assert not cache.ahead("d", SIZE, never, keep)
    assert names(cache) == ["a", "b", "c"]
    assert cache.ahead("d", SIZE, fetcher("d"), keep - {"b"})
    assert names(cache) == ["a", "c", "d"]


def test_ahead_evicts_nothing_if_that_makes_too_little_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    for name in "abc":
        read(cache, name)
    assert not cache.ahead("d", 3 * SIZE, never, {"a"})
    assert names(cache) == ["a", "b", "c"]


def test_hold_takes_the_room_of_what_was_fetched_ahead(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    assert all(cache.ahead(name, SIZE, fetcher(name), "abc") for name in "ab")
    assert read(cache, "c") == content("c")


def test_ahead_does_not_wait_for_a_download(tmp_path: Path) -> None:
    cache, begun, go = ShardCache(tmp_path, 3 * SIZE), threading.Event(), threading.Event()

    def fetch(path: Path) -> None:
        begun.set()
        assert go.wait(20)
        fetcher("a")(path)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(cache.ahead, "a", SIZE, fetch, ())
        assert begun.wait(20)
        assert cache.ahead("a", SIZE, never, ())
        assert taken(tmp_path) == SIZE  # the room is taken from the start
        go.set()
        assert first.result(20)
    assert read(cache, "a") == content("a")


def test_many_threads_make_one_download(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path, 3 * SIZE), list[str]()

    def fetch(path: Path) -> None:
        time.sleep(0.1)
        fetcher("a", log=log)(path)

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(cache.hold, "a", SIZE, fetch) for _ in range(8)]
        for held in found:
            with held.result(20) as file:
                assert os.pread(file.fd, SIZE, 0) == content("a")
    assert log == ["a"]


def test_many_processes_make_one_download(tmp_path: Path) -> None:
    code = """
def fetch(path):
    time.sleep(0.2)
    fetcher("a")(path)
    print("fetched")
with ShardCache(Path(sys.argv[1]), 3 * SIZE).hold("a", SIZE, fetch) as held:
    assert os.pread(held.fd, SIZE, 0) == content("a")
"""
    processes = [run(code, tmp_path) for _ in range(4)]
    assert "".join(map(finished, processes)) == "fetched\n"


def test_a_download_that_fails_comes_through_and_leaves_nothing(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path, 3 * SIZE), list[int]()

    def fetch(path: Path) -> None:
        path.write_bytes(b"half of it")
        log.append(1)
        time.sleep(0.05)
        raise OperationError("no more")

    with ThreadPoolExecutor(3) as pool:
        for failed in [pool.submit(cache.hold, "a", SIZE, fetch) for _ in range(3)]:
            with pytest.raises(OperationError, match="no more"):
                failed.result(20)
    with pytest.raises(OperationError, match="no more"):
        cache.ahead("a", SIZE, fetch, ())
    assert len(log) == 4  # each tried
    assert names(cache) == []
    assert read(cache, "a") == content("a")


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_download_of_another_size_is_no_file(tmp_path: Path, size: int) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    with pytest.raises(OperationError, match=rf"a: {size:,} bytes were fetched, not {SIZE:,}"):
        cache.hold("a", SIZE, lambda path: os.truncate(path, size))
    assert names(cache) == []


def test_a_dropped_file_is_fetched_again(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path, 3 * SIZE), list[str]()
    with cache.hold("a", SIZE, fetcher("wrong")) as held:
        cache.drop("a", held)
        assert read(cache, "a", log=log) == content("a")
        assert os.pread(held.fd, SIZE, 0) == content("wrong")
        cache.drop("a", held)  # another has come in its place
        assert read(cache, "a", log=log) == content("a")
        cache.drop("never there", held)
    assert log == ["a"]


def test_a_file_that_was_cut_is_fetched_again(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    read(cache, "a")
    os.truncate(cache.folder / "a", 5)
    assert read(cache, "a") == content("a")


def test_what_is_larger_than_the_cache_is_refused_at_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    read(cache, "a")
    for attempt in (lambda: cache.hold("b", 2 * SIZE + 1, never), lambda: cache.ahead("b", 2 * SIZE + 1, never, ())):
        with pytest.raises(UsageError, match=r"--cache-size 0.0002048: b takes 0.0002089 GB; give at least as much"):
            attempt()
    assert names(cache) == ["a"]


def test_hold_waits_for_a_reader(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE)
    held = cache.hold("a", SIZE, fetcher("a"))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(read, cache, "b")
        time.sleep(0.1)
        assert not waiting.done()
        assert not cache.ahead("c", SIZE, never, ())
        held.close()
        assert waiting.result(20) == content("b")


def test_hold_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE", 0.1)
    cache = ShardCache(tmp_path, SIZE)
    with (
        cache.hold("a", SIZE, fetcher("a")),
        pytest.raises(OperationError, match=r"--cache-size 0.0001024: all files were in use.* no room for b"),
    ):
        cache.hold("b", SIZE, never)
    assert names(cache) == ["a"]


def test_a_smaller_limit_is_kept_from_the_start(tmp_path: Path) -> None:
    for name in "abcd":
        read(ShardCache(tmp_path, 4 * SIZE), name)
    ShardCache(tmp_path, 2 * SIZE)
    assert taken(tmp_path) == 2 * SIZE


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    mine = [tmp_path / "mine.tar", tmp_path / "shards" / "mine.tar", tmp_path / ".tmp-mine"]
    for path in mine:
        path.write_bytes(bytes(5 * SIZE))
    cache = ShardCache(tmp_path, SIZE)
    for name in "ab":
        read(cache, name)
    assert [path.stat().st_size for path in mine] == [5 * SIZE] * 3


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", ".tmp-a", "a/b", "/a"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no safe file name"):
        ShardCache(tmp_path, SIZE).hold(name, 1, never)


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--cache .*file: cannot be used: Not a directory; give another --cache"):
        ShardCache(tmp_path / "file", SIZE)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(cache_module.fcntl, "flock", flock)
    with pytest.raises(UsageError, match=r"--cache .*not supported"):
        ShardCache(tmp_path, SIZE)


FETCH_AND_HANG = """
def fetch(path):
    fetcher("wrong", SIZE // 2)(path)
    print("half", flush=True)
    time.sleep(60)
ShardCache(Path(sys.argv[1]), 2 * SIZE).hold("a", SIZE, fetch)
"""


@contextmanager
def hanging(folder: Path) -> Iterator[warm.Process]:
    """A process that has fetched half of file "a"."""
    process = run(FETCH_AND_HANG, folder)
    try:
        until(lambda: process.printed() == "half\n", process)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_another_takes_over_from_a_killed_process(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    with hanging(tmp_path) as process, ThreadPoolExecutor() as pool, watched(tmp_path) as sizes:
        waiting = pool.submit(read, cache, "a")
        time.sleep(0.1)
        assert not waiting.done()
        process.send_signal(signal.SIGKILL)
        assert waiting.result(20) == content("a")
    assert max(sizes) == SIZE
    assert names(cache) == ["a"]


def test_what_a_killed_process_left_makes_room(tmp_path: Path) -> None:
    with hanging(tmp_path) as process:
        cache = ShardCache(tmp_path, 2 * SIZE)
        assert names(cache) == [".tmp-a"]  # a live one's
        process.kill()
        process.wait()
    read(cache, "b", 2 * SIZE)
    assert names(cache) == ["b"]


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    with hanging(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / FOLDER / ".tmp-a").stat().st_size == SIZE
        assert names(ShardCache(tmp_path, 2 * SIZE)) == []


def test_a_killed_reader_lets_its_file_go(tmp_path: Path) -> None:
    code = """
held = ShardCache(Path(sys.argv[1]), SIZE).hold("a", SIZE, fetcher("a"))
print("held", flush=True)
time.sleep(60)
"""
    process = run(code, tmp_path)
    cache = ShardCache(tmp_path, SIZE)
    until(lambda: names(cache) == ["a"], process)
    until(lambda: process.printed() == "held\n", process)
    assert not cache.ahead("b", SIZE, never, ())
    process.kill()
    process.communicate()
    assert cache.ahead("b", SIZE, fetcher("b"), ())


WORK = """
import random
seed, seconds = int(sys.argv[2]), float(sys.argv[3])
draw, end = random.Random(seed), time.monotonic() + seconds
cache = ShardCache(Path(sys.argv[1]), 6 * SIZE)
sizes = {f"f{n}": SIZE // 2 + 777 * n for n in range(12)}
def fetch_of(name):
    def fetch(path):
        time.sleep(draw.uniform(0, 0.01))
        if draw.random() < 0.1:
            raise OSError("broken")
        fetcher(name, sizes[name])(path)
    return fetch
def work(keep):
    while time.monotonic() < end:
        name = draw.choice(sorted(sizes))
        try:
            what = draw.random()
            if what < 0.02:
                if held := cache.open(name, sizes[name]):
                    with held:
                        cache.drop(name, held)
            elif what < 0.4:
                cache.ahead(name, sizes[name], fetch_of(name), keep)
            else:
                with cache.hold(name, sizes[name], fetch_of(name)) as held:
                    assert os.pread(held.fd, 1 << 20, 0) == content(name, sizes[name]), name
                    time.sleep(draw.uniform(0, 0.005))
                    assert os.pread(held.fd, 1 << 20, 0) == content(name, sizes[name]), name
                    sys.stdout.write(f"{name}\\n")  # in one piece
        except OSError as error:
            assert str(error) == "broken", error
with ThreadPoolExecutor() as pool:
    for done in [pool.submit(work, keep) for keep in ({"f1", "f2"}, {"f3"})]:
        done.result()
"""


def test_the_bound_holds_at_every_instant_whoever_comes_and_dies(tmp_path: Path) -> None:
    with watched(tmp_path) as sizes:
        lasting = [run(WORK, tmp_path, seed, 4) for seed in range(3)]
        for seed in range(3, 6):
            short = run(WORK, tmp_path, seed, 60)
            time.sleep(1)
            short.kill()
            short.communicate()
        read_ones = [name for process in lasting for name in finished(process).split()]
    assert set(read_ones) == {f"f{n}" for n in range(12)}
    assert len(sizes) > 100
    assert 4 * SIZE < max(sizes) <= 6 * SIZE
    ShardCache(tmp_path, 6 * SIZE)
    assert not [name for name in names(ShardCache(tmp_path, 6 * SIZE)) if name.startswith(".tmp-")]


def test_a_disk_that_is_full_before_the_limit(disk: Callable[[str], Path]) -> None:
    cache = ShardCache(disk("320k"), 100 * SIZE)
    for name in "abcd":
        assert read(cache, name) == content(name)
        time.sleep(TICK)
    assert names(cache) == ["b", "c", "d"]
    assert not cache.ahead("e", SIZE, never, "bcd")
    with cache.hold("b", SIZE, never), cache.hold("c", SIZE, never), cache.hold("d", SIZE, never):
        with pytest.raises(OSError, match=r"No space left.*/f'") as full:
            cache.hold("f", SIZE, never)
        assert full.value.errno == errno.ENOSPC
    assert names(cache) == ["b", "c", "d"]


def test_a_disk_that_fills_while_it_is_written(tmp_path: Path) -> None:
    """As one does whose file system allocates nothing beforehand."""
    cache, log = ShardCache(tmp_path, 3 * SIZE), list[str]()

    def fetch(path: Path) -> None:
        log.append("".join(names(cache)))
        if "b" in names(cache):
            raise OSError(errno.ENOSPC, "No space left on device")
        fetcher("c")(path)

    read(cache, "a")
    with cache.hold("b", SIZE, fetcher("b")), pytest.raises(OSError, match=r"No space left on device: .*/c'"):
        cache.hold("c", SIZE, fetch)
    assert log == [".tmp-cab", ".tmp-cb"]
    log.clear()
    with cache.hold("c", SIZE, fetch) as held:
        assert os.pread(held.fd, SIZE, 0) == content("c")
    assert log == [".tmp-cb", ".tmp-c"]
