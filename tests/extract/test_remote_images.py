"""Images in tars behind a URL: the shards are those of the same tars on a disk, whatever the network does."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from remotes import Fault, s3, serve
from support import contents, error_line, extract, oscar, photo, start, until

from oscar_shards import retries
from oscar_shards.cache import cost

ARGUMENTS = ("--images-per-shard", 2, "--device", "cpu", "--source", "web", "--workers", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DELAY", 0.001)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of img2dataset, with its tables, a dead link, and one image twice."""
    folder = tmp_path_factory.mktemp("served") / "cc3"
    folder.mkdir()
    names = [["coffee", "rocket"], ["chelsea", "coffee"]]
    for shard, photos in enumerate(names):
        write_shard(folder, shard, photos)
    return folder


def write_shard(folder: Path, shard: int, photos: list[str]) -> None:
    keys = [f"{shard:05d}{n:04d}" for n in range(len(photos) + 1)]
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
        for key, name in zip(keys, photos, strict=False):
            image = io.BytesIO()
            photo(name).resize((96, 64)).save(image, "JPEG")
            about = json.dumps({"url": f"https://x/{key}", "caption": f"a {name}", "key": key})
            for extension, data in (
                ("jpg", image.getvalue()),
                ("txt", b"a " + name.encode()),
                ("json", about.encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    rows = {
        "key": keys,
        "url": [f"https://x/{key}" for key in keys],
        "status": [*("success" for _ in photos), "failed_to_download"],
        "caption": [*(f"a {name}" for name in photos), "nothing"],
        "error_message": [*(None for _ in photos), "HTTP Error 404: Not Found"],
    }
    pq.write_table(pa.table(rows), folder / f"{shard:05d}.parquet")


def shards(out: Path) -> dict[str, bytes]:
    return {n: data for n, data in contents(out).items() if n.startswith("shard-")}


@pytest.fixture(scope="module")
def local(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "shards"
    done = extract("--images", tars, "--out", out, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return shards(out)


@pytest.mark.parametrize("form", ["{url}/{{00000..00001}}.tar", "{url}/", "{url}"])
def test_the_shards_are_those_of_the_same_tars_on_a_disk(
    tars: Path, local: dict[str, bytes], tmp_path: Path, form: str
):
    with serve(tars.parent) as server:
        url = form.format(url=f"{server.url}/cc3")
        arguments = ("--images", url, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *ARGUMENTS)
        done = extract(*arguments)
        assert done.returncode == 0, done.stderr
        assert server.gets("00000.tar") == 1
        assert "nothing was left to do" in extract(*arguments).stdout
    assert local
    assert shards(tmp_path / "out") == local
    assert json.loads((tmp_path / "out/manifest.json").read_text())["plan"]["num_missing"] == 2


def test_a_server_that_fails_twice_is_asked_again(tars: Path, local: dict[str, bytes], tmp_path: Path):
    with serve(tars.parent) as server:
        server.faults = {"00000.tar": Fault.ERROR, "00001.tar": Fault.RESET}
        server.times = dict.fromkeys(server.faults, 2)
        url = f"{server.url}/cc3/{{00000..00001}}.tar"
        done = extract("--images", url, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stderr
    assert shards(tmp_path / "out") == local


def test_a_server_that_is_gone_ends_the_command_and_the_same_command_goes_on(
    tars: Path, local: dict[str, bytes], tmp_path: Path
):
    size = max(cost(path.stat().st_size) for path in tars.glob("*.tar")) / 1e9  # of two tars one has room
    with serve(tars.parent) as server:
        url = f"{server.url}/cc3/{{00000..00001}}.tar"
        arguments = ("--images", url, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *ARGUMENTS)
        arguments = (*arguments, "--cache-size", size, "--duplicates", "keep")
        first = extract(*arguments)
        assert first.returncode == 0, first.stderr
        whole = shards(tmp_path / "out")
        for path in (tmp_path / "out").glob("shard-*"):
            path.unlink()
        server.faults["00000.tar"] = Fault.CUT
        server.faults["00001.tar"] = Fault.CUT
        failed = extract(*arguments)
        assert failed.returncode == 1, failed.stderr
        assert "gave up after 5 tries" in error_line(failed)
        assert not any(p.suffix == ".parquet" and "rejects" in p.name for p in (tmp_path / "out").iterdir())
        assert not set(shards(tmp_path / "out")) - set(whole)
        server.faults.clear()
        assert extract(*arguments).returncode == 0
    assert shards(tmp_path / "out") == whole


def test_a_tar_that_has_other_images_now_is_refused(tars: Path, tmp_path: Path):
    folder = tmp_path / "served"
    folder.mkdir()
    write_shard(folder, 0, ["coffee", "rocket"])
    with serve(folder) as server:
        arguments = ("--images", f"{server.url}/00000.tar", "--out", tmp_path / "out")
        arguments = (*arguments, "--cache", tmp_path / "cache", *ARGUMENTS)
        assert extract(*arguments).returncode == 0
        before = shards(tmp_path / "out")
        write_shard(folder, 0, ["coffee", "rocket", "chelsea"])
        done = extract(*arguments)
    assert done.returncode == 2
    assert "holds shards of plan: num_images 2, this is 3" in error_line(done)
    assert shards(tmp_path / "out") == before


def test_a_list_of_captions_here_is_joined_with_tars_behind_a_url(tars: Path, tmp_path: Path):
    root = tmp_path / "cc"
    root.mkdir()
    (root / "Train_GCC-training.tsv").write_text("a cup of coffee\thttps://x/000000000\na cat\thttps://x/000010000\n")
    arguments = ("--dataset", "cc", "--root", root, "--images-per-shard", 2, "--device", "cpu")
    done = extract(*arguments, "--images", tars, "--out", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    with serve(tars.parent) as server:
        url = f"{server.url}/cc3/{{00000..00001}}.tar"
        done = extract(*arguments, "--images", url, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
    assert "shard-000000.tar" in shards(tmp_path / "out")


def test_the_tars_of_a_bucket_are_listed(
    tars: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with s3(tars) as url:
        done = extract("--images", url, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == local
    assert not list(tmp_path.glob("s3:*"))


@pytest.mark.slow
def test_killed_workers_that_share_a_cache_leave_what_the_same_command_completes(
    tars: Path, local: dict[str, bytes], tmp_path: Path
):
    with serve(tars.parent) as server:
        url = f"{server.url}/cc3/{{00000..00001}}.tar"
        arguments = ("--images", url, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *ARGUMENTS[:-1], 2)
        server.faults["00001.tar"] = Fault.STALL  # the process is killed while it waits for half of a tar
        process = start("oscar-extract", *arguments, new_session=True)
        until(lambda: server.gets("00001.tar"), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        server.faults.clear()
        done = oscar("oscar-extract", *arguments)
        assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == local
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_a_worker_process_that_cannot_fetch_ends_the_command_in_a_line(tars: Path, tmp_path: Path):
    with serve(tars.parent) as server:
        arguments = ("--images", f"{server.url}/cc3", "--out", tmp_path / "out", "--cache", tmp_path / "cache")
        arguments = (*arguments, *ARGUMENTS)
        assert extract(*arguments).returncode == 0
        for path in [*(tmp_path / "out").glob("shard-*"), *(tmp_path / "cache").rglob("*.tar")]:
            path.unlink()
        server.faults = {"00000.tar": Fault.CUT, "00001.tar": Fault.CUT}
        failed = oscar("oscar-extract", *arguments, "--workers", 2)
    assert failed.returncode == 1, failed.stderr
    assert "gave up after 5 tries" in error_line(failed)
    assert not shards(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--images", "x", "--out", "s3://bucket/shards"),
            "--out s3://bucket/shards: a URL; give a path on this machine",
        ),
        (("--images", "{url}/cc3/{{00000..00002}}.tar"), "00002.tar: there is no such file"),
        (("--images", "{url}/none"), "write"),
        (("--images", "{url}/cc3/{{0..1.tar"), "a brace is missing"),
        (("--images", "pipe:cat x"), "runs a shell command"),
        (("--dataset", "coco", "--root", "{url}/cc3"), "a URL; give a path on this machine"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(tars: Path, tmp_path: Path, arguments: tuple[str, ...], message: str):
    with serve(tars.parent) as server:
        given = [a.format(url=server.url) for a in arguments]
        done = extract(*given, *(() if "--out" in given else ("--out", tmp_path / "out")), "--cache", tmp_path)
    assert done.returncode == 2
    assert message.replace("write", "name the tars with braces") in error_line(done)
