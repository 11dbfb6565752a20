"""Folders of shards at URLs: every fault of a server gives the right bytes or one clear error, in a bounded time."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from remotes import Fault, Server, free_port, put, s3, serve

from oscar_common.errors import OperationError, UsageError
from oscar_shards import remote, retries
from oscar_shards.remote import Stamp, open_remote
from oscar_shards.retries import Denied, Gone, RemoteError, retried
from oscar_shards.url import is_url, local_path

TAR = "shard-000000.tar"
SIZE = 100_000
SECONDS = 8  # that no fault may take longer than, all tries together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as a folder of shards has them, and some that it should not have."""
    made = tmp_path_factory.mktemp("remote")
    for name, content in {
        "manifest.json": b'{"name": "shard"}',
        TAR: os.urandom(SIZE),
        "ein bild+ä-000000.tar": b"odd name",
        "empty": b"",
        ".hidden": b"x",
        "back\\slash": b"x",
    }.items():
        (made / name).write_bytes(content)
    return made


GOOD = {"manifest.json", TAR, "ein bild+ä-000000.tar", "empty"}


@pytest.fixture(scope="module")
def s3_url(folder: Path) -> Iterator[str]:
    with s3(folder) as url:
        yield url


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder) as state:
        yield state


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DELAY", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 10)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.25)
    monkeypatch.setattr(remote, "SLOWEST", 1 << 20)


@pytest.fixture(params=["s3", "http", "memory"])
def store(request: pytest.FixtureRequest, folder: Path) -> str:
    """The URL of the folder in a store."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    if request.param == "http":
        return str(request.getfixturevalue("server").url)
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/folder/{path.name}", path.read_bytes())
    return "memory://folder"


def test_a_folder_is_listed_without_unsafe_names(store: str) -> None:
    found = open_remote(store).listing()
    assert set(found) == GOOD
    if not store.startswith("http"):
        assert found[TAR].size == SIZE


def test_a_stamp_is_that_of_the_listing(store: str, folder: Path) -> None:
    there = open_remote(store)
    stamp = there.stamp(TAR)
    assert stamp.size == SIZE
    assert stamp.version
    if not store.startswith("http"):
        assert there.listing()[TAR] == stamp


def test_files_are_read_whole(store: str, folder: Path, tmp_path: Path) -> None:
    there = open_remote(store)
    for name in GOOD:
        content = (folder / name).read_bytes()
        assert there.read(name, len(content)) == content
        there.download(name, tmp_path / "new", len(content))
        assert (tmp_path / "new").read_bytes() == content
        (tmp_path / "new").unlink()


def test_a_file_that_is_there_is_written_in_place(store: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(SIZE))
    before = target.stat().st_ino
    open_remote(store).download(TAR, target, SIZE)
    assert target.read_bytes() == (folder / TAR).read_bytes()
    assert target.stat().st_ino == before


@pytest.mark.parametrize("pieces", [1, 10_000, SIZE - 1, SIZE, SIZE + 1])
def test_pieces_of_any_size_make_the_file(
    pieces: int, s3_url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", pieces)
    there, name = open_remote(s3_url), TAR if pieces > 1 else "manifest.json"
    content = (folder / name).read_bytes()
    there.download(name, tmp_path / "file", len(content))
    assert (tmp_path / "file").read_bytes() == content
    for size in (len(content) - 1, len(content) + 1):
        with pytest.raises(RemoteError, match=r"more than|instead of|416 Requested Range"):
            there.download(name, tmp_path / "file", size)


def test_another_size_than_expected_is_an_error_and_not_a_byte_more_is_written(store: str, tmp_path: Path) -> None:
    there = open_remote(store)
    with pytest.raises(RemoteError, match=rf"{TAR}: it has more than the 99,999 bytes expected"):
        there.download(TAR, tmp_path / "file", SIZE - 1)
    assert (tmp_path / "file").stat().st_size < SIZE
    with pytest.raises(RemoteError, match=rf"{TAR}: 100,000 bytes came instead of 100,001"):
        there.download(TAR, tmp_path / "file", SIZE + 1)


def test_no_more_is_read_than_the_limit(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OperationError, match=rf"{TAR}: it has more than 999 bytes, the most that are read"):
        open_remote(store).read(TAR, 999)
    assert capsys.readouterr().err == ""  # a second try would not help


def test_what_is_not_there_is_gone_at_once(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = open_remote(store)
    for attempt in (
        lambda: there.stamp("none.tar"),
        lambda: there.read("none.tar", 9),
        lambda: retried(lambda: there.download("none.tar", tmp_path / "file", 9), "x"),
        lambda: open_remote(f"{store}/nowhere").listing(),
    ):
        with pytest.raises(Gone, match=r"(none.tar|nowhere): there is no such file or folder$"):
            attempt()
    assert capsys.readouterr().err == ""


def test_a_changed_file_is_seen(store: str, folder: Path, s3_url: str, tmp_path: Path) -> None:
    """No cache of fsspec's is in the way."""
    there = open_remote(store)

    def write(content: bytes) -> None:
        if store.startswith("s3"):
            put("changing", content)
        elif store.startswith("http"):
            (folder / "changing").write_bytes(content)
        else:
            fsspec.filesystem("memory").pipe_file("/folder/changing", content)

    try:
        for content in (b"one", b"three"):
            write(content)
            assert "changing" in there.listing()
            assert there.stamp("changing").size == len(content)
            assert there.read("changing", 9) == content
    finally:
        (folder / "changing").unlink(missing_ok=True)


