"""The pre-training loss, L_MTL + L_C (Oscar section 3.1), and how often the model is right."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from oscar_train.batch import IGNORED
from oscar_train.model.packing import Packed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one batch came to; scalars. `loss` is the sum of the two losses, unweighted as in paper and release."""

    loss: Tensor
    mlm_loss: Tensor
    match_loss: Tensor
    mlm_accuracy: Tensor
    match_accuracy: Tensor


def sums(words: Tensor, pairs: Tensor, batch: Packed) -> Tensor:
    """Compare scores with the truth, as sums, which those of other parts of the batch can be added to.

    Args:
        words: [M, vocabulary] for the batch's M masked tokens.
        pairs: [B, classes].
        batch: where the labels are.

    Returns:
        float32 [4]: both losses, masked tokens that are right, triples that are right.
    """
    mlm_loss = cross_entropy(words.float(), batch.masked_ids, reduction="sum")
    match_loss = cross_entropy(pairs.float(), batch.match_labels, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        right = (words.argmax(-1) == batch.masked_ids).sum(), (pairs.argmax(-1) == batch.match_labels).sum()
    return torch.stack([mlm_loss, match_loss, *(r.float() for r in right)])


def outcome(totals: Tensor, numbers: Tensor) -> Outcome:
    """Turn sums and `Packed.counts` of a whole batch into means: over masked tokens, and over triples (0 of none)."""
    means = totals / numbers[:2].clamp(min=1).repeat(2)
    return Outcome(
        loss=means[0] + means[1],
        mlm_loss=means[0],
        match_loss=means[1],
        mlm_accuracy=means[2],
        match_accuracy=means[3],
    )


def evaluate(words: Tensor, pairs: Tensor, batch: Packed) -> Outcome:
    """Compare scores with the truth, for a batch that is in one part; see `sums`."""
    return outcome(sums(words, pairs, batch), batch.counts)
