"""The rows of tasks as text: `[CLS] caption or question [SEP] tags [SEP]`, as long as a task wants them."""

import numpy as np

from oscar_train.batch import IGNORED
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.text_pairs import Tokens
from oscar_train.data.sampling.triples import TextBatch, joined
from oscar_train.data.texts.ragged import Ints, Ragged
from oscar_train.data.texts.tokens import Tokenizer


def rows_of(corpus: Corpus, texts: Ints, images: Ints, tokens: int) -> TextBatch:
    """Return rows of the texts of some triples beside the tags of some images; without any label.

    Args:
        texts: int64 [B], triples whose caption or question it is. images: int64 [B]. tokens: of a row.
    """
    w, len_w = corpus.first.padded(texts, tokens)
    q, len_q = corpus.second.padded(corpus.tag_rows[images], tokens)
    return rows_from(corpus.tokenizer, w, len_w, q, len_q, tokens)


def rows_from(tokenizer: Tokenizer, w: Tokens, len_w: Ints, q: Tokens, len_q: Ints, tokens: int) -> TextBatch:
    """Return rows of two texts each, int32 [B, W], of some lengths.

    The first is cut to leave room for [CLS] and its [SEP], the second to what room is left (run_retrieval.py of the
    released code); without a second there is no second [SEP].
    """
    kept_w = np.minimum(len_w, tokens - 2)
    kept_q = np.clip(len_q, 0, np.maximum(tokens - 3 - kept_w, 0))
    input_ids, token_type_ids, attention_mask, _ = joined(tokenizer, w, q, kept_w, kept_q, tokens)
    return TextBatch(
        input_ids=input_ids,
        token_type_ids=token_type_ids,
        attention_mask=attention_mask,
        mlm_labels=np.full(input_ids.shape, IGNORED),
        match_labels=np.full(len(input_ids), IGNORED),
        dropout_seeds=np.zeros(len(input_ids), np.int64),
    )


def padded_together(rows: Ragged, count: int) -> tuple[Tokens, Ints]:
    """Return the one row of `rows` so many times, int32 [count, W], and its length."""
    return rows.padded(np.zeros(count, np.int64), max(1, int(rows.lengths.max())))
