"""Random numbers without state: what belongs to a place in an epoch is computed from (seed, epoch, place) alone.

Philox (Salmon et al. 2011) is a counter-based generator: word i of a stream is a hash of (key, i). A place in an epoch
owns a fixed run of words, so the draws for it are the same in whatever batch, process or rank they are asked for, and
resuming a run needs no saved generator.
"""

import numpy as np
import numpy.typing as npt

BLOCK = 4  # 64-bit words that Philox4x64 makes from one value of its counter
SHARDS, WINDOW, MIX, SAMPLE, EVALUATION = range(5)  # what a stream is for; each has its own key


def words(
    seed: int, purpose: int, epoch: int, first: int, rows: int, width: int, lane: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.uint64]:
    """Return the words of an epoch's places from `first` on, uint64 [rows, width]; `width` is a multiple of 4.

    Each lane of an epoch has words of its own.
    """
    key = np.array([seed, purpose << 32 | epoch], np.uint64)
    counter = np.array([first * (width // BLOCK), *lane, 0], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(rows * width)
    return np.asarray(raw, np.uint64).reshape(rows, width)


def uniform(drawn: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Turn words into numbers of [0, 1), as numpy does: the upper 53 bits."""
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(drawn: npt.NDArray[np.uint64], bound: int) -> npt.NDArray[np.int64]:
    """Turn words into whole numbers of [0, bound); the bias is under bound / 2^64."""
    return (drawn % np.uint64(bound)).astype(np.int64)


def permutation(
    seed: int, purpose: int, epoch: int, size: int, lane: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.int64]:
    """Return the numbers below `size` in the order of that many words, int64 [size].

    A word's last bits become its own number, so that sorting the words themselves (which is several times as fast as
    asking for their ranks) brings the numbers along, and none are equal: no release of numpy can change the order.
    """
    keys = words(seed, purpose, epoch, 0, size // BLOCK + 1, BLOCK, lane).ravel()[:size]
    number = np.uint64((1 << size.bit_length()) - 1)
    keys &= ~number
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    keys &= number

    return keys.view(np.int64)
