"""What captioning trains on: the release's layout, and its masks by a slow reference."""

import numpy as np
import pytest
from peers.captioning import tensorise
from torch import zeros

from oscar_train.batch import IGNORED
from oscar_train.captioning.layout import CAPTION, MOST_MASKED, TEXT, caption_batch, laid_out, masked_places
from oscar_train.data.corpus import Corpus
from oscar_train.data.texts.tokens import Tokenizer


@pytest.mark.parametrize(("words", "tags"), [(1, 1), (5, 29), (38, 3), (45, 40), (12, 10)])
def test_texts_lie_where_the_release_has_them(tokenizer: Tokenizer, words: int, tags: int):
    caption, labels = np.arange(1000, 1000 + words), np.arange(2000, 2000 + tags)
    ids, types, present = laid_out(
        tokenizer, caption[None].astype(np.int32), np.array([words]), labels[None].astype(np.int32), np.array([tags])
    )
    expected = tensorise(caption.tolist(), labels.tolist(), zeros(1, 4), tokenizer.cls, tokenizer.sep)
    assert ids[0].tolist() == expected.input_ids.tolist()
    assert types[0].tolist() == expected.token_type_ids.tolist()
    assert present[0].tolist() == (expected.attention_mask.diagonal()[:TEXT] > 0).tolist()


def test_an_image_without_tags_has_the_caption_alone(tokenizer: Tokenizer):
    nothing = np.zeros((1, 0), np.int32)
    ids, types, present = laid_out(tokenizer, np.full((1, 3), 7, np.int32), np.array([3]), nothing, np.array([0]))
    assert ids[0, :5].tolist() == [tokenizer.cls, 7, 7, 7, tokenizer.sep]
    assert present[0].sum() == 5
    assert types.sum() == 0


def test_one_to_three_tokens_are_predicted_never_cls():
    """round(0.15 n) of the n tokens with [CLS] and [SEP], those with the smallest numbers."""
    draw = np.random.default_rng(4)
    lengths = np.arange(3, CAPTION + 1)
    chance = draw.random((len(lengths), CAPTION))
    chosen = masked_places(lengths, chance)
    for row, length in enumerate(lengths.tolist()):
        count = min(max(round(0.15 * length), 1), MOST_MASKED)
        ordered = sorted(range(1, length), key=lambda place, row=row: chance[row, place])
        assert np.flatnonzero(chosen[row]).tolist() == sorted(ordered[:count])


def test_tokens_become_mask_another_or_stay(corpus: Corpus):
    """80, 10 and 10 %; the same for a triple in whatever batch it stands; tags are never touched."""
    triples = np.resize(np.flatnonzero(corpus.kind == 0), 4000)
    batch = caption_batch(corpus, triples, seed=3, epoch=1, place=0)
    masked = batch.mlm_labels != IGNORED
    assert (batch.match_labels == 0).all()
    assert not masked[:, CAPTION:].any()

    before, after = batch.mlm_labels[masked], batch.input_ids[masked]
    shares = [(after == corpus.tokenizer.mask).mean(), (after == before).mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)
    assert (before == corpus.tokenizer.sep).any()

    part = caption_batch(corpus, triples[100:160], seed=3, epoch=1, place=100)
    for name, values in vars(part).items():
        assert np.array_equal(values, getattr(batch, name)[100:160]), name
