"""Tars of images behind a URL: the shards are those of the same tars in a local folder, whatever the server does."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from remotes import Fault, Server, s3, serve
from support import contents, error_line, extract, photo

from oscar_extract.sources.remote import name_of, tars_of, url_of


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars as img2dataset writes them, of two photos each; the last photo is the first one once more."""
    folder = tmp_path_factory.mktemp("remote") / "shards"
    folder.mkdir()
    names = ["astronaut", "coffee", "chelsea", "rocket", "camera", "astronaut"]
    for number in range(3):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for row, name in enumerate(names[2 * number : 2 * number + 2]):
                buffer = io.BytesIO()
                photo(name).resize((160, 120)).save(buffer, "JPEG")
                for ending, content in ((".jpg", buffer.getvalue()), (".txt", f"a photo of {name}".encode())):
                    member = tarfile.TarInfo(f"{number:05}{row:04}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def server(tars: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(tars, tmp_path / "served" / "shards")
    with serve(tmp_path / "served") as state:
        yield state


def shards_of(out: Path) -> dict[str, bytes]:
    """What a job has made of images, without what says where they were."""
    return {name: content for name, content in contents(out).items() if name.startswith("shard-")}


def job(images: object, out: Path, *more: object) -> list[object]:
    return ["--images", images, "--out", out, "--images-per-shard", 2, "--device", "cpu", "--workers", 1, *more]


@pytest.fixture(scope="module")
def local(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    done = extract(*job(tars, out))
    assert done.returncode == 0, done.stderr
    made = shards_of(out)
    assert len([name for name in made if name.endswith(".tar")]) == 3
    return made


@pytest.mark.parametrize("tail", ["", "/{00000..00002}.tar"])
def test_the_shards_are_those_of_local_tars(server: Server, local: dict[str, bytes], tmp_path: Path, tail: str):
    out = tmp_path / "out"
    done = extract(*job(f"{server.url}/shards{tail}", out, "--cache", tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert shards_of(out) == local
    assert [server.gets(f"{number:05}.tar") for number in range(3)] == [1, 1, 1]  # then they are in the cache


def test_of_s3_too(tars: Path, local: dict[str, bytes], tmp_path: Path):
    with s3(tars) as url:
        done = extract(*job(url, tmp_path / "out", "--cache", tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert shards_of(tmp_path / "out") == local


def test_a_fault_that_passes_changes_nothing(server: Server, local: dict[str, bytes], tmp_path: Path):
    server.faults["00001.tar"], server.times["00001.tar"] = Fault.CUT, 1
    done = extract(*job(f"{server.url}/shards", tmp_path / "out", "--cache", tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert shards_of(tmp_path / "out") == local


def test_a_tar_that_is_gone_ends_the_job_and_the_same_command_continues(
    server: Server, local: dict[str, bytes], tmp_path: Path
):
    line = job(f"{server.url}/shards/{{00000..00002}}.tar", tmp_path / "out", "--cache", tmp_path / "cache")
    server.faults["00002.tar"] = Fault.GONE
    done = extract(*line)
    assert done.returncode == 1
    assert "/shards/00002.tar" in error_line(done)
    assert not list((tmp_path / "out").glob("*.tar"))

    del server.faults["00002.tar"]
    assert extract(*line).returncode == 0
    assert shards_of(tmp_path / "out") == local


def test_a_server_that_fails_in_the_middle_costs_no_image(server: Server, local: dict[str, bytes], tmp_path: Path):
    """A shard is missing whose tar is in no cache any more."""
    line = job(f"{server.url}/shards", tmp_path / "out")
    assert extract(*line, "--cache", tmp_path / "cache").returncode == 0
    for path in (tmp_path / "out").glob("shard-000002.*"):
        path.unlink()
    line += ["--cache", tmp_path / "another"]
    server.faults["00002.tar"] = Fault.DENIED
    done = extract(*line)
    assert done.returncode == 1
    assert "/shards/00002.tar" in error_line(done)
    assert not list((tmp_path / "out").glob("shard-000002.*"))

    del server.faults["00002.tar"]
    assert extract(*line).returncode == 0
    assert shards_of(tmp_path / "out") == local


def test_a_tar_that_changed_makes_another_job(server: Server, tars: Path, tmp_path: Path):
    line = job(f"{server.url}/shards", tmp_path / "out", "--cache", tmp_path / "cache")
    assert extract(*line).returncode == 0
    shutil.copy(tars / "00000.tar", tmp_path / "served" / "shards" / "00002.tar")
    done = extract(*line)
    assert done.returncode == 2
    assert "give another --out, or --overwrite" in error_line(done)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://host/a/{0..2}.jsonl", "of a URL only tars are read"),
        ("https://host/list.parquet", "of a URL only tars are read"),
        ("https://host/{a,b}/0.tar", "give tars of one folder"),
        ("nowhere://host/a", "nowhere:// is not read"),
        ("https://host/{0..2.tar", "its braces cannot be read"),
    ],
)
def test_what_is_not_read_is_one_line(tmp_path: Path, given: str, message: str):
    done = extract(*job(given, tmp_path / "out"))
    assert done.returncode == 2
    assert message in error_line(done)


def test_a_server_without_a_listing_is_told_by_braces(server: Server, tmp_path: Path):
    done = extract(*job(f"{server.url}/nothing", tmp_path / "out"))
    assert done.returncode in (1, 2)
    assert f"{server.url}/nothing" in error_line(done)


def test_a_root_is_a_path_and_a_url_again():
    root, names = tars_of("HTTPS://host:8000/cc3/{00000..00002}.tar")
    assert names == ("00000.tar", "00001.tar", "00002.tar")
    assert url_of(root) == "https://host:8000/cc3"
    assert url_of(root / "00000.tar") == "https://host:8000/cc3/00000.tar"
    assert url_of("/data/https:/cc3") is None
    assert name_of(Path("https:/me:secret@host/cc3")) == "https://***@host/cc3"
