"""Many processes, each of which knows the folder and nothing else: whatever becomes of them, the bytes are one's."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nursery import Nursery
from support import contents, extract, photo

import oscar_extract
from oscar_extract.folder.claim import GIVEN_BACK, WORKING, claim_numbers, claim_path, parse_claim, read_bytes
from oscar_extract.folder.progress import progress_of

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
