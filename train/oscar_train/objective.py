"""The pre-training objective, L_MTL + L_C (Oscar section 3.1), and how often the model is right."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from oscar_train.stream import Batch
from oscar_train.triples import IGNORED


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one batch came to; scalars. `loss` is the sum of the two losses, unweighted as in paper and release."""

    loss: Tensor
    mlm_loss: Tensor
    match_loss: Tensor
    mlm_accuracy: Tensor
    match_accuracy: Tensor


def evaluate(words: Tensor, pairs: Tensor, batch: Batch) -> Outcome:
    """Compare scores with the truth.

    The masked-token loss is the mean over the masked tokens of the whole batch (0 if there are none), the contrastive
    loss the mean over its triples, without those that were skipped.

    Args:
        words: [M, vocabulary] for the batch's M masked tokens.
        pairs: [B, classes]; class 0 is matched.
        batch: where the labels are.
    """
    labels = batch.mlm_labels[batch.mlm_labels != IGNORED]
    tokens = max(len(labels), 1)
    mlm_loss = cross_entropy(words.float(), labels, reduction="sum") / tokens
    triples = (batch.match_labels != IGNORED).sum().clamp(min=1)
    match_loss = cross_entropy(pairs.float(), batch.match_labels, ignore_index=IGNORED, reduction="sum") / triples
    with torch.no_grad():
        mlm_accuracy = (words.argmax(-1) == labels).sum() / tokens
        match_accuracy = (pairs.argmax(-1) == batch.match_labels).sum() / triples
    return Outcome(
        loss=mlm_loss + match_loss,
        mlm_loss=mlm_loss,
        match_loss=match_loss,
        mlm_accuracy=mlm_accuracy,
        match_accuracy=match_accuracy,
    )