def test_many_threads_at_once(store: str, folder: Path, tmp_path: Path) -> None:
    there = open_remote(store)

    def fetch(number: int) -> bytes:
        target = tmp_path / str(number)
        assert there.stamp(TAR).size == SIZE
        there.download(TAR, target, SIZE)
        return target.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(24))) == {(folder / TAR).read_bytes()}


FAILS = {
    Fault.ERROR: "503 Service Unavailable",
    Fault.RESET: "Server disconnected",
    Fault.CUT: "payload is not completed",
    Fault.SHORT: "50,000 bytes came instead of 100,000",
    Fault.LONG: "it has more than the 100,000 bytes expected",
    Fault.ENDLESS: "it has more than the 100,000 bytes expected",
    Fault.STALL: "no answer in time",
    Fault.MUTE: "no answer in time",
    Fault.SLOW: "it sends fewer than 1,048,576 bytes a second",
    Fault.REDIRECT: "file:///etc/passwd",
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", FAILS)
def test_a_fault_that_stays_is_one_error_after_five_tries(
    fault: Fault, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults[TAR], server.elsewhere = fault, "file:///etc/passwd"
    there, target, began = open_remote(server.url), tmp_path / "file", time.monotonic()
    with pytest.raises(RemoteError) as failed:
        retried(lambda: there.download(TAR, target, SIZE), there.at(TAR))
    assert time.monotonic() - began < SECONDS
    message = failed.value.message
    assert message.startswith(f"{server.url}/{TAR}: ")
    assert FAILS[fault] in message
    assert message.endswith("; gave up after 5 tries")
    assert "\n" not in message
    assert server.gets(TAR) == 5 or (fault is Fault.RESET and server.gets(TAR) == 10)  # aiohttp asks once more itself
    warnings = capsys.readouterr().err.splitlines()
    assert [w.rpartition("; ")[2] for w in warnings] == [
        "trying again in 0.01 s (1 of 5)",
        "trying again in 0.02 s (2 of 5)",
        "trying again in 0.04 s (3 of 5)",
        "trying again in 0.08 s (4 of 5)",
    ]
    assert all(w.startswith(f"warning: {server.url}/{TAR}: ") for w in warnings)
    assert not target.exists() or target.stat().st_size <= SIZE


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", FAILS)
def test_a_fault_that_passes_is_a_right_file(fault: Fault, server: Server, folder: Path, tmp_path: Path) -> None:
    server.faults[TAR], server.times[TAR], server.elsewhere = fault, 2, "file:///etc/passwd"
    there, target = open_remote(server.url), tmp_path / "file"
    retried(lambda: there.download(TAR, target, SIZE), there.at(TAR))
    assert target.read_bytes() == (folder / TAR).read_bytes()
    assert server.gets(TAR) >= 3


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.CUT, Fault.MUTE])
def test_small_files_are_tried_again_too(fault: Fault, server: Server, folder: Path) -> None:
    there = open_remote(server.url)
    server.faults["manifest.json"], server.times["manifest.json"] = fault, 2
    assert there.read("manifest.json", 99) == (folder / "manifest.json").read_bytes()
    server.times["manifest.json"] = 2
    assert there.stamp("manifest.json").size == 17
    server.faults[""], server.times[""] = fault, 2
    assert TAR in there.listing()


