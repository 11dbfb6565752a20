"""Many processes: whoever does a shard, and whatever becomes of them, the folder comes out the same."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from running import Running
from support import EXTRACT, contents, error_line, later_wins, oscar, rejects, start, until

from oscar_extract.folder.claim import GIVEN_BACK, parse_claim, read_bytes
from oscar_extract.messages import Survey
from oscar_extract.workers import local_cluster

FAULTS = Path(__file__).parents[1] / "faults"
MARK = b"this image kills"


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos, and one file that is no image; its bytes kill the decoder where the fault `crash` is put in."""
    folder = tmp_path_factory.mktemp("workers") / "die schönen Bilder"
    shutil.copytree(photos, folder)
    (folder / "size0" / "broken.jpg").write_bytes(b"GIF89a" + MARK)
    return folder


def arguments(images: Path, out: Path, *more: object) -> list[str]:
    return [str(a) for a in ("--images", images, "--out", out, "--images-per-shard", 3, "--device", "cpu", *more)]


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    done = oscar("oscar-extract", *arguments(images, out, "--workers", 1))
    assert done.returncode == 0, done.stderr
    assert [r["reason"] for r in rejects(out)] == ["not-an-image"]
    return out


Launch = Callable[..., Running]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts the command, with a fault put into all its processes; none of them outlives the test."""
    started = []

    def begin(*more: object, fault: str = "", once: Path | None = None) -> Running:
        if not fault:
            started.append(start("oscar-extract", *more, new_session=True))
            return started[-1]
        path = os.pathsep.join(filter(None, (str(FAULTS), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OSCAR_FAULT": fault, "OSCAR_FAULT_ONCE": str(once)}
        line = [sys.executable, "-m", "oscar_extract", *later_wins(EXTRACT, *more)]
        # Whoever runs the tests in the background has Ctrl-C ignored, and so would what they start.
        hears = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        started.append(subprocess.Popen(line, text=True, stdout=-1, stderr=-1, env=environment, **hears))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def workers_at(out: Path, pid: int) -> list[psutil.Process]:
    """The processes below `pid` that are at work on a shard."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if any(
                Path(f.path).name.endswith(".decoding") and Path(f.path).parent == out for f in process.open_files()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def finish(process: Running) -> tuple[str, str]:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return printed, errors


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_its_shard_done_again(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    out = tmp_path / "out"
    process = launch(*arguments(images, out, "--workers", 2))
    until(lambda: workers_at(out, process.pid), process)[0].kill()
    printed, _ = finish(process)
    assert ", 2 processes" in printed
    assert "workers lost" in printed
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_when_the_command_is_killed_its_processes_end_too(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    out = tmp_path / "out"
    process = launch(*arguments(images, out, "--workers", 2))
    until(lambda: workers_at(out, process.pid), process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(below, timeout=10)[1] == []
    again = oscar("oscar-extract", *arguments(images, out, "--workers", 1))
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_ctrl_c_ends_them_all_with_one_line(images: Path, undisturbed: Path, tmp_path: Path, launch: Launch):
    out = tmp_path / "out"
    process = launch(*arguments(images, out, "--workers", 2))
    until(lambda: workers_at(out, process.pid), process)
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted; the same command again continues"
    assert "Traceback" not in errors
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert not [p.name for p in out.iterdir() if p.name == ".lock"]


@pytest.mark.slow
def test_sigterm_ends_them_all_and_gives_their_shards_back_at_once(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    out = tmp_path / "out"
    process = launch(*arguments(images, out, "--workers", 2))
    until(lambda: workers_at(out, process.pid), process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "error: stopped by SIGTERM before all was done; the same command again continues"
    assert psutil.wait_procs(below, timeout=10)[1] == []
    claims = [parse_claim(read_bytes(path)) for path in (out / "_claims").glob("[0-9]*")]
    assert [claim.state for claim in claims if claim] == [GIVEN_BACK] * len(claims)
    again = oscar("oscar-extract", "--resume", out, "--workers", 1)
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_a_gpu_error_ends_one_process_of_several_and_costs_nothing(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    out = tmp_path / "out"
    printed, errors = finish(launch(*arguments(images, out, "--workers", 2), fault="gpu", once=tmp_path / "once"))
    assert "workers lost" in printed
    assert "CUDA error: an illegal memory access" in errors
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_a_gpu_error_of_the_only_process_is_one_line_and_the_next_run_goes_on(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    given = arguments(images, tmp_path / "out", "--workers", 1)
    process = launch(*given, fault="gpu", once=tmp_path / "once")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert errors.startswith("error: the GPU of ")
    assert errors.count("\n") == 1
    finish(launch(*given, fault="gpu", once=tmp_path / "once"))
    assert contents(tmp_path / "out") == contents(undisturbed)


def assert_one_crash(out: Path, undisturbed: Path) -> None:
    assert [(r["path"], r["reason"]) for r in rejects(out)] == [("size0/broken.jpg", "crash")]
    tars = {p.name: p.read_bytes() for p in out.glob("*.tar")}
    assert tars == {p.name: p.read_bytes() for p in undisturbed.glob("*.tar")}


@pytest.mark.slow
def test_an_image_that_kills_its_decoder_is_refused_alone(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    finish(launch(*arguments(images, tmp_path / "out", "--workers", 2), fault="crash"))
    assert_one_crash(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_an_image_that_kills_the_only_process_is_found_out_in_the_next_run(
    images: Path, undisturbed: Path, tmp_path: Path, launch: Launch
):
    given = arguments(images, tmp_path / "out", "--workers", 1)
    process = launch(*given, fault="crash")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGSEGV
    finish(launch(*given, fault="crash"))
    assert_one_crash(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_given_up_and_named(photos: Path, tmp_path: Path, launch: Launch):
    from PIL import Image

    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photos, images)
    Image.new("RGB", (333, 200), "red").save(images / "size0" / "coffee.9.png")
    process = launch(*arguments(images, out, "--workers", 2), fault="die")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "error: shards 000002 were given up" in errors
    assert len(list(out.glob("shard-*.tar"))) == 4
    again = oscar("oscar-extract", *arguments(images, out, "--workers", 1))
    assert again.returncode == 0, again.stderr
    assert len(list(out.glob("shard-*.tar"))) == 5


@pytest.mark.slow
def test_what_is_wrong_with_the_arguments_is_one_line_from_a_worker_too(images: Path, tmp_path: Path):
    (tmp_path / "w.pth").write_bytes(b"not weights")
    given = arguments(
        images, tmp_path / "out", "--detector", "vg-r101", "--weights", tmp_path / "w.pth", "--workers", 2
    )
    done = oscar("oscar-extract", *given)
    assert done.returncode == 2
    assert "w.pth" in error_line(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_full_disk_ends_all_of_them_and_then_the_work_goes_on(
    images: Path, undisturbed: Path, tmp_path: Path, disk: Callable[[str], Path]
):
    out = disk("200k") / "out"
    done = oscar("oscar-extract", *arguments(images, out, "--workers", 2))
    assert done.returncode == 1
    assert "No space left on device" in error_line(done)
    whole = {p.name for p in out.glob("shard-*.tar")}
    assert all((out / name).read_bytes() == (undisturbed / name).read_bytes() for name in whole)
    assert len(whole) < 5
    subprocess.run(["mount", "-o", "remount,size=20m", out.parent], check=True)
    done = oscar("oscar-extract", *arguments(images, out, "--workers", 1))
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(undisturbed)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """A dask scheduler and two workers, started as their users start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    log = (tmp_path / "dask.log").open("wb")
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--no-show"]
    scheduler = subprocess.Popen([*dask, "--host", address], stdout=log, stderr=log, cwd=tmp_path)
    until(lambda: listens(int(address.rpartition(":")[2])), scheduler)
    line = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        address,
        "--no-dashboard",
        "--nthreads",
        "1",
        "--no-nanny",
    ]
    workers = [subprocess.Popen(line, stdout=log, stderr=log, cwd=tmp_path) for _ in range(2)]
    yield address, workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()
    log.close()


def test_a_dask_cluster_that_loses_a_worker_makes_what_one_process_makes(
    images: Path,
    undisturbed: Path,
    tmp_path: Path,
    launch: Launch,
    cluster: tuple[str, list["subprocess.Popen[bytes]"]],
):
    address, workers = cluster
    out = tmp_path / "out"
    process = launch(*arguments(images, out, "--scheduler", address))
    busy = until(lambda: [w for w in workers if _works(w, out)], process)
    busy[0].kill()
    printed, _ = finish(process)
    assert "workers lost" in printed
    assert contents(out) == contents(undisturbed)


def _works(process: "subprocess.Popen[bytes]", out: Path) -> bool:
    return any(
        f.path.startswith(f"{out}/") and f.path.endswith(".decoding") for f in psutil.Process(process.pid).open_files()
    )


@pytest.mark.slow
def test_each_process_has_a_gpu_of_its_own():
    """Which CUDA device a process sees is settled before torch is loaded in it; the devices need not be there."""
    survey = Survey(manifest=None, device="", images_per_second=1, bytes_per_image=1, memory=1)  # type: ignore[arg-type]
    with local_cluster(3, ["4", "GPU-5", "7"], 3) as workers:
        assert workers.grow(survey) == (3, 1)
        workers.client.wait_for_workers(3, timeout=60)
        seen = workers.client.run(_devices)
    assert sorted(seen.values()) == [("4", False), ("7", False), ("GPU-5", False)]


def _devices() -> tuple[str, bool]:
    return os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules


@pytest.mark.slow
def test_no_scheduler_is_one_line(images: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    done = oscar("oscar-extract", *arguments(images, tmp_path / "out", "--scheduler", address))
    assert done.returncode == 2
    assert f"--scheduler {address}: no dask scheduler answers there" in error_line(done)
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out").exists()
