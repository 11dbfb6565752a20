"""The network that learns to write captions, and its loss on masked tokens (microsoft/Oscar's BertCaptioningLoss)."""

import math
from typing import Any

import torch
from torch import Tensor

from oscar_train.captioning.attention import as_caption
from oscar_train.captioning.decoder import decoder_of
from oscar_train.captioning.search import MOST_TOKENS, greedy
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.model.packing import Packed


class OscarForCaptioning(OscarForPreTraining):
    """Oscar whose text is a caption. The pooler and the contrastive head stay as they are, and are not used."""

    def __init__(self, config: Any, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        self.decoder = decoder_of(self, tokenizer)
        for part in (self.bert.pooler, self.cls.seq_relationship):
            part.requires_grad_(False)

    def forward(self, batch: Packed) -> Tensor:  # type: ignore[override]
        """Return what training needs, or captions.

        Returns:
            In training, scores of the M masked tokens, [M, vocabulary]. In eval mode, the tokens of the greedy caption
            of each image, int64 [B, 19], -1 after its end; the batch then has no caption.
        """
        if not self.training:
            return self._written(batch)
        hidden = self.bert(as_caption(batch))
        scores: Tensor = self.cls.predictions(hidden.index_select(0, batch.masked))
        return scores

    @torch.no_grad()
    def _written(self, batch: Packed) -> Tensor:
        captions = [caption.tokens for caption in greedy(self.decoder, self.decoder.read(batch))]
        rows = [tokens + [-1] * (MOST_TOKENS - len(tokens)) for tokens in captions]
        return torch.tensor(rows, device=batch.seen.device)


def criterion(scores: Tensor, batch: Packed, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compare scores of masked tokens with what was there, as a task's criterion.

    The loss is the divergence of the scores from labels of which a share is spread over all other tokens.

    Returns:
        float32 [4]: the loss, 0, the tokens that are right, 0; and bool [B], which rows' scores are all numbers.
    """
    log_probabilities = scores.float().log_softmax(-1)
    own_log_probability = log_probabilities.gather(1, batch.masked_ids[:, None])[:, 0]
    loss = -own_log_probability.sum()
    if label_smoothing:
        spread = label_smoothing / (scores.shape[1] - 1)
        other_log_probability = log_probabilities.sum(1) - own_log_probability
        constant = (1 - label_smoothing) * math.log(1 - label_smoothing) + label_smoothing * math.log(spread)
        loss = (constant - (1 - label_smoothing) * own_log_probability - spread * other_log_probability).sum()

    right = (scores.detach().argmax(-1) == batch.masked_ids).sum().float()
    nothing = torch.zeros_like(right)
    return torch.stack([loss, nothing, right, nothing]), _finite_rows(scores.detach(), batch)


def _finite_rows(scores: Tensor, batch: Packed) -> Tensor:
    """Return which rows have no score of a masked token that is no number, bool [B]."""
    rows = batch.slots.index_select(0, batch.masked) // batch.seen.shape[1]
    faults = (~scores.isfinite().all(1)).float()
    return scores.new_zeros(len(batch.seen), dtype=torch.float32).index_add(0, rows, faults) == 0
