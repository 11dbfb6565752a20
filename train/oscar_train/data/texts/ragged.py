"""Rows of different lengths in two flat arrays: millions of token sequences without a Python object each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Row r is `values[offsets[r]:offsets[r + 1]]`. values: int32 [sum of lengths]; offsets: int64 [rows + 1]."""

    values: npt.NDArray[np.int32]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Ints:
        """Length of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def padded(self, rows: Ints, width: int) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return some rows cut at `width`, int32 [len(rows), width] filled up with 0, and their lengths."""
        begin = self.offsets[rows]
        lengths = np.minimum(self.offsets[rows + 1] - begin, width)
        column = np.arange(width)
        inside = column < lengths[:, None]
        source = np.where(inside, begin[:, None] + column, 0)
        values = self.values if len(self.values) else np.zeros(1, np.int32)

        return np.where(inside, values[source], 0).astype(np.int32), lengths

    def take(self, rows: Ints) -> "Ragged":
        """Return some rows, in the order given; a row may be taken more than once."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = _offsets(lengths)
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.values[source], offsets)

    def joined(self, groups: Ints) -> "Ragged":
        """Join neighbouring rows: new row g is rows `groups[g]` to `groups[g + 1]`, one after the other."""
        return Ragged(self.values, self.offsets[groups])

    def cut(self, width: int) -> "Ragged":
        """Keep at most the first `width` values of each row."""
        within = np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)
        return Ragged(self.values[within < width], _offsets(np.minimum(self.lengths, width)))


def ragged(rows: Sequence[Sequence[int]]) -> Ragged:
    """Make a Ragged of lists of whole numbers."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = _offsets(lengths)
    return Ragged(np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1])), offsets)


def concatenated(parts: Iterable[Ragged]) -> Ragged:
    """Put the rows of several Raggeds one after the other."""
    parts = list(parts)
    lengths = np.concatenate([np.zeros(0, np.int64), *(p.lengths for p in parts)])
    return Ragged(np.concatenate([np.zeros(0, np.int32), *(p.values for p in parts)]), _offsets(lengths))


def _offsets(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
