"""Photos for people to look at: found in a folder that the user named, and made small. Neither side is trusted."""

import base64
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")  # none that starts a program
SIDE = 720  # pixels of the longer side in a page


def find_photos(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path | None]:
    """Return where the photo of each image lies in `folder`, if anywhere.

    It is the row's path there, else a file of that name anywhere below, else one whose name without suffix is the
    image's id or key. The folder is listed at most once. No path leads out of it, by "..", as an absolute one or by a
    link.
    """
    root = folder.resolve()
    direct = [_direct(root, row.get("path")) for row in rows]
    unmatched = [row for row, match in zip(rows, direct, strict=True) if match is None]
    listed = _listed(root, {name for row in unmatched for name in _names(row)}) if unmatched else {}
    elsewhere = ((listed[name] for name in _names(row) if name in listed) for row in rows)
    return [match or next(candidates, None) for match, candidates in zip(direct, elsewhere, strict=True)]


def _direct(root: Path, path: object) -> Path | None:
    if not isinstance(path, str) or not path or "\0" in path:
        return None
    return _inside(root, root / path) if not Path(path).is_absolute() and ".." not in Path(path).parts else None


def _inside(root: Path, path: Path) -> Path | None:
    """Return a path without its links if it is that of a file below `root`."""
    try:
        real = path.resolve()
        return real if real.is_relative_to(root) and real.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, not to be encoded, links in a circle
        return None


def _names(row: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield what a file of this image may be called, the likeliest first: (whether with its suffix, name)."""
    path = row.get("path")
    if isinstance(path, str) and path:
        yield True, path.rpartition("/")[2]
    yield from ((False, str(row[name])) for name in ("id", "key") if row.get(name))


def _listed(root: Path, names: set[tuple[bool, str]]) -> dict[tuple[bool, str], Path]:
    """Walk through a folder for files of the wanted names; the first in the order of names counts."""
    by_name: dict[tuple[bool, str], Path] = {}
    for place, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            for form in ((True, name), (False, name.rpartition(".")[0] or name)):
                if form in names and form not in by_name and (path := _inside(root, Path(place, name))):
                    by_name[form] = path

    return by_name


def embedded(photos: Iterable[Path | None]) -> Iterator[tuple[str, int, int] | None]:
    """Yield each photo as (data: URL, width, height), upright and small; None where it is none that can be shown."""
    for path in photos:
        yield _embedded(path) if path else None


@lru_cache
def _formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _embedded(path: Path) -> tuple[str, int, int] | None:
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as image:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))  # JPEG can be decoded at a fraction of its size
                image.thumbnail((SIDE, SIDE))
                small = ImageOps.exif_transpose(image).convert("RGB")

        small.save(buffer, "JPEG", quality=82)
    except Exception:  # whatever a damaged file makes a decoder raise: the boxes are shown without it
        return None

    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), small.width, small.height
