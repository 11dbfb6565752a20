"""The network of self-critical training: it draws captions, compares them, and scores them all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oscar_train.batch import IGNORED, Batch
from oscar_train.captioning.metrics import DocumentFrequencies
from oscar_train.captioning.network import OscarForCaptioning
from oscar_train.captioning.search import Caption, greedy
from oscar_train.captioning.self_critical import (
    DRAWN,
    draw_captions,
    ended_words,
    probing,
    repeated,
    rewards,
    unpacked,
    without_captions,
)
from oscar_train.captioning.spelling import spell
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.packing import Packed, pack


@dataclass(frozen=True)
class Truth:
    """What captions are compared with: the captions of the images of some triples, and the frequencies of n-grams."""

    references: Callable[[Ints], list[list[str]]]
    frequencies: DocumentFrequencies


@dataclass(frozen=True)
class Drawn:
    """What five captions of each of B images came to.

    means: float32 [B, 5], mean log-probabilities, through which gradients flow. worth: [B, 5], the CIDEr-D above that
    of the greedy caption. reward: [B], the mean CIDEr-D.
    """

    means: Tensor
    worth: Tensor
    reward: Tensor


class SelfCriticalOscar(OscarForCaptioning):
    """Oscar that is trained on captions of its own.

    truth: what these are compared with; called with nothing, as it is known only when the shards are open.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer, truth: Callable[[], Truth]) -> None:
        super().__init__(config, tokenizer)
        self._tokenizer, self._truth = tokenizer, truth

    def forward(self, batch: Packed) -> Any:
        """Return `Drawn` in training; in eval mode the greedy captions. Labels are the numbers of triples."""
        if not self.training:
            return self._written(batch)

        images = unpacked(batch)
        captions, worth, reward = self._compared(images, batch.seen.device)

        predicted = [[*caption.tokens, caption.last] for own in captions for caption in own]
        inputs = probing(repeated(images, DRAWN), predicted, self.decoder, batch.seen.device)
        hidden = self.bert(inputs)
        scores = self.cls.predictions(hidden.index_select(0, inputs.masked)).float()
        tokens = scores.log_softmax(-1).gather(1, inputs.masked_ids[:, None])[:, 0]
        means = torch.stack([part.mean() for part in tokens.split([len(tokens) for tokens in predicted])])

        return Drawn(means.view(-1, DRAWN), worth, reward)

    @torch.no_grad()
    def _compared(self, images: Batch, device: torch.device) -> tuple[list[list[Caption]], Tensor, Tensor]:
        """Draw captions, without dropout, and see what they are worth."""
        self.eval()
        context = self.decoder.read(pack(without_captions(images), device))
        captions = draw_captions(self.decoder, context, images.dropout_seeds.to(device))
        baseline = self._words(greedy(self.decoder, context))
        self.train()

        truth = self._truth()
        references = truth.references(np.maximum(images.triples.numpy(), 0))
        scores = rewards([self._words(own) for own in captions], baseline, references, truth.frequencies)
        of_drawn, of_greedy = (torch.tensor(part, device=device) for part in scores)

        return captions, of_drawn - of_greedy[:, None], of_drawn.mean(1)

    def _words(self, captions: Sequence[Caption]) -> list[list[str]]:
        return [
            ended_words(spell(self._tokenizer, caption.tokens), caption.last == self.decoder.end)
            for caption in captions
        ]


def self_critical_criterion(drawn: Drawn, batch: Packed) -> tuple[Tensor, Tensor]:
    """Return the policy gradient's loss, as a task's criterion.

    Returns:
        float32 [4]: 0, the loss of all images that are there, 0, their CIDEr-D; and bool [B], which of them have
        log-probabilities that are all numbers.
    """
    is_there = batch.match_labels != IGNORED
    losses = -(drawn.means * drawn.worth).mean(1)
    nothing = torch.zeros((), device=losses.device)
    sums = [nothing, losses.where(is_there, 0).sum(), nothing, drawn.reward.where(is_there, 0).sum()]
    return torch.stack(sums), drawn.means.detach().isfinite().all(1)
