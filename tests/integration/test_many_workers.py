"""Many processes, each of which knows the folder and nothing else: whatever becomes of them, the bytes are one's."""

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nursery import Nursery
from support import contents, error_line, extract, photo

import oscar_extract
from oscar_extract.folder import prepare
from oscar_extract.folder.claim import (
    GIVEN_BACK,
    WORKING,
    Claim,
    Process,
    claim_numbers,
    claim_path,
    parse_claim,
    read_bytes,
)
from oscar_extract.folder.progress import InWork, progress_of
from oscar_extract.folder.take import holding, make_claim
from oscar_extract.messages import OpenShard

IMAGES, PER_SHARD = 48, 2
WORKERS, KILLS, PAUSES = 10, 12, 3
BUILTIN = Path(oscar_extract.__file__).parent / "builtin"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small photos, and one file that is none."""
    folder = tmp_path_factory.mktemp("images")
    coffee = photo("coffee")
    for number in range(IMAGES - 1):
        coffee.crop((number, number, number + 96, number + 64)).save(folder / f"{number:03}.jpg")
    (folder / "no-image.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The built-in detector for images of the size of a stamp."""
    folder = tmp_path_factory.mktemp("detector")
    config = (BUILTIN / "config.yaml").read_text()
    small = config.replace("MIN_SIZE_TEST: 352", "MIN_SIZE_TEST: 64").replace("MAX_SIZE_TEST: 496", "MAX_SIZE_TEST: 96")
    assert small != config
    (folder / "small.yaml").write_text(small)
    (folder / "names").write_text("\n".join(f"thing {number}" for number in range(80)))
    weights = BUILTIN / "model.safetensors"
    return ["--detector", folder / "small.yaml", "--weights", weights, "--classes", folder / "names"]


