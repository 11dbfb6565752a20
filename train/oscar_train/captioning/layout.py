"""Captions and tags as the text that captioning trains on: `[CLS] caption [SEP]`, and tags in places of their own.

As in microsoft/Oscar (oscar/run_captioning.py, CaptionTensorizer), tags begin at position 40 however long the caption
is, so that they are where they were when a caption is written word by word.
"""

import numpy as np

from oscar_train.batch import IGNORED
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.philox import SAMPLE, below, uniform, words
from oscar_train.data.sampling.text_pairs import Bools, Tokens
from oscar_train.data.sampling.triples import MASK_RATE, TextBatch
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer

CAPTION = 40  # places of the caption, [CLS] and [SEP] among them
TEXT = 70  # places of caption and tags, a [SEP] after these among them
MOST_TAGS = TEXT - CAPTION - 1  # tokens of tags
MOST_MASKED = 3

# Which of a place's random words are for what
_MASK = slice(0, CAPTION)
_ACTION = slice(CAPTION, 2 * CAPTION)
_TOKEN = slice(2 * CAPTION, 3 * CAPTION)
_DROPOUT = 3 * CAPTION
_WIDTH = _DROPOUT + 4


def caption_batch(corpus: Corpus, triples: Ints, seed: int, epoch: int, place: int) -> TextBatch:
    """Build the text of triples, which stand at `place`, `place + 1`, ... of an epoch's order; [B, 70].

    Of each caption's tokens, [SEP] among them, some are to be predicted. The label says only that a triple is there.
    """
    drawn = words(seed, SAMPLE, epoch, place, len(triples), _WIDTH)
    captions = corpus.first.padded(triples, CAPTION - 2)
    ids, types, inside = laid_out(corpus.tokenizer, *captions, *tags_of(corpus, triples))
    chosen = masked_places((inside & (types == 0)).sum(1), uniform(drawn[:, _MASK]))

    random = below(drawn[:, _TOKEN], corpus.tokenizer.size)
    action = uniform(drawn[:, _ACTION])
    before = ids[:, :CAPTION]
    instead = np.where(action < 0.8, corpus.tokenizer.mask, np.where(action < 0.9, random, before))
    labels = np.full(ids.shape, IGNORED, np.int64)
    labels[:, :CAPTION] = np.where(chosen, before, IGNORED)
    ids[:, :CAPTION] = np.where(chosen, instead, before)

    return TextBatch(
        input_ids=ids,
        token_type_ids=types,
        attention_mask=inside,
        mlm_labels=labels,
        match_labels=np.zeros(len(triples), np.int64),
        dropout_seeds=(drawn[:, _DROPOUT] >> np.uint64(32)).astype(np.int64),
    )


def tags_of(corpus: Corpus, triples: Ints) -> tuple[Tokens, Ints]:
    """Return the tags of the images of captions, int32 [n, 29] filled up with 0, and their lengths."""
    return corpus.second.padded(corpus.second_row[triples], MOST_TAGS)


def laid_out(
    tokenizer: Tokenizer, captions: Tokens, caption_lengths: Ints, tags: Tokens, tag_lengths: Ints
) -> tuple[Tokens, Ints, Bools]:
    """Return ids, token types (1 for tags) and what is no padding, [B, 70], of captions and tags cut to their places.

    An image without tags has no second [SEP], as in pre-training.
    """
    ids = np.full((len(captions), TEXT), tokenizer.pad, np.int32)
    place = np.arange(TEXT)[None]
    last = np.minimum(caption_lengths, CAPTION - 2)[:, None] + 1
    first_tag = CAPTION
    end = first_tag + np.minimum(tag_lengths, MOST_TAGS)[:, None]
    in_tags = (place >= first_tag) & (place < end)

    _fill(ids, (place >= 1) & (place < last), captions)
    _fill(ids, in_tags, tags)
    ids[:, 0] = tokenizer.cls
    ends_tags = (place == end) & (tag_lengths > 0)[:, None]
    ids[(place == last) | ends_tags] = tokenizer.sep

    of_tags = in_tags | ends_tags

    return ids, of_tags.astype(np.int64), (place <= last) | of_tags


def masked_places(lengths: Ints, chance: "np.typing.NDArray[np.float64]") -> Bools:
    """Choose the tokens of captions that are to be predicted: 15 %, but at least one and at most three; bool [B, 40].

    Args:
        lengths: int64 [B], of the captions, [CLS] and [SEP] included. [CLS] is never chosen.
        chance: random numbers in [0, 1), [B, 40]; the tokens with the smallest are chosen.
    """
    num_masked = np.clip(np.round(MASK_RATE * lengths), 1, MOST_MASKED).astype(np.int64)
    place = np.arange(CAPTION)[None]
    chance = np.where((place >= 1) & (place < lengths[:, None]), chance, 2.0)
    last = np.take_along_axis(np.sort(chance, 1), num_masked[:, None] - 1, 1)
    return (chance <= last) & (chance < 2.0)


def _fill(ids: Tokens, places: Bools, tokens: Tokens) -> None:
    """Put the first tokens of each row into as many places of that row."""
    counts = places.sum(1)[:, None]
    ids[places] = tokens[np.arange(tokens.shape[1]) < counts]
