"""Shards behind URLs: the batches of the local folder, or one clear error; the cache never over its bound."""

import gc
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from remotes import Fault, Server, s3, serve
from running import launch, rows
from small_shards import make_samples, write_folder
from support import error_line, train, until
from watching import watched
from xxhash import xxh3_64

from oscar_common.errors import OperationError, UsageError
from oscar_shards import remote, retries
from oscar_shards.cache import FOLDER, ShardCache, cost
from oscar_shards.index import SIZE, index_path, load_index, write_index
from oscar_train.batch import IGNORED, Batch
from oscar_train.data.reading import downloads
from oscar_train.data.reading.tars import check_window
from oscar_train.data.stream import Stream, open_stream

IMAGES, EACH = 40, 4
SHARDS = IMAGES // EACH
TARS = [f"shard-{number:06d}.tar" for number in range(SHARDS)]
STEPS = 22  # two epochs
OPTIONS: dict[str, Any] = {"batch_size": 12, "window": 2, "threads": 3}
FAULTY = "shard-000004.tar"
SECONDS = 10  # that no fault may take longer than


def digest(batch: Batch) -> str:
    """A name for all bytes of a batch."""
    found = xxh3_64()
    for f in fields(batch):
        found.update(getattr(batch, f.name).contiguous().numpy().tobytes())
    return str(found.hexdigest())


def read(places: list[str], steps: int = STEPS, **options: Any) -> list[str]:
    """The digests of the batches of some folders."""
    with open_stream(places, **(OPTIONS | options)) as stream:
        return [digest(batch) for batch in stream.batches(0, steps)]


def gigabytes(folder: Path, tars: float) -> float:
    """A --cache-size for so many tars of a folder."""
    return tars * max(cost(tar.stat().st_size) for tar in folder.glob("*.tar")) / 1e9


def run(code: str, *arguments: object) -> warm.Process:
    """Start a Python process that knows this module's helpers."""
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    helpers = f"import sys\nsys.path[:0] = {places}\nfrom test_remote_stream import *\n"
    return warm.Process("-c", helpers + code, *arguments)


def finished(process: warm.Process) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was wrong or waited for, until now."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning: ", "waiting "))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("remote") / "shards", make_samples(IMAGES), EACH)


@pytest.fixture(scope="module")
def local(folder: Path) -> list[str]:
    """What the batches are to be."""
    return read([str(folder)])


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder) as state:
        yield state


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    gc.collect()
    gc.freeze()  # so that what follows has little to look at


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # a driver that is collected closes its session, for which others may have to wait for a second
    monkeypatch.setattr(retries, "DELAY", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 10)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.25)
    monkeypatch.setattr(remote, "SLOWEST", 1 << 20)


@pytest.mark.parametrize("listing", [True, False])
def test_batches_over_http_are_those_of_the_folder(
    listing: bool, server: Server, local: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if not listing:
        server.faults[""] = Fault.GONE
    assert read([server.url], cache=str(tmp_path)) == local
    assert [server.gets(tar) for tar in TARS] == [1] * SHARDS
    assert said(capsys) == []
    asked = len(server.requests)
    assert read([server.url], cache=str(tmp_path)) == local
    again = [name for method, name in server.requests[asked:] if method == "GET"]
    assert set(again) <= {"", "manifest.json"}  # neither tars nor indexes


def test_batches_of_s3_are_those_of_the_folder(folder: Path, local: list[str], tmp_path: Path):
    with s3(folder) as url:
        assert read([url], cache=str(tmp_path), cache_size=gigabytes(folder, 5)) == local


@pytest.mark.parametrize("tars", [5, 3, 2, 1])
def test_a_cache_smaller_than_the_folder_changes_nothing(
    tars: int, server: Server, folder: Path, local: list[str], tmp_path: Path
):
    """Down to one that holds neither a window nor what the threads read at once."""
    limit = gigabytes(folder, tars)
    with watched(tmp_path / FOLDER) as sizes:
        assert read([server.url], cache=str(tmp_path), cache_size=limit) == local
    assert max(sizes) <= round(limit * 1e9)
    assert max(sizes) > round(limit * 1e9) / 2
    assert min(server.gets(tar) for tar in TARS) >= 2  # evicted, and fetched again for the second epoch


def test_local_and_remote_int8_and_overlays_can_be_mixed(folder: Path, server: Server, tmp_path: Path):
    small = write_folder(tmp_path / "int8", make_samples(60)[IMAGES:], 5, dtype="int8")
    texts = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"key": ["image-001", "image-050"], "text": ["one more", "another one"]}), texts)
    options = {"texts": [str(texts)], "mix": [1, 1.5]}
    expected = read([str(folder), str(small)], **options)
    assert expected != read([str(folder), str(small)], mix=[1, 1.5])
    with serve(small) as other:
        assert read([server.url, other.url], cache=str(tmp_path / "one"), **options) == expected
        assert read([str(folder), other.url], cache=str(tmp_path / "two"), **options) == expected
        assert read([server.url, str(small)], cache=str(tmp_path / "two"), **options) == expected


