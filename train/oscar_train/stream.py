"""The stream of batches: which triples a step takes, and one batch read ahead while the last one is trained on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from oscar_train.corpus import Corpus
from oscar_train.draws import permutation
from oscar_train.ragged import Ints
from oscar_train.regions import RegionReader, Slots
from oscar_train.triples import TextBatch, assemble


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B triples. The memory of `features` is used again two batches later: copy what is to be kept.

    input_ids, token_type_ids, mlm_labels (-100: not masked): int64 [B, 35]. attention_mask: bool [B, 85], text then
    regions. features: float16 [B, 50, P]. z: float32 [B, 50, 6]. match_labels: int64 [B], 0 matched, 1 polluted.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    mlm_labels: Tensor
    features: Tensor
    z: Tensor
    match_labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class Stream:
    """Batches of a run. Step s (from 0) takes positions s * B to (s + 1) * B of an endless sequence of epochs.

    Each epoch is every triple once in an order of its own; a batch may reach from one into the next, so nothing is
    dropped. A batch is a function of (corpus, seed, step, batch size), and a triple's masks and q do not depend on the
    batch size either.
    """

    def __init__(self, corpus: Corpus, reader: RegionReader, *, seed: int, batch_size: int, pin: bool = False) -> None:
        self.corpus, self.reader, self.seed, self.batch_size, self.pin = corpus, reader, seed, batch_size, pin
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(corpus)))

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that the first triple of a step belongs to."""
        return step * self.batch_size // len(self.corpus)

    def segments(self, step: int) -> Iterator[tuple[int, int, Ints]]:
        """Yield (epoch, place, triples) for each epoch that a step reaches into."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            epoch, place = divmod(position, len(self.corpus))
            count = min(end - position, len(self.corpus) - place)
            yield epoch, place, self._order(epoch)[place : place + count]
            position += count

    def text(self, step: int) -> TextBatch:
        """Return the text of a step's triples."""
        parts = [
            assemble(self.corpus, triples, self.seed, epoch, place) for epoch, place, triples in self.segments(step)
        ]
        return TextBatch(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(TextBatch)})

    def batch(self, step: int, slots: Slots) -> Batch:
        """Return the batch of a step; its regions lie in `slots`."""
        images = self.corpus.image[np.concatenate([triples for _, _, triples in self.segments(step)])]
        self.reader.read(images, slots)
        text = self.text(step)
        seen = np.arange(slots.boxes.shape[1]) < slots.counts[:, None]
        return Batch(
            input_ids=torch.from_numpy(text.input_ids).long(),
            token_type_ids=torch.from_numpy(text.token_types),
            attention_mask=torch.from_numpy(np.concatenate([text.attention, seen], 1)),
            mlm_labels=torch.from_numpy(text.labels),
            features=torch.from_numpy(slots.features),
            z=torch.from_numpy(self.reader.z(images, slots)),
            match_labels=torch.from_numpy(text.match_labels),
        )

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """Yield the batches of steps `first` to `end`, reading one ahead."""
        rooms = [self.reader.slots(self.batch_size, pin=self.pin) for _ in range(2)]
        with ThreadPoolExecutor(1, "stream") as ahead:
            coming = ahead.submit(self.batch, first, rooms[first % 2])
            for step in range(first, end):
                batch = coming.result()
                if step + 1 < end:
                    coming = ahead.submit(self.batch, step + 1, rooms[(step + 1) % 2])
                yield batch
