"""What the tests share: real photos, and the commands as a user runs them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def photo(name: str) -> Image.Image:
    """A photo that scikit-image carries: astronaut, coffee, chelsea (a cat) or rocket."""
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def oscar(*arguments: object, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """Run `oscar-extract ...` or `oscar-train ...` in this environment."""
    module, *rest = map(str, arguments)
    command = [sys.executable, "-m", module.replace("-", "_"), *rest]
    return subprocess.run(command, text=True, capture_output=True, timeout=timeout)


def error_line(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line on stderr of a command that failed; fails if there is more than progress around it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines, done.stdout
    assert sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[-1]


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


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(0)
