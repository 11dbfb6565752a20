"""The answers: how often a model is right about what a set of questions asks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from oscar_train.batch import IGNORED, Batch
from oscar_train.data.batch_buffer import make_batch_buffer
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.ragged import Ints
from oscar_train.evaluation.questions import QuestionSet
from oscar_train.model.packing import pack
from oscar_train.objectives import MATCHED, WRONG_Q, WRONG_W
from oscar_train.ranks import Ranks

SIDES = ("words", "tags", "answers")  # what a masked token belongs to
RANKS = (1, 5, 10)

Forward = Callable[[Batch], Any]


class Interrupted(Exception):
    """Somebody wants the evaluation to end."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Who answers.

    forward: scores of a batch, on the ranks' device; in pre-training those of masked tokens [M, vocabulary] and of
    pairs [B, classes].
    size: rows of a batch. stopped: asked after each batch whether to go on.
    """

    forward: Forward
    ranks: Ranks
    size: int
    stopped: Callable[[], bool] = lambda: False

    def shares(self, count: int, size: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of this rank's batches of so many rows; all ranks end together.

        Args:
            count: rows of all ranks.
            size: rows of a batch, if not `self.size`.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        size = size or self.size
        for number in range(0, -(-count // size), self.ranks.size):
            stopping = torch.tensor(float(self.stopped()), device=self.ranks.device)
            if self.ranks.total(stopping):
                raise Interrupted
            begin = (number + self.ranks.rank) * size
            if begin < count:
                yield begin, min(begin + size, count)


def answer(model: nn.Module, precision: str, batch: Batch) -> Any:
    """Return a model's scores of a batch, for `Answering.forward`."""
    model.eval()
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(pack(batch, device))


def names(question_set: QuestionSet) -> list[str]:
    """Return the names of the numbers of a set of questions, in their order."""
    columns = [f"{side}_{what}" for side in SIDES for what in ("loss", "accuracy")]
    columns += [
        "match_loss",
        "match_accuracy",
        *(f"{_plain(question_set, name)}_accuracy" for name in question_set.asked),
    ]
    return columns + [
        f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in RANKS if len(question_set.gallery)
    ]


@torch.no_grad()
def measure(question_set: QuestionSet, answering: Answering, shuffled: str | None = None) -> dict[str, float]:
    """Ask everything, in this order of numbers:

    - loss and accuracy of masked tokens of matched triples, by what they belong to: words (of captions and questions),
      tags, answers; NaN where there are none;
    - loss and accuracy of the contrastive head: every triple is asked about once as each class. The accuracy of each
      class, and the mean in the proportions of the objective, in which always saying "matched" is right 50 %;
    - the share of texts whose own image is among the k best of the gallery, and the other way round; scores that are
      equal to the right one's count as better.

    Args:
        shuffled: one of `SHUFFLES`, to be taken from another image.

    Returns:
        The same on all ranks, but for rounding the same for any number of them and any size of batches.
    """
    values = _questions(question_set, answering, shuffled)
    if len(question_set.gallery):
        values |= _retrieval(question_set, answering, shuffled)
    return values


def _questions(question_set: QuestionSet, answering: Answering, shuffled: str | None) -> dict[str, float]:
    """Ask for masked tokens and classes."""
    device = answering.ranks.device
    tokens = torch.zeros(len(SIDES), 3, dtype=torch.float64, device=device)  # loss, right ones, all
    pairs = torch.zeros(len(question_set.asked), 3, dtype=torch.float64, device=device)
    buffers = make_batch_buffer(min(answering.size, len(question_set.triples)), question_set.corpus.feature_dim)

    for begin, end in answering.shares(len(question_set.triples)):
        buffer, rows = buffers.rows(0, end - begin), slice(begin, end)
        question_set.regions(question_set.triples[rows], question_set.partners[rows], buffer, shuffled)
        for number, name in enumerate(question_set.asked):
            question_set.text(name, begin, buffer, shuffled)
            scores, classes = answering.forward(buffer.batch)
            pairs[number] += _counted(classes, buffer.batch.match_labels.to(device)).sum(0)
            if name == MATCHED:
                labels, sides = (each.to(device) for each in _masked(question_set, buffer.batch))
                tokens.index_add_(0, sides, _counted(scores, labels))

    answering.ranks.total(tokens), answering.ranks.total(pairs)
    return _named(question_set, tokens.cpu(), pairs.cpu())


