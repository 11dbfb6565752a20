"""Triples as text: order, tag replacement, truncation, masking. Pure functions of (seed, epoch, place)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_train.corpus import Corpus
from oscar_train.draws import SAMPLE, below, uniform, words
from oscar_train.phrases import MAX_TEXT
from oscar_train.ragged import Ints
from oscar_train.tokens import Tokenizer

MAX_TOKENS = MAX_TEXT + 3
MASK_RATE = 0.15
POLLUTE_RATE = 0.5
MATCHED, POLLUTED = 0, 1  # as the released code and BERT's next-sentence head, whose class 0 is "is next"
IGNORED = -100  # label of a token that is not to be predicted; what torch's cross entropy leaves out
TRIES = 16  # candidates for another q; if all equal the triple's own, the triple stays matched

# Which of a place's random words are for what
_MASK = slice(0, MAX_TOKENS)
_ACTION = slice(MAX_TOKENS, 2 * MAX_TOKENS)
_TOKEN = slice(2 * MAX_TOKENS, 3 * MAX_TOKENS)
_POLLUTE = 3 * MAX_TOKENS
_CANDIDATES = slice(_POLLUTE + 1, _POLLUTE + 1 + TRIES)
_WIDTH = -(-_CANDIDATES.stop // 4) * 4

Tokens = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """B triples as text, before any tensor: `[CLS] w [SEP] q [SEP]`, filled up with [PAD].

    input_ids, token_type_ids, mlm_labels: [B, 35]; attention_mask: bool [B, 35]; match_labels: int64 [B].
    """

    input_ids: Tokens
    token_type_ids: Ints
    attention_mask: Bools
    mlm_labels: Ints
    match_labels: Ints


@dataclass(frozen=True)
class Pool:
    """The triples of one kind that another's q may be taken from, grouped by source.

    triples: [n]. edges, starts: [sources + 1]; of the numbers from 0 to the last edge, those between two edges mean the
    triples between two starts. So a source is drawn from as often as its triples are met.
    """

    triples: npt.NDArray[np.integer[Any]]
    edges: npt.NDArray[np.float64]
    starts: Ints

    def draw(self, drawn: Words) -> Ints:
        """Turn random words into triples."""
        places = np.interp(uniform(drawn) * self.edges[-1], self.edges, self.starts).astype(np.int64)
        found: Ints = self.triples[np.minimum(places, len(self.triples) - 1)].astype(np.int64)
        return found


def make_pools(corpus: Corpus, weights: Sequence[Fraction]) -> list[Pool]:
    """Return the pool of each kind of text, for sources of some weights."""
    pools = []
    for triples in corpus.pools:
        starts = np.searchsorted(triples, corpus.shard_triples[corpus.source_shards])
        shares = np.diff(starts) * [float(weight) for weight in weights]
        keep = [0, *(1 + np.flatnonzero(shares))]  # edges must rise
        pools.append(Pool(triples, np.cumsum([0, *shares])[keep], starts[keep]))
    return pools


def assemble(corpus: Corpus, pools: Sequence[Pool], triples: Ints, seed: int, epoch: int, place: int) -> TextBatch:
    """Build the text of `triples`, which stand at `place`, `place + 1`, ... of an epoch's order.

    Half of the triples get another q (Oscar section 3.1, contrastive loss); then 15 % of the tokens of w and q are
    masked (section 3.1, masked token loss), also where q is polluted.
    """
    drawn = words(seed, SAMPLE, epoch, place, len(triples), _WIDTH)
    own = corpus.second_row[triples]
    rows = polluted(corpus, pools, triples, drawn)
    w, q, len_w, len_q = _visible(corpus, triples, rows)
    ids, types, maskable = joined(corpus.tokenizer, w, q, len_w, len_q)
    input_ids, labels = masked(corpus.tokenizer, ids, maskable, drawn)
    return TextBatch(
        input_ids=input_ids,
        token_type_ids=types,
        attention_mask=np.arange(MAX_TOKENS) < (len_w + len_q + 3)[:, None],
        mlm_labels=labels,
        match_labels=np.where(rows == own, MATCHED, POLLUTED),
    )


def polluted(corpus: Corpus, pools: Sequence[Pool], triples: Ints, drawn: Words) -> Ints:
    """Return the row of `corpus.second` that each triple takes its q from: its own, or for half of them another's.

    Another q is that of a triple drawn from the whole corpus: hence tag sequences are as frequent among the polluted as
    among the matched. It is of the same kind (tags for captions, answers for questions), not empty, of another image,
    and neither as a whole nor after truncation has it the same tags, or words, as the triple's own.
    """
    rows = corpus.second_row[triples]
    own = set_rows(_visible(corpus, triples, rows)[1])
    waiting = np.flatnonzero(uniform(drawn[:, _POLLUTE]) < POLLUTE_RATE)
    for attempt in drawn[:, _CANDIDATES].T:
        if not len(waiting):
            break
        mine = triples[waiting]
        candidates = _candidates(corpus, pools, mine, attempt[waiting])
        others = corpus.second_row[candidates]
        fits = _different_images(corpus, candidates, mine)
        fits &= corpus.second_set[others] != corpus.second_set[corpus.second_row[mine]]
        fits &= (set_rows(_visible(corpus, mine, others)[1]) != own[waiting]).any(1)
        rows[waiting[fits]] = others[fits]
        waiting = waiting[~fits]
    return rows


def set_rows(tokens: Tokens) -> Tokens:
    """Return the set of tokens of each row in a form in which equal sets are equal rows; the shape stays, 0 is none."""
    ordered = np.sort(tokens, 1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = 0
    return np.sort(ordered, 1)


def _candidates(corpus: Corpus, pools: Sequence[Pool], triples: Ints, drawn: Words) -> Ints:
    """Draw for each triple one of its kind; where there is none, the triple itself."""
    found = triples.copy()
    kinds = corpus.kind[triples]
    for kind, pool in enumerate(pools):
        if len(pool.triples):
            mine = kinds == kind
            found[mine] = pool.draw(drawn[mine])
    return found


def _different_images(corpus: Corpus, some: Ints, others: Ints) -> Bools:
    """Say for pairs of triples whether they are of different images; one image may be in several sources."""
    a, b, images = corpus.image[some], corpus.image[others], corpus.images
    same_content = (images.content[a] == images.content[b]) & (images.content[a] != 0)
    different: Bools = (a != b) & (images.key_xxh3[a] != images.key_xxh3[b]) & ~same_content
    return different


def truncated(len_w: Ints, len_q: Ints, limit: int = MAX_TEXT) -> tuple[Ints, Ints]:
    """Return the lengths left when tokens are taken from the end of the longer of w and q, of q if they are equal,
    until both together have `limit`: the released code's loop, in closed form."""
    kept_w = np.minimum(len_w, np.maximum(limit - len_q, -(-limit // 2)))
    return kept_w, np.minimum(len_q, limit - kept_w)


def _visible(corpus: Corpus, triples: Ints, rows: Ints) -> tuple[Tokens, Tokens, Ints, Ints]:
    """Return w and q as the model sees them, int32 [B, 32] filled up with 0, and their lengths."""
    w, len_w = corpus.first.padded(triples, MAX_TEXT)
    q, len_q = corpus.second.padded(rows, MAX_TEXT)
    len_w, len_q = truncated(len_w, len_q)
    column = np.arange(MAX_TEXT)
    return w * (column < len_w[:, None]), q * (column < len_q[:, None]), len_w, len_q


def joined(tokenizer: Tokenizer, w: Tokens, q: Tokens, len_w: Ints, len_q: Ints) -> tuple[Tokens, Ints, Bools]:
    """Return `[CLS] w [SEP] q [SEP]`, [B, 35]: ids, token types (1 after the first [SEP]), and which are w or q."""
    place = np.arange(MAX_TOKENS)[None]
    first_sep, last_sep = len_w[:, None] + 1, (len_w + len_q)[:, None] + 2
    in_w, in_q = (place > 0) & (place < first_sep), (place > first_sep) & (place < last_sep)
    ids = np.full((len(w), MAX_TOKENS), tokenizer.pad, np.int32)
    ids[in_w] = w[np.arange(MAX_TEXT) < len_w[:, None]]
    ids[in_q] = q[np.arange(MAX_TEXT) < len_q[:, None]]
    ids[:, 0] = tokenizer.cls
    ids[(place == first_sep) | (place == last_sep)] = tokenizer.sep
    return ids, (in_q | (place == last_sep)).astype(np.int64), in_w | in_q


def masked(tokenizer: Tokenizer, ids: Tokens, maskable: Bools, drawn: Words) -> tuple[Tokens, Ints]:
    """Choose 15 % of the tokens, each on its own; of these 80 % become [MASK], 10 % any token, 10 % stay.

    Where that chooses none of a triple's tokens, the one that was nearest to being chosen is taken, as BERT takes at
    least one: every triple is in both losses, and a batch never lacks a masked token.

    Returns:
        ids with masks, and labels: the token that was there, or -100 where nothing is to be predicted; [B, 35].
    """
    chance = np.where(maskable, uniform(drawn[:, _MASK]), 2.0)
    nearest = np.arange(MAX_TOKENS) == chance.argmin(1)[:, None]
    chosen = (chance < MASK_RATE) | (nearest & (chance.min(1) < 1)[:, None])
    action = uniform(drawn[:, _ACTION])
    token = np.where(action < 0.8, tokenizer.mask, np.where(action < 0.9, below(drawn[:, _TOKEN], tokenizer.size), ids))
    return np.where(chosen, token, ids).astype(np.int32), np.where(chosen, ids, IGNORED).astype(np.int64)
