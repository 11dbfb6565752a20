"""Triples as text: what is replaced, truncation, layout, masks. Pure functions of (seed, epoch, place)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from oscar_train.batch import IGNORED, MAX_TOKENS
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.negatives import TRIES, Pools, Words, replaced
from oscar_train.data.sampling.philox import SAMPLE, below, uniform, words
from oscar_train.data.sampling.text_pairs import Bools, Sides, Tokens, texts, truncated
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.objectives import MATCHED, WRONG_Q, WRONG_W, Objective

MASK_RATE = 0.15

# Which of a place's random words are for what
_MASK = slice(0, MAX_TOKENS)
_ACTION = slice(MAX_TOKENS, 2 * MAX_TOKENS)
_TOKEN = slice(2 * MAX_TOKENS, 3 * MAX_TOKENS)
_PART = 3 * MAX_TOKENS
_CANDIDATES = slice(_PART + 1, _PART + 1 + TRIES)
_DROPOUT = _CANDIDATES.stop
_ROUNDING = _DROPOUT + 1
_WIDTH = -(-(_ROUNDING + 1) // 4) * 4


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """B triples as text, before any tensor: `[CLS] w [SEP] q [SEP]`, filled up with [PAD].

    input_ids, token_type_ids, mlm_labels: [B, 35]; attention_mask: bool [B, 35]; match_labels: int64 [B], of the
    objective's classes. dropout_seeds: int64 [B] in [0, 2^32), so that dropout can belong to the triple.
    """

    input_ids: Tokens
    token_type_ids: Ints
    attention_mask: Bools
    mlm_labels: Ints
    match_labels: Ints
    dropout_seeds: Ints


def assemble(
    corpus: Corpus,
    pools: Pools,
    objective: Objective,
    triples: Ints,
    seed: int,
    epoch: int,
    place: int,
    change: Callable[[Sides], Sides] = lambda sides: sides,
) -> TextBatch:
    """Build the text of `triples`, which stand at `place`, `place + 1`, ... of an epoch's order.

    Some triples get another w or q (Oscar section 3.1, contrastive loss; VinVL section 3.2); then 15 % of the tokens of
    w and q are masked (Oscar section 3.1, masked token loss), also where one is another's. `change` may put still other
    texts there, of which the labels do not know.
    """
    drawn = words(seed, SAMPLE, epoch, place, len(triples), _WIDTH)
    sides = replaced(corpus, pools, objective, triples, drawn[:, _PART], drawn[:, _CANDIDATES])
    ids, types, inside, maskable = laid_out(corpus, change(sides))
    input_ids, labels = masked(corpus.tokenizer, objective, ids, maskable, drawn)

    return TextBatch(
        input_ids=input_ids,
        token_type_ids=types,
        attention_mask=inside,
        mlm_labels=labels,
        match_labels=match_labels(objective, sides, triples),
        dropout_seeds=(drawn[:, _DROPOUT] >> np.uint64(32)).astype(np.int64),
    )


def laid_out(corpus: Corpus, sides: Sides) -> tuple[Tokens, Ints, Bools, Bools]:
    """Return what `joined` does, of texts wherever they are from."""
    w, len_w = texts(corpus, sides.w, np.ones(len(sides.w), bool))
    q, len_q = texts(corpus, sides.q, sides.lent)
    return joined(corpus.tokenizer, w, q, *truncated(len_w, len_q))


def match_labels(objective: Objective, sides: Sides, triples: Ints) -> Ints:
    """Return which class of the objective each triple is."""
    matched, wrong_w, wrong_q = map(objective.label, (MATCHED, WRONG_W, WRONG_Q))
    return np.where(sides.w != triples, wrong_w, np.where(sides.q != triples, wrong_q, matched))


def joined(
    tokenizer: Tokenizer, w: Tokens, q: Tokens, len_w: Ints, len_q: Ints, size: int = MAX_TOKENS
) -> tuple[Tokens, Ints, Bools, Bools]:
    """Return `[CLS] w [SEP] q [SEP]`, or `[CLS] w [SEP]` where q is empty, as the released code does.

    Returns:
        ids, token types (1 after the first [SEP]), what is no padding, and which tokens are w or q; [B, size].
    """
    place, column = np.arange(size)[None], np.arange(w.shape[1])
    first_sep = len_w[:, None] + 1
    last_sep = first_sep + np.where(len_q > 0, len_q + 1, 0)[:, None]
    in_w, in_q = (place > 0) & (place < first_sep), (place > first_sep) & (place < last_sep)
    ids = np.full((len(w), size), tokenizer.pad, np.int32)
    ids[in_w] = w[column < len_w[:, None]]
    ids[in_q] = q[column < len_q[:, None]]
    ids[:, 0] = tokenizer.cls
    ids[(place == first_sep) | (place == last_sep)] = tokenizer.sep
    inside = place <= last_sep

    return ids, (inside & (place > first_sep)).astype(np.int64), inside, in_w | in_q


def masked(
    tokenizer: Tokenizer, objective: Objective, ids: Tokens, maskable: Bools, drawn: Words
) -> tuple[Tokens, Ints]:
    """Mask 15 % of the tokens; of these 80 % become [MASK], 10 % another token, 10 % stay.

    Returns:
        ids with masks, and labels: the token that was there, or -100 where nothing is to be predicted; [B, 35].
    """
    chosen = chosen_tokens(tokenizer, objective, ids, maskable, drawn)
    replacements = np.arange(tokenizer.size) if objective.any_token else tokenizer.words
    random = replacements[below(drawn[:, _TOKEN], len(replacements))]
    action = uniform(drawn[:, _ACTION])
    token = np.where(action < 0.8, tokenizer.mask, np.where(action < 0.9, random, ids))
    return np.where(chosen, token, ids).astype(np.int32), np.where(chosen, ids, IGNORED).astype(np.int64)


def chosen_tokens(tokenizer: Tokenizer, objective: Objective, ids: Tokens, maskable: Bools, drawn: Words) -> Bools:
    """Choose 15 % of the tokens, or words; bool [B, 35].

    By `exact`, of the n of a row 0.15 n are chosen, rounded up or down so that this is their mean, but at least one, as
    BERT does: those with the smallest random numbers. From n = 7 on each is chosen with probability 0.15. So every
    triple is in both losses, and a batch never lacks a masked token.
    """
    chance = np.where(maskable, uniform(drawn[:, _MASK]), 2.0)
    begins = maskable
    if objective.whole_words:
        begins = maskable & ~(tokenizer.continues[ids] & np.roll(maskable, 1, 1))
        first = np.maximum.accumulate(np.where(begins, np.arange(MAX_TOKENS), 0), 1)
        chance = np.where(maskable, np.take_along_axis(chance, first, 1), 2.0)

    if not objective.exact:
        return chance < MASK_RATE

    units = begins.sum(1)
    num_masked = np.floor(MASK_RATE * units + uniform(drawn[:, _ROUNDING])).astype(np.int64)
    ordered = np.sort(np.where(begins, chance, 2.0), 1)
    last = np.take_along_axis(ordered, np.maximum(num_masked, 1)[:, None] - 1, 1)

    return maskable & (chance <= last)