def _counted(scores: Tensor, labels: Tensor) -> Tensor:
    """Return (loss, right, 1) of each row, float64 [n, 3]; zeros where there is no label."""
    loss = cross_entropy(scores.float(), labels, reduction="none", ignore_index=IGNORED)
    is_labelled = labels != IGNORED
    return (
        torch.stack([loss, (scores.argmax(-1) == labels).float(), is_labelled.float()], 1).double()
        * is_labelled[:, None]
    )


def _masked(question_set: QuestionSet, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the tokens that were masked, and the number of the side each belongs to, int64 [M] on the CPU."""
    masked = batch.mlm_labels != IGNORED
    captions = torch.from_numpy(question_set.corpus.kind[batch.triples.numpy()] == CAPTION)[:, None]
    sides = torch.where(batch.token_type_ids == 0, 0, torch.where(captions, 1, 2))
    return batch.mlm_labels[masked], sides[masked]


def _named(question_set: QuestionSet, tokens: Tensor, pairs: Tensor) -> dict[str, float]:
    """Turn sums into means with names."""
    means = tokens[:, :2] / tokens[:, 2:]  # 0 / 0 is no number
    values = {
        f"{side}_{what}": float(means[row, column])
        for row, side in enumerate(SIDES)
        for column, what in enumerate(("loss", "accuracy"))
    }
    parts = {MATCHED: 1 - question_set.objective.wrong_w - question_set.objective.wrong_q}
    parts |= {WRONG_W: question_set.objective.wrong_w, WRONG_Q: question_set.objective.wrong_q}
    weights = torch.tensor([parts[name] for name in question_set.asked], dtype=torch.float64) * (pairs[:, 2] > 0)
    rates = (pairs[:, :2] / pairs[:, 2:].clamp(min=1)).T @ weights / weights.sum()
    values |= {"match_loss": float(rates[0]), "match_accuracy": float(rates[1])}
    shares = pairs[:, 1] / pairs[:, 2]

    return values | {
        f"{_plain(question_set, name)}_accuracy": float(s) for name, s in zip(question_set.asked, shares, strict=True)
    }


def _plain(question_set: QuestionSet, name: str) -> str:
    """Return what a class is called in the names of numbers."""
    return question_set.objective.classes[question_set.objective.label(name)].replace(" ", "_")


def _retrieval(question_set: QuestionSet, answering: Answering, shuffled: str | None) -> dict[str, float]:
    """Score every text of the gallery with every image, and see where the right one stands."""
    size, ranks = len(question_set.gallery), answering.ranks
    scores = torch.zeros(size, size, device=ranks.device)  # [texts, images]
    buffer = make_batch_buffer(min(answering.size, size), question_set.corpus.feature_dim)
    matched = question_set.objective.label(MATCHED)

    for first in range(0, size, answering.size):
        block = slice(first, min(first + answering.size, size))
        part = buffer.rows(0, block.stop - block.start)
        question_set.regions(question_set.gallery[block], question_set.gallery_partners[block], part, shuffled)
        features = part.batch.features.to(ranks.device)  # once for all texts

        for text in _each(answering, size):
            question_set.pairs(text, first, part, shuffled)
            _, classes = answering.forward(replace(part.batch, features=features))
            other_classes = torch.cat([classes[:, :matched], classes[:, matched + 1 :]], 1).float()
            scores[text, block] = classes[:, matched].float() - other_classes.logsumexp(1)

    ranks.total(scores)
    return _recalls(scores.cpu().numpy())


def _each(answering: Answering, count: int) -> Iterator[int]:
    """Yield the numbers below `count` that are this rank's."""
    return (begin for begin, _ in replace(answering, size=1).shares(count))


def _recalls(scores: Any) -> dict[str, float]:
    """Return the shares of rows, and of columns, whose number on the diagonal is among the k largest."""
    matched_scores = scores.diagonal()
    better: dict[str, Ints] = {  # how many others; one that is no number is better than any
        "text_to_image": (~(scores < matched_scores[:, None])).sum(1) - 1,
        "image_to_text": (~(scores < matched_scores[None])).sum(0) - 1,
    }
    return {f"{way}_r{k}": float(np.mean(count < k)) for way, count in better.items() for k in RANKS}