@pytest.fixture(scope="module")
def arguments(images: Path, detector: list[object]) -> list[object]:
    return ["--images", images, "--images-per-shard", PER_SHARD, "--device", "cpu", *detector]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    done = extract(*arguments, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out


Hire = Callable[[Path], Nursery]


@pytest.fixture
def hire(tmp_path: Path) -> Iterator[Hire]:
    """Makes a nursery of workers of a folder's job."""
    nurseries = []

    def make(out: Path) -> Nursery:
        nurseries.append(Nursery(out, tmp_path / "logs"))
        return nurseries[-1]

    yield make
    for nursery in nurseries:
        nursery.close()


def plan(arguments: list[object], out: Path) -> Path:
    done = extract(*arguments, "--out", out, "--plan-only")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_ten_workers_killed_and_stopped_at_random_make_what_one_makes(
    arguments: list[object], undisturbed: Path, tmp_path: Path, hire: Hire
):
    """Each on a machine of its own, their clocks minutes apart. Some are stopped until others have taken over."""
    rng = random.Random(0)
    nursery = hire(plan(arguments, tmp_path / "out"))

    def start() -> int:
        return nursery.start(skew=rng.uniform(-300, 300))

    for _ in range(WORKERS):
        start()
    stopped = [rng.choice([*nursery.running]) for _ in range(PAUSES)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for _ in range(KILLS):
        time.sleep(rng.uniform(0, 0.3))
        victim = rng.choice([*nursery.running - {*stopped}])
        os.kill(victim, signal.SIGKILL)
        start()

    codes = Counter()
    while nursery.running:
        if nursery.running <= {*stopped}:
            for pid in nursery.running:
                os.kill(pid, signal.SIGCONT)
        _, code = nursery.wait()
        codes[code] += 1
    assert set(codes) <= {0, -9}, [path.read_text() for path in nursery.logs.iterdir()]

    assert contents(tmp_path / "out") == contents(undisturbed)
    times_named = Counter(nursery.named())
    assert max(times_named.values()) == 1
    assert sum(name.endswith(".tar") for name in times_named) == IMAGES // PER_SHARD


def newest_claims(out: Path) -> list[str]:
    claims = [parse_claim(read_bytes(claim_path(out, *newest))) for newest in claim_numbers(out).items()]
    return [claim.state for claim in claims if claim is not None]


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_gives_the_shard_back_at_once_and_the_exit_code_says_so(
    number: signal.Signals, arguments: list[object], undisturbed: Path, tmp_path: Path, hire: Hire
):
    out = plan(arguments, tmp_path / "out")
    nursery = hire(out)
    worker = nursery.start()
    wait_for(lambda: newest_claims(out) == [WORKING] and progress_of(out).done > 2)
    began = time.monotonic()
    os.kill(worker, number)
    assert nursery.wait() == (worker, 128 + number)
    assert time.monotonic() - began < 2
    assert nursery.printed(worker).splitlines()[-1].startswith(f"error: stopped by {number.name} ")
    assert [*map(str, newest_claims(out))] in ([GIVEN_BACK], [])
    assert not [*out.glob(".tmp-shard-*/*")]

    left = progress_of(out)
    assert (left.in_work, left.is_complete) == ((), False)
    began = time.monotonic()
    another = nursery.start(patience=1000)  # it may not wait until the first one counts as dead
    assert nursery.wait() == (another, 0)
    assert time.monotonic() - began < 30
    assert contents(out) == contents(undisturbed)


def test_a_plan_alone_can_be_joined_and_its_progress_told(arguments: list[object], undisturbed: Path, tmp_path: Path):
    out = plan(arguments, tmp_path / "out")
    assert sorted(contents(out)) == ["_job.json", "_plan.parquet"]
    done = extract("--resume", out, "--check", "--json")
    assert done.returncode == 1
    assert error_line(done) == f"error: {out}: 24 of 24 shards are not done; oscar-extract --resume {out} goes on"
    expected = {"complete": False, "shards": 24, "done": 0, "in_work": [], "left": 24, "images": 48, "images_done": 0}
    assert json.loads(done.stdout).items() >= expected.items()

    moved = out.rename(tmp_path / "moved")
    done = extract("--resume", moved)
    assert done.returncode == 0, done.stderr
    assert "47 in 24 shards" in done.stdout
    assert contents(moved) == contents(undisturbed)
    done = extract("--resume", moved, "--check", "--json")
    assert done.returncode == 0, done.stderr
    expected = {"complete": True, "done": 24, "left": 0, "images_done": 48, "rejects": {"not-an-image": 1}}
    assert json.loads(done.stdout).items() >= expected.items()
    assert "24 of 24" in extract("--resume", moved, "--check").stdout

    progress = progress_of(moved)
    assert len(progress.done_at) == 24
    assert progress.bytes_done == sum(path.stat().st_size for path in moved.glob("*.tar"))

    before = contents(moved)
    done = extract("--resume", moved)  # there is nothing left to do
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("all shards are done, 0 of them by this command")
    assert contents(moved) == before


def test_a_shard_in_work_is_told_with_its_owner(arguments: list[object], tmp_path: Path):
    out = plan(arguments, tmp_path / "out")
    owner = Process(host="n7", pid=4711, machine="elsewhere", started=1)
    make_claim(out, 3, 1, Claim(owner=owner, place=".tmp-a", since=1.5e9))
    make_claim(out, 4, 1, Claim(owner=owner, place=".tmp-a", since=1.5e9, state=GIVEN_BACK))
    progress = progress_of(out)
    assert progress.in_work == (InWork(shard=3, host="n7", pid=4711, since=1.5e9),)
    assert (progress.done, progress.left) == (0, 23)
    assert "shard 000003 at n7, process 4711, since 2017-07-" in extract("--resume", out, "--check").stdout


def test_a_plan_that_others_may_work_on_is_not_changed_without_being_asked(
    arguments: list[object], images: Path, tmp_path: Path
):
    out = plan(arguments, tmp_path / "out")
    before = contents(out)
    for flags, message in (
        (["--batch-size", 4], "holds the plan of a job with batch_size 1, this is 4"),
        (["--detector", "builtin"], "holds the plan of a job with the detector's config"),
        (["--images-per-shard", 5], "holds the plan of plan: images_per_shard 2, this is 5"),
        (["--limit", 5], "holds the plan of plan: num_images 48, this is 5"),
    ):
        done = extract(*arguments, "--out", out, *flags, "--plan-only")
        assert done.returncode == 2
        assert message in error_line(done)
        assert error_line(done).endswith("give another --out, or --overwrite")
        assert contents(out) == before
    done = extract(*arguments, "--out", out, "--images-per-shard", 5, "--plan-only", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert progress_of(out).shards == 10


def test_overwriting_what_somebody_works_on_is_refused(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = plan(arguments, tmp_path / "out")
    monkeypatch.setattr(prepare, "POLL", 0.05)
    with holding(out, out / "shard-000000.tar", OpenShard(shard=0)) as held:
        assert held is not None
        beats = threading.Timer(0.5, held.beat)
        beats.start()
        done = extract(*arguments, "--out", out, "--plan-only", "--overwrite")
        beats.join()
    assert done.returncode == 1
    assert f"error: {out}: process {os.getpid()} at {socket.gethostname()} is working there" in error_line(done)


def test_a_dry_run_at_a_given_rate_needs_no_weights(images: Path):
    """10 to 100 regions an image of 2048 float16, a box, a tag and its score; and what each image takes."""
    given = ["--images", images, "--detector", "vg-r101", "--weights", "not-here.pkl", "--dry-run", "--rate"]
    done = extract(*given, 0.01)
    assert done.returncode == 0, done.stderr
    least, most = (48 * (regions * (2048 * 2 + 16 + 24) + 4096) for regions in (10, 100))
    assert f"{least / 1e6:.1f} MB to {most / 1e6:.1f} MB (10 to 100 regions an image, P = 2048)" in done.stdout
    assert f"{48 / 0.01 / 3600:.1f} at 0.01 images/s" in done.stdout
    assert "48 in 1 shard" in done.stdout
    fixed = extract(*given, 1, "--min-boxes", 36, "--max-boxes", 36, "--dtype", "int8").stdout
    assert f"about {48 * (36 * (2048 + 16 + 24) + 4096) / 1e6:.1f} MB (36 regions an image, P = 2048)" in fixed


def test_what_is_wrong_with_joining_is_one_line(arguments: list[object], tmp_path: Path):
    out = plan(arguments, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "_job.json").write_bytes(b"[1]")
    for flags, message in (
        (["--resume", out, "--min-boxes", 0], "it cannot be given with --min-boxes"),
        (["--resume", out, "--images", "photos"], "it cannot be given with --images"),
        (["--resume", out, "--json"], "--json: it goes with --resume OUT --check"),
        (["--resume", tmp_path / "gone"], f"--resume {tmp_path / 'gone'}: no such folder"),
        (["--resume", tmp_path / "empty"], "no _job.json there"),
        (["--resume", tmp_path / "damaged"], "_job.json is damaged"),
        ([*arguments, "--check"], "--check: it goes with --resume OUT"),
        ([*arguments, "--out", tmp_path / "new", "--rate", 3], "--rate 3: it goes with --dry-run"),
        ([*arguments, "--out", tmp_path / "new", "--plan-only", "--dry-run"], "give one of them"),
    ):
        done = extract(*flags)
        assert done.returncode == 2, flags
        assert message in error_line(done)
    (out / "_plan.parquet").unlink()
    for flags in (["--check"], []):
        done = extract("--resume", out, *flags)
        assert done.returncode == 2
        assert f"{out}/_plan.parquet: cannot be read" in error_line(done)
