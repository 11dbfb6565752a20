"""Image files of the same bytes under two names: found before anything is extracted, so that it happens once."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from oscar_common.tables import Ints
from oscar_extract.sources.remote import File, RemoteFile, RemoteTars, Root, opened

HEAD = 16 << 10
TOGETHER = 2048  # files that a thread looks at in one go
THREADS = 16  # they wait for the disk


def twins(roots: list[Root], files: pa.Table) -> Ints:
    """Return for each file (schema FILES) the first one with the same bytes, itself if there is none before; int64 [F].

    Only files of one size with the same first 16 kB are read to the end. A file that cannot be read, or is empty, has
    no twin.
    """
    parts = [files.slice(n, TOGETHER) for n in range(0, len(files), TOGETHER)]
    with ThreadPoolExecutor(THREADS) as pool:
        heads = np.concatenate([np.zeros((0, 2), np.uint64), *pool.map(partial(_heads, roots), parts)])
        suspects = np.flatnonzero(_repeated(heads) & (heads[:, 0] > 0))
        wholes = list(pool.map(_whole, _places(roots, files.take(pa.array(suspects)))))

    first: dict[Any, int] = {}
    result = np.arange(len(files))
    for number, whole in zip(suspects.tolist(), wholes, strict=True):
        if whole is not None:
            result[number] = first.setdefault((int(heads[number, 0]), whole), number)

    return result


Bytes = tuple[File, int, int | None]  # a file, where the image begins in it, and its size if it is not all of the file


def locate(roots: list[Root], root: int, path: str, raw: bytes | None, offset: int | None, size: int | None) -> Bytes:
    """Return where the bytes of a row of the schema FILES are."""
    name = path if raw is None else os.fsdecode(raw)
    place = roots[root]
    if isinstance(place, RemoteTars):
        return RemoteFile(place, name), offset or 0, size
    return place / name if name else place, offset or 0, size


def _places(roots: list[Root], files: pa.Table) -> list[Bytes]:
    columns = [files[n].to_pylist() for n in ("root", "path", "raw", "offset", "size")]
    return [locate(roots, *row) for row in zip(*columns, strict=True)]


def _repeated(heads: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return which of the files look like another, bool [N]."""
    mixed = heads[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ heads[:, 1]
    _, group, counts = np.unique(mixed, return_inverse=True, return_counts=True)
    repeated: npt.NDArray[np.bool_] = counts[group] > 1
    return repeated


def _heads(roots: list[Root], files: pa.Table) -> npt.NDArray[np.uint64]:
    """Return size and hash of the first bytes of each file, uint64 [N, 2]; zeros for one that cannot be read."""
    heads = np.zeros((len(files), 2), np.uint64)
    for file, members in groupby(zip(heads, _places(roots, files), strict=True), lambda member: member[1][0]):
        with opened(file) as path, suppress(OSError, ValueError):  # ValueError: a zero byte in the path
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
            try:
                for row, (_, offset, size) in members:
                    row[:] = _head(handle, offset, size)
            finally:
                os.close(handle)

    return heads


def _head(handle: int, offset: int, size: int | None) -> tuple[int, int]:
    try:
        head = os.pread(handle, HEAD if size is None else min(size, HEAD), offset)
        return os.fstat(handle).st_size if size is None else size, xxhash.xxh3_64_intdigest(head)
    except OSError:
        return 0, 0


def _whole(place: Bytes) -> bytes | None:
    """Return the hash of all of a file, or None if it cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        for block in _blocks(*place):
            digest.update(block)
    except (OSError, ValueError):
        return None

    return digest.digest()


def _blocks(place: File, offset: int, size: int | None) -> Iterator[bytes]:
    with opened(place) as path, open(path, "rb") as file:
        file.seek(offset)
        remaining = size
        while block := file.read(1 << 20 if remaining is None else min(remaining, 1 << 20)):
            yield block
            remaining = None if remaining is None else remaining - len(block)
