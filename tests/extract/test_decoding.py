"""An image that hangs or kills its decoder costs itself, not the job, and no process waits for it for ever."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import photo, slow_jpeg

from oscar_common.files import hold, release
from oscar_extract import decoding
from oscar_extract.decoding import Decoders, Journal, journal
from oscar_extract.images import RefusedImage, decode, decode_apart, read_bytes


@pytest.fixture
def record(tmp_path: Path) -> Journal:
    with journal(tmp_path / "shard-000000.tar") as record:
        yield record


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What hanging work waits for, until the test is over."""
    monkeypatch.setattr(decoding, "POLL", 0.05)
    event = threading.Event()
    yield event
    event.set()


def test_results_come_in_order_whoever_is_first(record):
    def work(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * 10

    assert list(Decoders(work, 4, 60, record).map(range(20), 8)) == [n * 10 for n in range(20)]


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_so_many_are_decoded_ahead(record, ahead):
    begun = []
    for done, number in enumerate(Decoders(begun.append, 4, 60, record).map(range(10), ahead), 1):
        assert number is None
        time.sleep(0.02)
        assert len(begun) < done + ahead
    assert sorted(begun) == list(range(10))


def test_hanging_images_are_left_behind_even_if_they_are_more_than_the_threads(record, never):
    def work(number: int) -> int:
        if number % 3 == 0:
            never.wait()
        return number

    found = list(Decoders(work, 2, 0.5, record).map(range(16), 5))
    assert found == [None if number % 3 == 0 else number for number in range(16)]


def test_a_thread_that_was_left_behind_ends_when_its_image_does(record, never):
    before = threading.active_count()
    assert list(Decoders(lambda number: never.wait(), 1, 0.2, record).map(range(3), 3)) == [None] * 3
    never.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), TimeoutError("the work's own"), KeyboardInterrupt()])
def test_what_the_work_raises_is_raised_in_its_place(record, error):
    def work(number: int) -> int:
        if number == 2:
            raise error
        return number

    results = Decoders(work, 2, 60, record).map(range(5), 5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(type(error)) as raised:
        next(results)
    assert raised.value is error


# A process that does a shard of 8 images, of which it can decode all but the argument's: those hang or kill it.
CHILD = """
import os, sys, threading
from pathlib import Path
from oscar_extract.decoding import Decoders, journal

tar, form, timeout, *bad = sys.argv[1:]
with journal(Path(tar)) as record:
    def work(number):
        if str(number) not in bad:
            return number
        if form == "hang":
            os.write(1, b"%d\\n" % number)  # at once: two threads may say it
            threading.Event().wait()
        elif number not in record.suspects:
            os.kill(os.getpid(), 9)
    print("began", flush=True)
    found = list(Decoders(work, 2, float(timeout), record).map(range(8), 8))
print(found)
"""


def child(tar: Path, *arguments: object) -> "subprocess.Popen[str]":
    line = [sys.executable, "-c", CHILD, str(tar), *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


def test_what_was_being_decoded_at_a_kill_is_suspect_afterwards(tmp_path):
    tar = tmp_path / "shard-000007.tar"
    with child(tar, "hang", 60, 3, 5) as process:
        assert [process.stdout.readline().strip(), *sorted(process.stdout.readline().strip() for _ in "ab")] == [
            "began", "3", "5",
        ]  # fmt: skip
        process.kill()
    for _ in range(2):  # whoever asks and dies before it does anything takes nothing away
        handle = hold(tmp_path / ".tmp-shard-000007.decoding")
        assert Journal(handle).suspects == {3, 5}
        os.close(handle)
    with journal(tar) as record:
        assert record.suspects == {3, 5}
    with journal(tar) as record:
        assert record.suspects == set()
    assert list(tmp_path.iterdir()) == []


def test_images_that_kill_their_process_do_so_once_each(tmp_path):
    tar = tmp_path / "shard-000007.tar"
    for expected in (-9, -9, -9, 0):
        with child(tar, "kill", 60, 1, 4, 7) as process:
            said = process.stdout.read()
        if process.returncode == 0:
            break
        assert process.returncode == expected
    assert process.returncode == 0
    assert said.splitlines()[-1] == "[0, None, 2, 3, None, 5, 6, None]"
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_was_left_behind_keeps_no_process_alive(tmp_path):
    with child(tmp_path / "shard-000007.tar", "hang", 1, 3, 5) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "[0, 1, 2, None, 4, None, 6, 7]"
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_comes_back_leaves_the_journal_of_the_next_one_alone(tmp_path):
    tar = tmp_path / "shard-000007.tar"
    with journal(tar) as earlier:
        earlier.note(0, 3)
        with journal(tar) as later:
            assert later.suspects == {3}
            earlier.note(0, 5)
            earlier.close()
            handle = os.open(tmp_path / ".tmp-shard-000007.decoding", os.O_RDWR)
            assert Journal(handle).suspects == {3}
            os.close(handle)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_journal_names_no_image_and_stops_nobody(tmp_path):
    path = tmp_path / ".tmp-shard-000007.decoding"
    path.write_bytes(b"\xff" * 8 + bytes(8) + b"\x05" + bytes(7) + b"cut")
    handle = hold(path)
    assert Journal(handle).suspects == {4}
    release(handle, path)


# Images


def encoded(folder: Path) -> bytes:
    photo("chelsea").resize((90, 60)).save(folder / "x.jpg")
    return (folder / "x.jpg").read_bytes()


def refusal(work: Callable[[], Any]) -> RefusedImage:
    with pytest.raises(RefusedImage) as refused:
        work()
    return refused.value


def test_a_process_apart_gives_the_same_pixels_and_the_same_refusals(tmp_path):
    content = encoded(tmp_path)
    np.testing.assert_array_equal(decode_apart(content, 60), decode(content))
    for bad in (content[:-300], b"<html>404</html>"):
        here, apart = refusal(lambda bad=bad: decode(bad)), refusal(lambda bad=bad: decode_apart(bad, 60))
        assert (apart.reason, str(apart)) == (here.reason, str(here))


@pytest.mark.parametrize(
    ("script", "reason"), [("kill -9 $$", "crash"), ("exit 1", "crash"), ("exec sleep 60", "timeout")]
)
def test_a_decoder_that_dies_or_hangs_is_a_refused_image(tmp_path, monkeypatch, script, reason):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    refused = refusal(lambda: decode_apart(bytes(1 << 20), 1))
    assert refused.reason == reason
    assert str(refused)


def test_an_image_that_takes_for_ever_is_refused_in_time():
    began = time.monotonic()
    content = slow_jpeg()
    assert len(content) < 1 << 20
    assert refusal(lambda: decode_apart(content, 1)).reason == "timeout"
    assert time.monotonic() - began < 10
    assert decode(slow_jpeg(80, 50)).shape == (80, 80, 3)  # it is a picture like any other


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    handles = len(os.listdir("/proc/self/fd"))
    for name in ("pipe.jpg", "folder.jpg", "gone.jpg", "absent.jpg", "a\0b.jpg", "x" * 300):
        refused = refusal(lambda name=name: read_bytes(tmp_path / name))
        assert refused.reason == "unreadable"
        assert str(refused)
    assert len(os.listdir("/proc/self/fd")) == handles