@pytest.mark.usefixtures("hasty")
def test_a_small_file_that_trickles_is_given_up(server: Server) -> None:
    """However many bytes it might have had."""
    server.faults["manifest.json"], began = Fault.SLOW, time.monotonic()
    with pytest.raises(RemoteError, match="it sends fewer than 1,048,576 bytes a second; gave up after 5 tries"):
        open_remote(server.url).read("manifest.json", 1 << 40)
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(("times", "asked"), [(0, 1), (1, 2), (2, 2)])
def test_a_small_file_that_makes_no_sense_is_read_again(times: int, asked: int, server: Server) -> None:
    server.faults["manifest.json"], server.times["manifest.json"] = Fault.SHORT, times
    there = open_remote(server.url)
    if times < 2:
        assert there.parsed("manifest.json", 99, json.loads) == {"name": "shard"}
    else:  # the same bytes a second time: they are the server's
        with pytest.raises(ValueError, match="Expecting value"):
            there.parsed("manifest.json", 99, json.loads)
    assert server.gets("manifest.json") == asked


def test_a_small_file_without_an_end_is_refused(server: Server) -> None:
    server.faults["manifest.json"] = Fault.ENDLESS
    with pytest.raises(OperationError, match="it has more than 1,000 bytes"):
        open_remote(server.url).read("manifest.json", 1000)


@pytest.mark.parametrize(("fault", "kind"), [(Fault.GONE, Gone), (Fault.DENIED, Denied)])
def test_what_another_try_cannot_mend_is_not_tried_again(
    fault: Fault, kind: type[RemoteError], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = open_remote(server.url)
    server.faults |= {TAR: fault, "": fault}
    for attempt in (
        lambda: there.stamp(TAR),
        lambda: there.read(TAR, SIZE),
        lambda: retried(lambda: there.download(TAR, tmp_path / "file", SIZE), "x"),
        there.listing,
    ):
        with pytest.raises(kind, match=r"no such file|access is denied \(403 Forbidden\)"):
            attempt()
    assert capsys.readouterr().err == ""


def test_a_page_that_links_elsewhere_names_no_files(server: Server, folder: Path) -> None:
    page = f"""<a href="../up.tar">1</a> <a href="%2e%2e%2fup.tar">2</a> <a href="/etc/passwd">3</a>
        <a href="http://127.0.0.2/far.tar">4</a> <a href="sub/deep.tar">5</a> <a href="?C=N;O=D">6</a>
        <a href="a%0ab.tar">7</a> <a href=".hidden">8</a> <a href="sub/">9</a> <a href="{TAR}">10</a>"""
    (folder / "index.html").write_text(page)
    try:
        assert set(open_remote(server.url).listing()) == {TAR}
    finally:
        (folder / "index.html").unlink()


def test_a_full_disk_is_no_fault_of_the_server(
    disk: Callable[[str], Path], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    there, target = open_remote(server.url), disk("64k") / "file"
    with pytest.raises(OSError, match="No space left"):
        retried(lambda: there.download(TAR, target, SIZE), there.at(TAR))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_nobody_answers(
    scheme: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody, began = f"http://127.0.0.1:{free_port()}", time.monotonic()
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    with pytest.raises(RemoteError, match=r"(?i)could not connect|cannot connect.*; gave up after 5 tries"):
        open_remote(f"{nobody}/x" if scheme == "http" else s3_url).listing()
    assert time.monotonic() - began < SECONDS
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.usefixtures("hasty")
def test_s3_that_stalls_is_given_up(
    server: Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.faults[TAR], began = Fault.MUTE, time.monotonic()
    there = open_remote("s3://bucket")
    with pytest.raises(RemoteError, match=r"no answer in time .*; gave up after 5 tries"):
        retried(lambda: there.download(TAR, tmp_path / "file", SIZE), there.at(TAR))
    assert time.monotonic() - began < SECONDS
    assert server.gets(TAR) == 5  # and none of the driver's own


def test_s3_without_a_bucket_or_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Gone, match=r"s3://other/x: there is no such"):
        open_remote("s3://other/x").listing()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Denied, match=r"access is denied .*credentials.*FSSPEC_S3="):
        open_remote(s3_url).listing()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    assert TAR in open_remote(s3_url).listing()


def test_what_the_user_set_for_a_driver_holds(s3_url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    set_by_user = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "config_kwargs": {"read_timeout": 7}}
    monkeypatch.setitem(fsspec.config.conf, "s3", set_by_user)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    there = open_remote(s3_url)
    assert TAR in there.listing()
    assert (there.fs.config_kwargs["read_timeout"], there.fs.config_kwargs["connect_timeout"]) == (7, remote.TIMEOUT)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": {"X-Mine": "1"}}})
    assert open_remote(server.url).fs.client_kwargs.keys() == {"headers", "timeout", "trust_env"}


def test_a_password_is_not_shown(server: Server) -> None:
    there = open_remote(server.url.replace("//", "//me:secret@"))
    assert there.read("manifest.json", 99)
    server.faults["manifest.json"] = Fault.ERROR
    for attempt in (lambda: there.read("manifest.json", 99), lambda: open_remote("http://me:secret@h/*")):
        with pytest.raises((RemoteError, UsageError), match=r"http://\*\*\*@") as failed:
            attempt()
        assert "secret" not in failed.value.message


def test_a_store_that_says_nothing_of_a_file() -> None:
    assert remote._stamp({"name": "x"}) == Stamp(None, "")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("pipe:cat x.tar", "pipe: runs a shell command"),
        ("PIPE:cat", "pipe: runs"),
        (" pipe:cat", "pipe: runs"),
        ("pipe :cat", "pipe: runs"),
        ("pipe://cat x", "pipe: runs"),
        ("pipe::s3://b/x", "pipe: runs"),
        ("simplecache::s3://b/x", "chained URLs"),
        ("zip://x::s3://b/y", "chained URLs"),
        ("s3://b/x::pipe:cat", "chained URLs"),
        ("simplecache://b/x", "simplecache:// is not read"),
        ("reference://x", "reference:// is not read"),
        ("data://x", "data:// is not read"),
        ("dask://x", "dask:// is not read"),
        ("s4://bucket/x", "did you mean 's3'.*known: abfs.*http"),
        ("s3:/bucket/x", "write s3://"),
        ("s3://", "no URL of a folder"),
        ("s3:///", "no URL of a folder"),
        ("s3://b/a\nb", "b/a b: is no URL of a folder"),
        ("s3://b/x-000000.tar", "give the URL of the folder"),
        ("s3://b/x-{000000..000009}.tar", "give the URL of the folder"),
        ("s3://b/{a,b}", "give the URL of the folder"),
        ("s3://b/a/../b", "'..' is refused"),
        ("http://h/a/%2e%2E/b", "'..' is refused"),
        ("http://h/a?key=1", "no . and #"),
        ("file:///a", "file:// is not read"),
    ],
)
def test_what_is_no_folder_of_a_store_is_refused_by_name(url: str, why: str) -> None:
    assert is_url(url)
    with pytest.raises(UsageError, match=f"--from .*{why}"):
        open_remote(url, "--from")