RANK = """
folder, rank, urls, limits = sys.argv[1], int(sys.argv[2]), sys.argv[3::2], sys.argv[4::2]
for n, (url, limit) in enumerate(zip(urls, limits)):
    print(json.dumps(read([url], cache=f"{folder}/{n}", cache_size=float(limit), rank=rank, ranks=2)), flush=True)
"""


def test_ranks_share_a_cache_large_or_small(server: Server, folder: Path, tmp_path: Path):
    """Two processes at the same time. The first folder holds all shards, the second never more than three."""
    expected = [read([str(folder)], rank=rank, ranks=2) for rank in (0, 1)]
    limit = gigabytes(folder, 3)
    with watched(tmp_path / "1" / FOLDER) as sizes, serve(folder) as other:
        places = (server.url, gigabytes(folder, 100), other.url, limit)
        processes = [run(RANK, tmp_path, rank, *places) for rank in (0, 1)]
        found = [[json.loads(line) for line in finished(process).splitlines()] for process in processes]
        assert found == [[each, each] for each in expected]
        assert [server.gets(tar) for tar in TARS] == [1] * SHARDS
        assert min(other.gets(tar) for tar in TARS) >= 2
    assert gigabytes(folder, 2) < max(sizes) / 1e9 <= limit


def fetched(cache: Path) -> set[str]:
    """The tars that are in a cache."""
    return {path.name.partition("-")[2] for path in (cache / FOLDER).glob("[!.]*")}


