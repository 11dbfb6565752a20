"""Numbers that stand for sets, so that comparing two sets is comparing two numbers."""

import numpy as np
import numpy.typing as npt

from oscar_train.data.texts.ragged import Ints, Ragged

Words = npt.NDArray[np.uint64]


def set_of(rows: Ragged) -> Words:
    """Return for each row a number that stands for the set of its values, uint64 [rows]."""
    return sums(np.repeat(np.arange(len(rows)), rows.lengths), rows.values, None, len(rows))


def sums(row: Ints, code: npt.NDArray[np.integer], hashes: Words | None, rows: int) -> Words:
    """Sum the hashes of the different codes of each row; `hashes` by code, else the codes are hashed here."""
    pairs = np.sort(row << 32 | code.astype(np.int64))
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # as np.unique, which takes three times as long
    codes = pairs & 0xFFFFFFFF
    totals = np.zeros(rows, np.uint64)
    np.add.at(totals, pairs >> 32, spread(codes.astype(np.uint64)) if hashes is None else hashes[codes])
    return totals


def spread(values: Words) -> Words:
    """Return other numbers for numbers, as random as can be (the finalizer of splitmix64)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
