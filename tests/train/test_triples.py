"""What a triple's text looks like, against the paper's words and the release's rule written out slowly."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from oscar_train.corpus import Corpus
from oscar_train.draws import SAMPLE, words
from oscar_train.phrases import CAPTION, MAX_TEXT, QA
from oscar_train.tokens import Tokenizer
from oscar_train.triples import (
    _WIDTH,
    IGNORED,
    MATCHED,
    MAX_TOKENS,
    POLLUTED,
    Pool,
    assemble,
    joined,
    make_pools,
    masked,
    polluted,
    truncated,
)


def test_truncation_is_the_releases_loop():
    for limit in (7, 8, MAX_TEXT):
        for a in range(2 * limit):
            for b in range(2 * limit):
                w, q = list(range(a)), list(range(b))
                while len(w) + len(q) > limit:
                    (w if len(w) > len(q) else q).pop()
                assert tuple(map(int, truncated(np.int64(a), np.int64(b), limit))) == (len(w), len(q)), (a, b, limit)


def test_the_layout_is_cls_w_sep_q_sep_pad(tokenizer: Tokenizer, rng: np.random.Generator):
    w, q = (
        rng.integers(1000, 2000, (40, MAX_TEXT)).astype(np.int32),
        rng.integers(2000, 3000, (40, MAX_TEXT)).astype(np.int32),
    )
    len_w, len_q = truncated(rng.integers(1, MAX_TEXT, 40), rng.integers(0, MAX_TEXT, 40))
    ids, types, maskable = joined(tokenizer, w, q, len_w, len_q)
    for row in range(40):
        a, b = w[row, : len_w[row]].tolist(), q[row, : len_q[row]].tolist()
        padding = MAX_TOKENS - len(a) - len(b) - 3
        assert ids[row].tolist() == [tokenizer.cls, *a, tokenizer.sep, *b, tokenizer.sep] + [tokenizer.pad] * padding
        assert types[row].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * padding
        assert maskable[row].tolist() == [0] + [1] * len(a) + [0] + [1] * len(b) + [0] * (1 + padding)


@pytest.fixture(scope="module")
def pools(corpus: Corpus) -> list[Pool]:
    return make_pools(corpus, [Fraction(1)])


@pytest.fixture(scope="module")
def many(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Triples drawn 20,000 times, and their random words."""
    triples = np.resize(np.arange(len(corpus)), 20_000)
    return triples, words(42, SAMPLE, 0, 0, len(triples), _WIDTH)


def test_masks_have_berts_proportions(tokenizer: Tokenizer, many):
    drawn = many[1]
    ids = np.full((len(drawn), MAX_TOKENS), 5000, np.int32)
    maskable = np.zeros(ids.shape, bool)
    maskable[:, 1:30] = True
    result, labels = masked(tokenizer, ids, maskable, drawn)
    chosen = labels != IGNORED
    assert not chosen[~maskable].any()
    assert (labels[chosen] == 5000).all()
    assert (result[~chosen] == 5000).all()
    # 0.15, plus the rows that would have had none: 0.85^29 of them get one
    assert chosen[maskable].size * (0.15 + 0.85**29 / 29) == pytest.approx(chosen.sum(), rel=0.01)
    assert chosen.any(1).all()
    inside = result[chosen]
    assert np.mean(inside == tokenizer.mask) == pytest.approx(0.8, abs=0.01)
    assert np.mean(inside == 5000) == pytest.approx(0.1, abs=0.01)
    others = inside[(inside != tokenizer.mask) & (inside != 5000)]
    assert 0 <= others.min() < 300 < 30_200 < others.max() < tokenizer.size


def test_a_text_without_a_word_has_nothing_masked(tokenizer: Tokenizer, many):
    ids = np.zeros((4, MAX_TOKENS), np.int32)
    labels = masked(tokenizer, ids, np.zeros(ids.shape, bool), many[1][:4])[1]
    assert (labels == IGNORED).all()


def visible_q(corpus: Corpus, triple: int, row: int) -> list[int]:
    w, q = corpus.first[triple].tolist(), corpus.second[row].tolist()
    while len(w) + len(q) > MAX_TEXT:
        (w if len(w) > len(q) else q).pop()
    return q


def test_half_of_the_triples_get_another_images_q_that_reads_differently(corpus: Corpus, pools: list[Pool], many):
    triples, drawn = many
    rows = polluted(corpus, pools, triples, drawn)
    changed = np.flatnonzero(rows != corpus.second_row[triples])
    assert len(changed) / len(triples) == pytest.approx(0.5, abs=0.015)
    owner = {row: (kind, image) for row, kind, image in zip(corpus.second_row, corpus.kind, corpus.image, strict=True)}
    for i in changed[:4000]:
        kind, image = owner[rows[i]]
        assert kind == corpus.kind[triples[i]]
        assert image != corpus.image[triples[i]]
        one, other = (visible_q(corpus, triples[i], row) for row in (rows[i], corpus.second_row[triples[i]]))
        assert set(one) != set(other)


def test_negatives_are_drawn_from_the_whole_corpus_evenly(corpus: Corpus, pools: list[Pool], many):
    triples, drawn = many
    rows = polluted(corpus, pools, triples, drawn)
    changed = (rows != corpus.second_row[triples]) & (corpus.kind[triples] == CAPTION)
    owner = dict(zip(corpus.second_row.tolist(), corpus.image.tolist(), strict=True))
    counts = np.bincount([owner[row] for row in rows[changed].tolist()], minlength=40)
    assert (counts[[3, 4]] == 0).all()  # no text, no tags
    counts = np.delete(counts, [3, 4])
    assert 0.75 * counts.mean() < counts.min() <= counts.max() < 1.25 * counts.mean()


def test_a_corpus_whose_tags_are_all_alike_stays_matched(corpus: Corpus, many):
    twins = np.flatnonzero(np.isin(corpus.image, (6, 7)) & (corpus.kind == CAPTION))
    alike = dataclasses.replace(corpus, pools=(twins, corpus.pools[QA]))
    rows = polluted(alike, make_pools(alike, [Fraction(1)]), np.resize(twins, 1000), many[1][:1000])
    assert (rows == np.resize(corpus.second_row[twins], 1000)).all()


def test_the_label_says_whether_q_is_the_triples_own(corpus: Corpus, pools: list[Pool], tokenizer: Tokenizer):
    triples = np.resize(np.arange(len(corpus)), 4000)
    batch = assemble(corpus, pools, triples, seed=1, epoch=0, place=0)
    assert set(batch.match_labels) == {MATCHED, POLLUTED} == {0, 1}
    original = np.where(batch.mlm_labels != IGNORED, batch.mlm_labels, batch.input_ids)  # masks undone
    for row, triple in enumerate(triples[:400]):
        w, q = corpus.first[triple].tolist(), visible_q(corpus, triple, corpus.second_row[triple])
        w = w[: MAX_TEXT - len(q)]
        own = [tokenizer.cls, *w, tokenizer.sep, *q, tokenizer.sep]
        found = original[row][batch.attention_mask[row]].tolist()
        assert (found == own) == (batch.match_labels[row] == MATCHED)


def test_a_triples_draws_do_not_depend_on_its_company(corpus: Corpus, pools: list[Pool]):
    triples = np.arange(100)
    whole = assemble(corpus, pools, triples, seed=3, epoch=2, place=50)
    for start, end in ((0, 1), (1, 40), (40, 100)):
        part = assemble(corpus, pools, triples[start:end], seed=3, epoch=2, place=50 + start)
        for name in ("input_ids", "token_type_ids", "attention_mask", "mlm_labels", "match_labels"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[start:end])