@pytest.mark.parametrize(
    ("url", "how"),
    [("s3://b/x", r'pip install "oscar-pretrain\[remote\]"'), ("abfs://c@a.net/x", "Install adlfs")],
)
def test_a_missing_driver_names_the_package(url: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError(protocol)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UsageError, match=f"--shards {url}: the driver of .*:// is not installed; .*{how}"):
        open_remote(url)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/shards", "runs/shards"),
        ("/data/a:b", "/data/a:b"),
        ("./s3:x", "s3:x"),
        ("a:b", "a:b"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("FILE://localhost/a%20b", "/a b"),
        ("local:///a", "/a"),
        ("s3://b/x", None),
        ("https://h/x", None),
        ("pipe:cat", None),
        ("file::s3://b", None),
    ],
)
def test_local_paths_and_urls_of_them(text: str, path: str | None) -> None:
    assert local_path(text) == (Path(path) if path else None)
    assert is_url(text) == (text.partition(":")[0].lower() in ("file", "local", "s3", "https", "pipe"))


def test_a_file_url_of_another_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="three slashes"):
        local_path("file://host/a")


def test_retried_gives_back_what_comes_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([RemoteError("s3://b/x", "reset"), RemoteError("s3://b/x", "closed"), 7])

    def attempt() -> int:
        answer = next(answers)
        if isinstance(answer, RemoteError):
            raise answer
        return answer

    assert retried(attempt, "s3://b/x") == 7
    assert capsys.readouterr().err == (
        "warning: s3://b/x: reset; trying again in 0.01 s (1 of 5)\n"
        "warning: s3://b/x: closed; trying again in 0.02 s (2 of 5)\n"
    )
