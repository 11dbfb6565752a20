"""Arrays in files: written bit by bit, whole or absent, and read as mapped memory that processes share."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from numpy.lib import format as npy

BLOCK = 4 << 20  # bytes hashed at once


class GrowingArray:
    """A one-dimensional .npy file to which values are added at its end; `close` says how many there are."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype, self.size = np.dtype(dtype), 0
        self._file = path.open("wb+")
        self._write_header()

    def add(self, values: npt.NDArray[Any]) -> None:
        """Write values behind those that are there."""
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.size += len(values)

    def close(self) -> None:
        """Write the size into the header, for which numpy has left room."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.size,)}
        npy.write_array_header_1_0(self._file, header)


def mapped(path: Path) -> npt.NDArray[Any]:
    """Return an .npy file's array, mapped read-only: only the pages that are used are in memory, once a machine."""
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)  # a memmap's own methods make every slice slow


def seal(path: Path) -> list[int]:
    """Return the size and the XXH3-64 of a file's bytes."""
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return [path.stat().st_size, digest.intdigest()]
