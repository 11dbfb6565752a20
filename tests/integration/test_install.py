"""The built wheel, installed into another environment and run from `/`, works as the checkout does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "pipelines.yaml", "common", "shards", "extract", "train", "submit"]


def run(*command: str | Path) -> str:
    """Run a command from `/`, without the caller's import path, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, which is built from a copy of the checkout."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, sources / name, symlinks=True)
        else:
            shutil.copy(CHECKOUT / name, sources)
    run(sys.executable, "-m", "build", "--no-isolation", sources)
    (path,) = (sources / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a fresh environment: this project from the wheel, what it depends on from the present one."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # A folder that a .pth file adds comes last and its own .pth files are not read, so neither an editable nor a
    # plain installation of this project in it is seen.
    present = sysconfig.get_path("purelib")
    here = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(here, "present.pth").write_text(f"{present}\n")
    return environment / "bin"


def test_packages_come_from_the_wheel(bin_folder: Path) -> None:
    names = ["oscar_common", "oscar_shards", "oscar_extract", "oscar_train", "oscar_submit"]
    statement = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)}, sep='\\n')"
    for path in run(bin_folder / "python", "-c", statement).splitlines():
        assert Path(path).is_relative_to(bin_folder.parent)


@pytest.mark.parametrize(
    "member",
    [
        "oscar_common/pipelines.yaml",
        "oscar_common/py.typed",
        "oscar_common/vocab/vocab.txt",
        "oscar_shards/py.typed",
        "oscar_shards/pages/page.css",
        "oscar_shards/pages/page.js",
        "oscar_extract/py.typed",
        "oscar_extract/builtin/config.yaml",
        "oscar_extract/builtin/model.safetensors",
        "oscar_extract/builtin/MODEL_CARD.md",
        "oscar_train/py.typed",
        "oscar_submit/py.typed",
        "oscar_submit/templates/train.sh",
    ],
)
def test_wheel_carries_the_file(wheel: Path, member: str) -> None:
    (original,) = (path for path in CHECKOUT.glob(f"*/{member}"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(member) == original.read_bytes()


@pytest.mark.parametrize("command", ["oscar-extract", "oscar-train"])
def test_help(bin_folder: Path, command: str) -> None:
    assert command in run(bin_folder / command, "--help")


def test_module_help(bin_folder: Path) -> None:
    assert "--images" in run(bin_folder / "python", "-m", "oscar_extract", "--help")


def test_from_a_photo_to_a_checkpoint(bin_folder: Path, tmp_path: Path) -> None:
    skimage = pytest.importorskip("skimage")
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(Path(skimage.data_dir, "astronaut.png"), images)
    (images / "astronaut.txt").write_text("A smiling woman in an orange space suit.\n")
    shards, out = tmp_path / "shards", tmp_path / "train"
    run(bin_folder / "oscar-extract", "--images", images, "--captions", "txt", "--out", shards)
    assert list(shards.glob("*.tar"))
    flags = ["--init", "random:tiny", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    run(bin_folder / "oscar-train", "--shards", shards, "--out", out, *flags)
    assert list(out.rglob("*.safetensors"))
