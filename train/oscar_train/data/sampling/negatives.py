"""Texts that replace a triple's own: which triples get one, where it is from, and what does not fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.philox import uniform
from oscar_train.data.sampling.text_pairs import Bools, Sides, Tokens, lengths_of, texts, truncated
from oscar_train.data.texts.ragged import Ints
from oscar_train.objectives import Objective

TRIES = 16  # candidates for another text; if none of them fits, the triple stays matched

Array = npt.NDArray[np.integer[Any]]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Pool:
    """Triples that a text may be taken from, grouped by source.

    triples: [n], sorted; None: all of the corpus. edges, starts: [sources + 1]; of the numbers from 0 to the last edge,
    those between two edges mean the triples between two starts. So a source is drawn from as often as its triples are
    met.
    """

    triples: Array | None
    edges: npt.NDArray[np.float64]
    starts: Ints

    def draw(self, drawn: Words) -> Ints:
        """Turn random words into triples, by all their bits but the last 11."""
        places = np.interp(uniform(drawn) * self.edges[-1], self.edges, self.starts).astype(np.int64)
        chosen: Ints = np.minimum(places, self.starts[-1] - 1)
        return chosen if self.triples is None else self.triples[chosen].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Where another w and another q are drawn from: for each kind of triple a pool, None where nothing is in it."""

    w: tuple[Pool | None, ...]
    q: tuple[Pool | None, ...]


def make_pools(corpus: Corpus, weights: Sequence[Fraction], objective: Objective, only: Array | None = None) -> Pools:
    """Return the pools that an objective draws from, for sources of some weights.

    They are the mapped arrays of the corpus, or none, where these will do; else int32.

    Args:
        only: the triples that may be drawn, sorted; None: all.
    """
    size = len(corpus) if only is None else len(only)
    pools_of = [_among(corpus, pool, only) for pool in corpus.pools]
    with_q = sum(map(len, pools_of))
    needs_w = objective.wrong_w > 0 or with_q < size
    if objective.negatives == "typed":
        w = [_of_kind(corpus, kind, with_q, only) for kind, with_q in enumerate(pools_of)] if needs_w else []
        return Pools(w=_pools(corpus, weights, w), q=_pools(corpus, weights, pools_of))

    all_w = _pools(corpus, weights, [only]) * len(pools_of)
    if objective.negatives == "lines" or with_q == size:
        return Pools(w=all_w, q=all_w)

    return Pools(w=all_w, q=_pools(corpus, weights, [np.sort(np.concatenate(pools_of))]) * len(pools_of))


def _of_kind(corpus: Corpus, kind: int, with_q: Array, only: Array | None) -> Array:
    """Return the triples of a kind, of which `with_q` are those that have a q."""
    if only is not None:
        some: Array = only[corpus.kind[only] == kind]
        return some
    is_of_kind = corpus.kind == kind
    return with_q if np.count_nonzero(is_of_kind) == len(with_q) else np.flatnonzero(is_of_kind).astype(np.int32)


def _among(corpus: Corpus, triples: Array, only: Array | None) -> Array:
    """Return those of some triples that may be drawn."""
    if only is None:
        return triples
    allowed = np.zeros(len(corpus), bool)
    allowed[only] = True
    return triples[allowed[triples]]


def _pools(corpus: Corpus, weights: Sequence[Fraction], of: Sequence[Array | None]) -> tuple[Pool | None, ...]:
    return tuple(_pool(corpus, weights, triples) for triples in of)


def _pool(corpus: Corpus, weights: Sequence[Fraction], triples: Array | None) -> Pool | None:
    starts = corpus.shard_triples[corpus.source_shards]
    starts = starts if triples is None else np.searchsorted(triples, starts)
    shares = np.diff(starts) * [float(weight) for weight in weights]
    keep = [0, *(1 + np.flatnonzero(shares))]  # edges must rise
    return Pool(triples, np.cumsum([0, *shares])[keep], starts[keep]) if len(keep) > 1 else None


