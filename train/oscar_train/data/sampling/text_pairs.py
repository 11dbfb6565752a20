"""The two texts of a triple: whose they are, their tokens, and what a sequence has room for."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oscar_train.batch import MAX_TEXT, MAX_W
from oscar_train.data.corpus import Corpus
from oscar_train.data.texts.ragged import Ints

Tokens = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Which triples the texts of B triples are taken from: their own, or others. Every array is [B].

    w: the triple whose w it is. q: the triple whose q it is; or whose w, where `lent`.
    """

    w: Ints
    q: Ints
    lent: Bools


def texts(corpus: Corpus, triples: Ints, of_w: Bools) -> tuple[Tokens, Ints]:
    """Return w of some triples, q of the others, int32 [n, 33] filled up with 0, and their lengths."""
    tokens = np.empty((len(triples), MAX_W), np.int32)
    lengths = np.empty(len(triples), np.int64)
    for is_from_side, rows, side in ((of_w, triples, corpus.first), (~of_w, corpus.second_row[triples], corpus.second)):
        if is_from_side.any():
            tokens[is_from_side], lengths[is_from_side] = side.padded(rows[is_from_side], MAX_W)
    return tokens, lengths


def lengths_of(corpus: Corpus, triples: Ints, of_w: bool) -> Ints:
    """Return how many tokens w, or q, of each triple has."""
    rows, side = (triples, corpus.first) if of_w else (corpus.second_row[triples], corpus.second)
    lengths: Ints = side.offsets[rows + 1] - side.offsets[rows]
    return lengths


def truncated(len_w: Ints, len_q: Ints, limit: int = MAX_TEXT) -> tuple[Ints, Ints]:
    """Return the lengths left when tokens are taken from the end of the longer of w and q, of q if they are equal,
    until both together have `limit`, or w alone one more: the released code's loop, in closed form."""
    buffer = np.where(len_q == 0, limit + 1, np.maximum(limit - len_q, -(-limit // 2)))
    kept_w = np.minimum(len_w, buffer)
    return kept_w, np.minimum(len_q, np.maximum(limit - kept_w, 0))
