"""What a triple's text looks like, and how its tokens are masked: against the papers' words and the releases' rules."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from oscar_train.batch import IGNORED, MAX_TEXT, MAX_TOKENS, MAX_W
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.negatives import make_pools
from oscar_train.data.sampling.philox import SAMPLE, words
from oscar_train.data.sampling.text_pairs import truncated
from oscar_train.data.sampling.triples import _WIDTH, TextBatch, assemble, joined, masked
from oscar_train.data.texts.ragged import ragged
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.objectives import OSCAR, TABLE, Objective

RELEASE = TABLE["oscar", "release"]
SIGMAS = 5  # a right count lies further off once in a million and a half


def within(count: int, of: int, rate: float) -> bool:
    """Whether so many of independent events of some rate are likely enough."""
    return abs(count - of * rate) <= SIGMAS * math.sqrt(of * rate * (1 - rate))


def test_truncation_is_the_releases_loop():
    for limit in (7, 8, MAX_TEXT):
        for a in range(2 * limit):
            for b in range(2 * limit):
                w, q = list(range(a)), list(range(b))
                while len(w) + len(q) > (limit if b else limit + 1):  # a second [SEP] only where there is a q
                    (w if len(w) > len(q) else q).pop()
                assert tuple(map(int, truncated(np.int64(a), np.int64(b), limit))) == (len(w), len(q)), (a, b, limit)


def test_the_layout_is_cls_w_sep_q_sep_pad(tokenizer: Tokenizer, rng: np.random.Generator):
    w, q = (rng.integers(at, at + 1000, (60, MAX_W)).astype(np.int32) for at in (1000, 2000))
    len_w, len_q = truncated(rng.integers(1, MAX_W + 1, 60), rng.integers(0, MAX_TEXT, 60) * (np.arange(60) % 3 > 0))
    len_w[0] = MAX_W  # beside no q
    ids, types, inside, maskable = joined(tokenizer, w, q, len_w, len_q)
    for row in range(60):
        a, b = w[row, : len_w[row]].tolist(), q[row, : len_q[row]].tolist()
        second = [*b, tokenizer.sep] if b else []
        padding = MAX_TOKENS - len(a) - len(second) - 2
        assert ids[row].tolist() == [tokenizer.cls, *a, tokenizer.sep, *second] + [tokenizer.pad] * padding
        assert types[row].tolist() == [0] * (len(a) + 2) + [1] * len(second) + [0] * padding
        assert inside[row].tolist() == [1] * (MAX_TOKENS - padding) + [0] * padding
        ends = [0] * bool(b)
        assert maskable[row].tolist() == [0] + [1] * len(a) + [0] + [1] * len(b) + ends + [0] * padding


def test_w_alone_has_room_for_33_tokens(corpus: Corpus):
    long = ragged([range(2000 + n, 2040 + n) for n in range(len(corpus))])
    none = ragged([[] for _ in range(len(corpus.second))])
    empty = tuple(pool[:0] for pool in corpus.pools)
    bare = dataclasses.replace(corpus, first=long, second=none, pools=empty)
    batch = text(bare, OSCAR, np.arange(len(corpus)))
    assert batch.attention_mask.all()
    ids = np.where(batch.mlm_labels == IGNORED, batch.input_ids, batch.mlm_labels)
    starts = ids[:, 1] - 2000
    cls, sep = corpus.tokenizer.cls, corpus.tokenizer.sep
    assert all(row.tolist() == [cls, *range(2000 + n, 2033 + n), sep] for row, n in zip(ids, starts, strict=True))
    changed = starts != np.arange(len(corpus))
    assert (changed == (batch.match_labels == 0)).all()
    assert within(changed.sum(), len(corpus), 0.5)


def text(corpus: Corpus, objective: Objective, triples: np.ndarray, seed: int = 1, place: int = 0) -> TextBatch:
    pools = make_pools(corpus, [Fraction(1)], objective)
    return assemble(corpus, pools, objective, triples, seed=seed, epoch=2, place=place)


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """The random words of 40,000 places."""
    return words(42, SAMPLE, 0, 0, 40_000, _WIDTH)


@pytest.mark.parametrize("objective", [OSCAR, RELEASE], ids=["paper", "release"])
def test_masks_have_berts_proportions(tokenizer: Tokenizer, drawn: np.ndarray, objective: Objective):
    ids = np.full((len(drawn), MAX_TOKENS), 5000, np.int32)
    maskable = np.zeros(ids.shape, bool)
    maskable[:, 1:31] = True
    result, labels = masked(tokenizer, objective, ids, maskable, drawn)
    chosen = labels != IGNORED
    assert maskable.sum() > 1_000_000
    assert not chosen[~maskable].any()
    assert (labels[chosen] == 5000).all()
    assert (result[~chosen] == 5000).all()
    assert within(chosen.sum(), maskable.sum(), 0.15)
    assert all(within(count, len(drawn), 0.15) for count in chosen.sum(0)[1:31])
    inside = result[chosen]
    others = inside[(inside != tokenizer.mask) & (inside != 5000)]
    assert within(np.sum(inside == tokenizer.mask), len(inside), 0.8)
    assert within(np.sum(inside == 5000), len(inside), 0.1)
    assert within(len(others), len(inside), 0.1)
    counts = np.bincount(others, minlength=tokenizer.size)
    allowed = np.arange(tokenizer.size) if objective.any_token else tokenizer.words
    assert counts[allowed].sum() == len(others)
    assert 7 < len(others) / 2000 <= 10
    thirds = [part.sum() for part in np.array_split(counts[allowed], 3)]
    assert all(within(third, len(others), 1 / 3) for third in thirds)
    assert (chosen.any(1).all()) == objective.exact
    assert within((~chosen).all(1).sum(), len(drawn), 0 if objective.exact else 0.85**30)


def test_every_text_has_15_percent_of_its_tokens_masked_and_at_least_one(tokenizer: Tokenizer, drawn: np.ndarray):
    lengths = np.resize(np.arange(34), len(drawn))
    maskable = (np.arange(MAX_TOKENS) > 0) & (np.arange(MAX_TOKENS) <= lengths[:, None])
    ids = np.full(maskable.shape, 5000, np.int32)
    chosen = (masked(tokenizer, OSCAR, ids, maskable, drawn)[1] != IGNORED).sum(1)
    for n in range(34):
        found = chosen[lengths == n]
        least = math.floor(0.15 * n)
        assert set(found) == {max(least, n > 0), max(least + (0.15 * n % 1 > 0), n > 0)}, n
        if n > 6:
            assert within(np.sum(found > least), len(found), 0.15 * n - least), n


@pytest.mark.parametrize("exact", [True, False])
def test_whole_words_are_masked_or_not(tokenizer: Tokenizer, drawn: np.ndarray, exact: bool):
    objective = dataclasses.replace(OSCAR, whole_words=True, exact=exact)
    rng = np.random.default_rng(3)
    pieces, starts = (
        np.flatnonzero(tokenizer.continues),
        np.setdiff1d(tokenizer.words, np.flatnonzero(tokenizer.continues)),
    )
    shape = (len(drawn), MAX_TOKENS)
    ids = np.where(rng.random(shape) < 0.4, rng.choice(pieces, shape), rng.choice(starts, shape)).astype(np.int32)
    maskable = np.zeros(shape, bool)
    maskable[:, 1:20] = maskable[:, 21:34] = True
    labels = masked(tokenizer, objective, ids, maskable, drawn)[1]
    total = 0
    for row in range(2000):
        units: list[list[int]] = []
        for column in range(MAX_TOKENS):
            if not maskable[row, column]:
                continue
            token = tokenizer.backend.convert_ids_to_tokens(int(ids[row, column]))
            if token.startswith("##") and column not in (1, 21):
                units[-1].append(column)
            else:
                units.append([column])
        whole = [set((labels[row, unit] != IGNORED).tolist()) for unit in units]
        assert all(len(each) == 1 for each in whole)
        if exact:
            assert whole.count({True}) in {math.floor(0.15 * len(units)), math.ceil(0.15 * len(units))}
        total += len(units)
    begins = maskable & (~tokenizer.continues[ids] | np.isin(np.arange(MAX_TOKENS), (1, 21)))
    assert begins[:2000].sum() == total
    assert within((labels[begins] != IGNORED).sum(), begins.sum(), 0.15)


def test_a_text_without_a_word_has_nothing_masked(tokenizer: Tokenizer, drawn: np.ndarray):
    ids = np.zeros((4, MAX_TOKENS), np.int32)
    labels = masked(tokenizer, OSCAR, ids, np.zeros(ids.shape, bool), drawn[:4])[1]
    assert (labels == IGNORED).all()


@pytest.mark.parametrize("name", TABLE, ids="-".join)
def test_a_triples_draws_do_not_depend_on_its_company(corpus: Corpus, name: tuple[str, str]):
    triples = np.arange(100)
    whole = text(corpus, TABLE[name], triples, place=50)
    for start, end in ((0, 1), (1, 40), (40, 100)):
        part = text(corpus, TABLE[name], triples[start:end], place=50 + start)
        for field in dataclasses.fields(TextBatch):
            np.testing.assert_array_equal(getattr(part, field.name), getattr(whole, field.name)[start:end])


def test_every_place_has_a_dropout_seed_of_its_own(corpus: Corpus):
    seeds = text(corpus, OSCAR, np.zeros(20_000, np.int64)).dropout_seeds
    assert seeds.dtype == np.int64
    assert 0 <= seeds.min() < 2**32 // 1000
    assert 2**32 - 2**32 // 1000 < seeds.max() < 2**32
    assert len(np.unique(seeds)) > 19_990
    assert within((seeds % 2).sum(), 20_000, 0.5)
