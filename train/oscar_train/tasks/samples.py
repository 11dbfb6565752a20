"""The loss and the accuracy of a task on held-out samples, which are made as those of training are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oscar_train.batch import IGNORED, Batch
from oscar_train.data.batch_buffer import BatchBuffer, make_batch_buffer, put_regions, put_text
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.philox import EVALUATION, permutation
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.stream import Composer, Only
from oscar_train.data.texts.ragged import Ints
from oscar_train.evaluation.measure import Answering
from oscar_train.model.packing import Packed, pack

SEED = 0  # of what is drawn: the same for every run, so that the numbers of two models compare


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Held-out samples of a task. triples: int64 [n], sorted. The others are those of the task."""

    corpus: Corpus
    reader: RegionReader
    triples: Ints
    shape: Shape
    compose: Composer
    criterion: Callable[[Any, Packed], tuple[Tensor, Tensor]]

    def put(self, begin: int, end: int, buffer: BatchBuffer) -> Batch:
        """Put the rows of some of the samples into a room, which has as many."""
        text, images = self.compose(self.triples[begin:end], SEED, 0, begin)
        self.reader.read(images, buffer.slots)
        put_regions(self.reader, images, buffer)
        put_text(text, buffer, self.corpus.tokenizer, self.shape.rows)
        buffer.batch.triples.numpy()[:] = np.repeat(self.triples[begin:end], self.shape.rows)
        return buffer.batch


def draw_triples(corpus: Corpus, only: Only, count: int) -> Ints:
    """Draw held-out triples, int64, sorted; all of them if `count` is 0."""
    triples = np.arange(len(corpus)) if only is None else only.astype(np.int64)
    if not count:
        return triples
    return np.sort(triples[permutation(SEED, EVALUATION, 0, len(triples), (0, 0))[:count]])


@torch.no_grad()
def measure_samples(samples: Samples, answering: Answering) -> dict[str, float]:
    """Return the mean `loss` and `accuracy` of the labels of all samples; NaN where there are none."""
    device = answering.ranks.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right ones, labels
    size = max(1, answering.size // samples.shape.rows)
    buffer = make_batch_buffer(min(size, len(samples.triples)), samples.corpus.feature_dim, shape=samples.shape)

    for begin, end in answering.shares(len(samples.triples), size):
        rows = buffer.rows(0, (end - begin) * samples.shape.rows)
        batch = samples.put(begin, end, rows)
        scores = answering.forward(batch)
        sums, _ = samples.criterion(scores, pack(batch, device))
        labels = (batch.match_labels != IGNORED).sum()
        totals += torch.stack([sums[1].double(), sums[3].double(), labels.to(device).double()])

    answering.ranks.total(totals)
    loss, right, labels = totals.tolist()
    if not labels:
        return {"loss": float("nan"), "accuracy": float("nan")}

    return {"loss": loss / labels, "accuracy": right / labels}
