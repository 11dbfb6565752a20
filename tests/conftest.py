"""Fixtures that several tests share."""

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU its kernels are interpreted; counts while Triton is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the commands set it: torch reads it when it is imported

import numpy as np
import pytest
from support import photo

if TYPE_CHECKING:
    import torch

CACHE = tempfile.TemporaryDirectory(prefix="oscar-test-cache-")


def pytest_configure() -> None:
    """Give the commands of this run, in this process and in others, a cache of their own."""
    os.environ["XDG_CACHE_HOME"] = CACHE.name


def pytest_unconfigure() -> None:
    CACHE.cleanup()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 real JPEG files in two sub-folders: four photos in three sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, width in enumerate((256, 320, 400)):
        for name in ("astronaut", "coffee", "chelsea", "rocket"):
            image = photo(name)
            image = image.resize((width, round(image.height * width / image.width)))
            path = folder / f"size{number % 2}" / f"{name}.{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            image.save(path, quality=90)
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Has a file made by one process of those that share out the tests, for all of them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def path_of(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return path_of


@pytest.fixture(scope="session")
def states(once: Callable[[str, Callable[[Path], object]], Path]) -> "dict[str, dict[str, torch.Tensor]]":
    """Random state dicts of the published detectors' families, in their own names; not to be changed."""
    import torch  # here, as the process that shares out the tests needs none of it
    from small_detectors import state_of

    families = ("milvlg-caffe", "milvlg-r152", "airsplay", "milvlg-d2", "vinvl")
    path = once("states.pt", lambda path: torch.save({family: state_of(family) for family in families}, path))
    return torch.load(path)


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of so many bytes ("64k")."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a file system")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)