def replaced(
    corpus: Corpus, pools: Pools, objective: Objective, triples: Ints, part: Words, candidates: Words
) -> Sides:
    """Return where the texts of some triples are from: their own, or for some of them one that is another's.

    A triple without q gets another w where another would get another q. What replaces a text is drawn from the whole
    corpus (`Objective.negatives` says from which texts): hence texts are as frequent among the wrong as among the
    matched. It is not empty, of another image, and has not the same set of tokens as the triple's own: neither as a
    whole nor after truncation.

    Args:
        triples: [B]. part: [B], random words that decide what is replaced. candidates: [B, TRIES], random words.
    """
    chance = uniform(part)
    wrong = chance < objective.wrong_w + objective.wrong_q
    wrong_w = wrong & ((chance < objective.wrong_w) | (lengths_of(corpus, triples, of_w=False) == 0))
    wrong_q = wrong & ~wrong_w
    lines = objective.negatives == "lines"
    w, q, lent = triples.copy(), triples.copy(), np.zeros(len(triples), bool)
    w[wrong_w], _ = _another(corpus, pools.w, triples[wrong_w], candidates[wrong_w], of_w=True)
    q[wrong_q], lent[wrong_q] = _another(corpus, pools.q, triples[wrong_q], candidates[wrong_q], lines=lines)

    return Sides(w=w, q=q, lent=lent)


def _another(
    corpus: Corpus, pools: Sequence[Pool | None], triples: Ints, drawn: Words, of_w: bool = False, lines: bool = False
) -> tuple[Ints, Bools]:
    """Return for each triple the one whose q, or w, fits in the place of its own, or itself; and which are w.

    Args:
        of_w: whether w is replaced, by w. lines: whether w may replace q.
    """
    other, are_w = triples.copy(), np.full(len(triples), of_w)
    own_texts, len_own = texts(corpus, triples, are_w)
    beside = lengths_of(corpus, triples, not of_w)
    seen_words = _seen(len_own, beside, of_w)
    waiting = np.arange(len(triples))

    for attempt in drawn.T:
        if not len(waiting):
            break

        waiting_triples, words = triples[waiting], attempt[waiting]
        replacements = candidates(corpus, pools, waiting_triples, words)
        as_w = of_w | (words & np.uint64(lines)).astype(bool)  # a bit that the draw leaves
        tokens, lengths = texts(corpus, replacements, as_w)
        remaining = _seen(lengths, beside[waiting], of_w)
        fits = (lengths > 0) & different_images(corpus, replacements, waiting_triples)
        fits &= as_w | (
            corpus.second_set[corpus.second_row[replacements]] != corpus.second_set[corpus.second_row[waiting_triples]]
        )
        fits &= ~alike(own_texts[waiting], seen_words[waiting], tokens, remaining)
        other[waiting[fits]], are_w[waiting[fits]] = replacements[fits], as_w[fits]
        waiting = waiting[~fits]

    return other, are_w


def _seen(lengths: Ints, beside: Ints, of_w: bool) -> Ints:
    """Return how much of texts is seen, w or q, beside others of some length."""
    return truncated(lengths, beside)[0] if of_w else truncated(beside, lengths)[1]


def alike(some: Tokens, seen: Ints, others: Tokens, left: Ints) -> Bools:
    """Say for pairs of texts whether they are the same set of tokens, as a whole or in the first `seen` and `left`."""
    column = np.arange(some.shape[1])
    same: Bools = (set_rows(some) == set_rows(others)).all(1)
    seen_rows, left_rows = some * (column < seen[:, None]), others * (column < left[:, None])
    same |= (set_rows(seen_rows) == set_rows(left_rows)).all(1)
    return same


def set_rows(tokens: Tokens) -> Tokens:
    """Return the set of tokens of each row in a form in which equal sets are equal rows; the shape stays, 0 is none."""
    ordered = np.sort(tokens, 1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = 0
    return np.sort(ordered, 1)


def candidates(corpus: Corpus, pools: Sequence[Pool | None], triples: Ints, drawn: Words) -> Ints:
    """Draw for each triple one from the pool of its kind; where there is none, the triple itself."""
    chosen = triples.copy()
    kinds = corpus.kind[triples]
    for kind, pool in enumerate(pools):
        if pool is not None:
            of_kind = kinds == kind
            chosen[of_kind] = pool.draw(drawn[of_kind])

    return chosen


def different_images(corpus: Corpus, some: Ints, others: Ints) -> Bools:
    """Say for pairs of triples whether they are of different images; one image may be in several sources."""
    a, b, images = corpus.image[some], corpus.image[others], corpus.images
    same_content = (images.content[a] == images.content[b]) & (images.content[a] != 0)
    different: Bools = (a != b) & (images.key_xxh3[a] != images.key_xxh3[b]) & ~same_content
    return different
