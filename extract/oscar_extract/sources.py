"""The images of a job: every image file of a folder, with an id that no other file shares."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oscar_common.errors import UsageError
from oscar_extract.images import EXTENSIONS


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image file: `path` is relative to the images folder, `id` is the path without its extension."""

    path: str
    id: str


def list_images(folder: Path) -> list[Source]:
    """Return the image files under `folder`, sorted by path: known extensions or none at all, no hidden files.

    A file that is reached twice through symbolic links counts once.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: no such folder")
    paths, others = [], 0
    seen: set[str] = set()
    for path in sorted(_files(folder)):
        if Path(path).suffix.lower() not in EXTENSIONS:
            others += 1
        elif (real := os.path.realpath(folder / path)) not in seen:
            seen.add(real)
            paths.append(path)
    if not paths:
        endings = " ".join(sorted(EXTENSIONS - {""}))
        raise UsageError(f"--images {folder}: no image in it, only {others} other files; looked for {endings}")
    return [Source(path=p, id=i) for p, i in zip(paths, _ids(paths), strict=True)]


def _files(folder: Path) -> Iterator[str]:
    """Yield relative paths of regular, visible files; links to folders are followed, but not in circles."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            path = Path(place, file)
            if not file.startswith(".") and path.is_file():
                yield str(path.relative_to(folder))


def _ids(paths: list[str]) -> list[str]:
    """Return each path without its extension, or whole where a.jpg and a.png (or a file called a) would share it."""
    stems = [os.path.splitext(p)[0] for p in paths]
    count, whole = Counter(stems), set(paths)
    return [
        readable(s if count[s] == 1 and (s == p or s not in whole) else p) for p, s in zip(paths, stems, strict=True)
    ]


def readable(path: str) -> str:
    """Return a path as text that can be stored: bytes of a name that are no UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