def wait(reached: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_shards_are_fetched_before_a_batch_needs_them(server: Server, local: list[str], tmp_path: Path):
    with open_stream([server.url], cache=str(tmp_path), **OPTIONS) as stream:
        batches = stream.batches(0, STEPS)
        found = [digest(next(batches))]
        wait(lambda: fetched(tmp_path) == set(TARS))
        server.faults |= dict.fromkeys(TARS, Fault.GONE)
        asked = len(server.requests)
        found += [digest(batch) for batch in batches]
        assert len(server.requests) == asked
    assert found == local


UNSAID = (Fault.SHORT, Fault.LONG, Fault.WRONG)  # of small files, whose size and content nobody says


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", [f for f in Fault if f not in (Fault.GONE, Fault.DENIED, Fault.ENDLESS)])
def test_a_fault_that_passes_changes_nothing(fault: Fault, server: Server, local: list[str], tmp_path: Path):
    names = ["manifest.json", "shard-000002.parquet", FAULTY, "shard-000007.tar"]
    server.faults |= dict.fromkeys(names, fault)
    server.times |= dict.fromkeys(names, 1 if fault in UNSAID else 2)
    server.elsewhere, began = "file:///etc/passwd", time.monotonic()
    assert read([server.url], cache=str(tmp_path)) == local
    assert time.monotonic() - began < SECONDS
    assert all(server.times[name] == 0 for name in names)


LASTS = {
    Fault.GONE: "there is no such file",
    Fault.DENIED: "access is denied (403 Forbidden)",
    Fault.ERROR: "503 Service Unavailable; gave up after 5 tries",
    Fault.CUT: "payload is not completed",
    Fault.SHORT: "bytes came instead of",
    Fault.LONG: "it has more than the",
    Fault.WRONG: " in it",
    Fault.MUTE: "no answer in time",
    Fault.SLOW: "it sends fewer than",
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", LASTS)
def test_a_tar_that_cannot_be_had_is_one_error_in_time(fault: Fault, server: Server, local: list[str], tmp_path: Path):
    server.faults[FAULTY], began, found = fault, time.monotonic(), list[str]()
    with (
        pytest.raises(OperationError) as failed,
        open_stream([server.url], cache=str(tmp_path), **OPTIONS) as stream,
    ):
        found.extend(map(digest, stream.batches(0, STEPS)))
    assert time.monotonic() - began < SECONDS
    assert found == local[: len(found)]
    assert len(found) < STEPS / 2
    assert failed.value.message.startswith(f"{server.url}/{FAULTY}: image image-0")
    assert LASTS[fault] in failed.value.message
    assert "--skip-corrupt" in failed.value.message
    assert "\n" not in failed.value.message
    assert server.gets(FAULTY) == (1 if fault in (Fault.GONE, Fault.DENIED) else retries.TRIES)


OPENING = {
    ("manifest.json", Fault.GONE): "no manifest.json there",
    ("manifest.json", Fault.DENIED): r"manifest.json: access is denied",
    ("manifest.json", Fault.SHORT): r"manifest.json: not valid JSON",
    ("manifest.json", Fault.CUT): r"manifest.json: .*gave up after 5 tries",
    ("manifest.json", Fault.MUTE): r"manifest.json: no answer in time",
    ("manifest.json", Fault.ENDLESS): r"manifest.json: it has more than [\d,]+ bytes|manifest.json: it sends",
    ("shard-000004.parquet", Fault.GONE): r"shard-000004.tar: it has no index shard-000004.parquet",
    ("shard-000004.parquet", Fault.DENIED): r"shard-000004.parquet: access is denied",
    ("shard-000004.parquet", Fault.SHORT): r"shard-000004.tar: its index shard-000004.parquet is damaged",
    ("shard-000004.parquet", Fault.ERROR): r"shard-000004.parquet: 503 Service Unavailable; gave up after 5 tries",
    ("shard-000004.parquet", Fault.STALL): r"shard-000004.parquet: no answer in time",
    ("", Fault.ERROR): r"http://[\d.:]+: 503 Service Unavailable; gave up after 5 tries",
    ("", Fault.MUTE): r"http://[\d.:]+: no answer in time",
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("name", "fault"), OPENING)
def test_what_cannot_be_opened_is_one_error_in_time(name: str, fault: Fault, server: Server, tmp_path: Path):
    server.faults[name], began = fault, time.monotonic()
    with (
        pytest.raises((OperationError, UsageError), match=OPENING[name, fault]) as failed,
        open_stream([server.url], cache=str(tmp_path), **OPTIONS),
    ):
        pass
    assert time.monotonic() - began < SECONDS
    assert server.url in failed.value.message
    assert "\n" not in failed.value.message


@pytest.mark.parametrize("spoil", ["flip", "cut"])
def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(
    spoil: str, server: Server, folder: Path, local: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    read([server.url], cache=str(tmp_path))
    (copy,) = (tmp_path / FOLDER).glob(f"*{FAULTY}")
    content = bytearray(copy.read_bytes())
    if spoil == "flip":
        content[pq.read_table(folder / FAULTY.replace(".tar", ".parquet"))["features_offset"][2].as_py()] ^= 1
    copy.write_bytes(content if spoil == "flip" else content[:-1024])
    assert read([server.url], cache=str(tmp_path)) == local
    assert {tar: server.gets(tar) for tar in TARS} == {tar: 1 + (tar == FAULTY) for tar in TARS}
    warnings = said(capsys)
    assert len(warnings) == (spoil == "flip")
    assert all(f"warning: {server.url}/{FAULTY}: its copy in --cache is damaged" in line for line in warnings)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("fault", "asked"), [(Fault.GONE, 1), (Fault.WRONG, 5), (Fault.CUT, 5)])
def test_with_skip_corrupt_a_lost_tar_is_left_out_alike_by_all_ranks(
    fault: Fault, asked: int, server: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server.faults |= dict.fromkeys([FAULTY, "shard-000007.tar"], fault)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    names = ("features", "input_ids", "mlm_labels", "match_labels", "z", "region_mask", "triples")

    def batches(place: str, **options: Any) -> list[dict[str, Any]]:
        with open_stream([place], cache=str(tmp_path), skip_corrupt=True, **(OPTIONS | options)) as stream:
            if place == str(copy):
                for tar in (FAULTY, "shard-000007.tar"):
                    (copy / tar).unlink()
            found = []
            for batch in stream.batches(0, STEPS):
                lost = (stream.corpus.images.shard[stream.corpus.image[batch.triples]] % 10)[:, None] == [4, 7]
                assert ((batch.match_labels == IGNORED).numpy() == lost.any(1)).all()
                found.append({name: getattr(batch, name).clone() for name in names})
            assert stream.reader.skipped <= {*range(16, 20), *range(28, 32)}
            return found

    whole = batches(server.url)
    assert any(f"skipped: {server.url}/{FAULTY}: image image-016: " in line for line in said(capsys))
    assert server.gets(FAULTY) == asked
    assert server.gets("shard-000007.tar") == asked
    expected = batches(str(copy))
    halves = [batches(server.url, rank=rank, ranks=2) for rank in (0, 1)]
    for step in range(STEPS):
        for name in names:
            assert whole[step][name].equal(expected[step][name]), (step, name)
            both = [half[step][name] for half in halves]
            assert whole[step][name][:6].equal(both[0]), (step, name)
            assert whole[step][name][6:].equal(both[1]), (step, name)


def test_with_skip_corrupt_an_image_whose_index_contradicts_itself_is_left_out_alone(
    server: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its tar is as good as any, and is not fetched again for it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = load_index(copy / FAULTY)
    width = index.schema.get_field_index("width")
    changed = index.set_column(
        width, index.schema.field(width), pa.array([0, *index["width"].to_pylist()[1:]], "int32")
    )
    write_index(changed, index_path(copy / FAULTY))
    expected = read([str(copy)], skip_corrupt=True)
    with serve(copy) as other:
        assert read([other.url], cache=str(tmp_path), skip_corrupt=True) == expected
        assert [other.gets(tar) for tar in TARS] == [1] * SHARDS
    assert ["image image-016: its index contradicts itself" in line for line in said(capsys)] == [True, True]


def test_a_server_that_answers_nothing_any_more_is_an_error_even_with_skip_corrupt(
    folder: Path, local: list[str], tmp_path: Path
):
    began = time.monotonic()
    with ExitStack() as stack:
        server = stack.enter_context(serve(folder))
        limit = gigabytes(folder, 2)  # so that tars are needed again
        stream = stack.enter_context(
            open_stream([server.url], cache=str(tmp_path), cache_size=limit, skip_corrupt=True, **OPTIONS)
        )
        batches = stream.batches(0, 10 * STEPS)
        assert digest(next(batches)) == local[0]
        server.dead.set()
        with pytest.raises(OperationError, match=rf"{server.url}/shard-00000\d.tar: .*gave up after 5 tries$"):
            list(batches)
        assert not stream.reader.skipped
    assert time.monotonic() - began < SECONDS


def with_member(folder: Path, target: Path, name: str) -> Path:
    """A copy of a folder of which one tar has one more member, which its index knows of."""
    copy = Path(shutil.copytree(folder, target))
    with tarfile.open(copy / FAULTY, "a", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    index = load_index(folder / FAULTY)
    size = str((copy / FAULTY).stat().st_size)
    write_index(index.replace_schema_metadata({SIZE: size}), index_path(copy / FAULTY))
    return copy


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("image-019.more.pkl", "image-019 in it: image-019.more.pkl: a pickle is refused"),
        ("z.pth", "z in it: z.pth: a pickle is refused"),
        ("../z.json", "'../z.json' would lie outside the folder that it is unpacked into: refused"),
        ("/tmp/z.json", "'/tmp/z.json' would lie outside the folder that it is unpacked into: refused"),
    ],
)
def test_what_may_not_be_in_a_tar_is_refused_by_name(name: str, why: str, folder: Path, tmp_path: Path):
    copy = with_member(folder, tmp_path / "copy", name)
    with (
        serve(copy) as server,
        pytest.raises(OperationError, match=rf"{server.url}/{FAULTY}: image image-01\d: {re.escape(why)}; gave up"),
    ):
        read([server.url], cache=str(tmp_path))
    assert FAULTY not in fetched(tmp_path)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("pipe:cat x", "pipe: runs a shell command"),
        ("simplecache::s3://b/x", r"chained URLs \(::\) are refused"),
        ("zip://x::http://h/x", r"chained URLs \(::\) are refused"),
        ("reference://x", "reference:// is not read"),
        ("http://h/a/../b", "'..' is refused"),
        ("s3://b/a-000000.tar", "give the URL of the folder"),
    ],
)
def test_what_is_no_place_of_shards_is_refused_by_the_command(place: str, why: str, tmp_path: Path):
    done = train("--shards", place, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert re.search(f"error: --shards {re.escape(place)}: .*{why}", error_line(done))


def test_it_is_refused_before_torch_is_imported(tmp_path: Path):
    code = """
import sys
from oscar_train.__main__ import main
sys.argv[1:] = ["--shards", "pipe:cat x", "--out", "run"]
try:
    main()
except SystemExit as left:
    print(left.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "2 False\n", done.stderr


def test_a_cache_that_is_too_small_for_one_shard_says_so_in_gigabytes(server: Server, folder: Path, tmp_path: Path):
    needed = max(cost((folder / tar).stat().st_size) for tar in TARS)
    limit = (needed - 4096) / 1e9
    message = rf"--cache-size {limit:.9f}: {server.url}/shard-00000\d.tar takes ([\d.]+) GB; give at least as much$"
    with pytest.raises(UsageError, match=message) as failed:
        read([server.url], cache=str(tmp_path), cache_size=limit)
    found = re.search(message, failed.value.message)
    assert found
    assert read([server.url], 2, cache=str(tmp_path), cache_size=float(found[1]))


def test_a_window_that_does_not_fit_is_told_of_once(
    server: Server, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    with open_stream([server.url], cache=str(tmp_path), cache_size=gigabytes(folder, 5), **OPTIONS) as stream:
        cache = stream.reader.tars.cache
        assert cache
        assert check_window(stream.corpus, cache, 5)
        assert said(capsys) == []
        assert not check_window(stream.corpus, cache, 6)
    (line,) = said(capsys)
    assert re.fullmatch(
        r"warning: --shuffle-window 6: the shards of a window take up to 0\.0001\d+ GB, more than --cache-size "
        r"0\.0001\d+, so they will be fetched again and again; give a smaller --shuffle-window or a larger "
        r"--cache-size",
        line,
    )


def test_who_waits_long_is_told_for_what(
    server: Server,
    local: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(downloads, "PATIENCE", 0.1)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    server.faults |= dict.fromkeys(TARS, Fault.MUTE)
    server.times |= dict.fromkeys(TARS, 1)
    assert read([server.url], cache=str(tmp_path)) == local
    lines = [line for line in said(capsys) if line.startswith("waiting")]
    assert len(lines) == 1  # in ten seconds
    assert re.fullmatch(rf"waiting for {server.url}/shard-00000\d.tar \(0 s so far\)", lines[0])


def only(server: Server, folder: Path, steps: int, fault: Fault, **options: Any) -> None:
    """Let a fault befall all tars that the first steps do not need."""
    with open_stream([str(folder)], **(OPTIONS | options)) as stream:
        needed = {int(shard) for s in range(steps) for shard in stream.corpus.images.shard[images(stream, s)]}
    assert needed < {*range(SHARDS)}
    server.faults |= {tar: fault for number, tar in enumerate(TARS) if number not in needed}


def images(stream: Stream, step: int) -> Any:
    return stream.corpus.image[stream.triples(step)]


def test_closing_waits_for_no_server(
    server: Server, folder: Path, local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With threads that make batches and threads that fetch ahead, all waiting for one that says nothing."""
    monkeypatch.setattr(remote, "TIMEOUT", 3)
    only(server, folder, 1, Fault.MUTE)
    with open_stream([server.url], cache=str(tmp_path), **OPTIONS) as stream:
        batches = stream.batches(0, STEPS)
        assert digest(next(batches)) == local[0]
        wait(lambda: sum(map(server.gets, TARS)) >= 5)
        began = time.monotonic()
        batches.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 1
        server.faults.clear()
        assert digest(stream.batch(0, stream.buffer())) == local[0]
        assert digest(stream.batch(5, stream.buffer())) == local[5]
        assert [digest(batch) for batch in stream.batches(0, STEPS)] == local


EARLY = """
with open_stream([sys.argv[1]], cache=sys.argv[2], **OPTIONS) as stream:
    for batch in stream.batches(0, STEPS):
        print(digest(batch), flush=True)
        break
print("left", flush=True)
"""


def test_a_process_ends_at_once_with_fetches_under_way(server: Server, folder: Path, local: list[str], tmp_path: Path):
    only(server, folder, 1, Fault.STALL)
    process = run(EARLY, server.url, tmp_path)
    until(lambda: "left" in process.printed(), process)
    began = time.monotonic()
    assert finished(process) == f"{local[0]}\nleft\n"
    assert time.monotonic() - began < 15  # a server that is waited for would take minutes
    ShardCache(tmp_path, 1 << 30)
    assert not list((tmp_path / FOLDER).glob(".tmp-*"))


def test_ctrl_c_twice_ends_a_run_that_waits_for_a_server(server: Server, tmp_path: Path):
    server.faults |= dict.fromkeys(TARS, Fault.MUTE)
    out = ("--out", tmp_path / "run", "--cache", tmp_path, "--region-init", "random")  # so it waits in the first step
    process = launch("--shards", server.url, *out, *SETTINGS)
    until(lambda: sum(map(server.gets, TARS)) >= 4, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # a step under way is finished first
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 15  # a server that is waited for would take minutes
    said = "error: stopped by SIGINT at once; the same command again continues from the last checkpoint"
    assert (process.returncode, err.strip()) == (130, said)


def test_ctrl_c_once_ends_a_run_that_waits_for_where_its_regions_begin(server: Server, tmp_path: Path):
    server.faults |= dict.fromkeys(TARS, Fault.MUTE)
    process = launch("--shards", server.url, "--out", tmp_path / "run", "--cache", tmp_path, *SETTINGS)
    until(lambda: sum(map(server.gets, TARS)) >= 4, process)  # several at once
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 15  # a server that is waited for would take minutes
    said = "error: stopped by SIGINT before the first step; the same command again continues"
    assert (process.returncode, err.strip()) == (130, said)


def test_another_rank_goes_on_where_one_was_killed_while_fetching(
    server: Server, folder: Path, local: list[str], tmp_path: Path
):
    server.faults |= dict.fromkeys(TARS, Fault.STALL)
    limit = gigabytes(folder, 4)
    with watched(tmp_path / "0" / FOLDER) as sizes:
        process = run(RANK, tmp_path, 0, server.url, limit)
        until(lambda: sum(map(server.gets, TARS)) >= 4, process)
        server.faults.clear()
        other = run(RANK, tmp_path, 1, server.url, limit)
        until(lambda: server.requests.count(("GET", "manifest.json")) == 2, other)
        process.kill()
        process.communicate()
        found = json.loads(finished(other))
    assert found == read([str(folder)], rank=1, ranks=2)
    assert max(sizes) <= round(limit * 1e9)
    assert not list((tmp_path / "0" / FOLDER).glob(".tmp-*"))


SETTINGS = ("--init", "random:tiny", "--steps", 12, "--batch-size", 8, "--checkpoint-every", 4, "--shuffle-window", 2)


@pytest.mark.slow
def test_a_run_over_http_that_was_killed_and_continued_equals_an_undisturbed_one(
    server: Server, folder: Path, tmp_path: Path
):
    local, out = tmp_path / "local", tmp_path / "remote"
    assert train("--shards", folder, "--out", local, *SETTINGS).returncode == 0
    arguments = ("--shards", server.url, "--out", out, "--cache", tmp_path, "--cache-size", gigabytes(folder, 3))
    process = launch(*arguments, *SETTINGS)
    until(lambda: (out / "metrics.csv").exists() and "\n6," in (out / "metrics.csv").read_text(), process)
    process.kill()
    process.communicate()
    server.faults |= dict.fromkeys(TARS, Fault.RESET)
    server.times |= dict.fromkeys(TARS, 1)
    assert "going on after step 4 of 12" in train(*arguments, *SETTINGS).stdout
    assert rows(out) == rows(local)
    assert len(rows(out)) == 12
