"""Photos that are not in shards yet: oscar-extract makes some, once for each state of a folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import cache_folder, no_folder
from oscar_train.texts.arrays import digest

NAME = "photos"  # of the folder in the cache


def extracted(images: Path, cache: Path | None, detector: str) -> Path:
    """Return a folder of shards of the photos in a folder, made now unless it is there.

    Raises:
        UsageError: there is no such folder.
        OperationError: they cannot be extracted; oscar-extract has said why.
    """
    if not images.is_dir():
        raise UsageError(f"--images {images}: {no_folder(images)}; give the one that has the photos")
    state = digest((detector, sorted(_files(images.resolve()))))
    shards = cache_folder(cache) / NAME / f"{images.resolve().name}-{state[:16]}"

    command = [sys.executable, "-m", "oscar_extract", "--images", str(images), "--out", str(shards)]
    done = subprocess.run([*command, "--detector", detector], stdout=sys.stderr)
    if done.returncode:
        raise OperationError(f"--images {images}: oscar-extract failed with exit code {done.returncode}")
    return shards


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Yield what changes when a photo does: the path, size and time of each file."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            status = path.stat()
            yield str(path), status.st_size, status.st_mtime_ns
