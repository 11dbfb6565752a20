"""The stream of batches: which triples a step takes, made some batches ahead while the last one is trained on."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from oscar_common.errors import UsageError
from oscar_common.files import cache_folder, digest
from oscar_shards.cache import ShardCache
from oscar_train.batch import Batch
from oscar_train.data.batch_buffer import BatchBuffer, make_batch_buffer, put_regions, put_text
from oscar_train.data.corpus import Corpus, open_corpus
from oscar_train.data.reading.prefetch import Ahead
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.reading.tars import Tars, check_window
from oscar_train.data.sampling.negatives import make_pools
from oscar_train.data.sampling.order import Order
from oscar_train.data.sampling.shape import PAIR, Shape
from oscar_train.data.sampling.triples import TextBatch, assemble
from oscar_train.data.sources import Source, check_together, open_source
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tags import DETECTED, TagRule
from oscar_train.data.texts.tokens import Tokenizer, load_tokenizer
from oscar_train.objectives import OSCAR, Objective

THREADS = 8  # that make batches, at most, unless more are asked for
LEAST = 128  # rows of a batch that are worth a thread of their own: numpy is slow with fewer
WINDOW = 64  # shards that are shuffled together
SLICE = 4096  # triples after which it is looked whether other shards are needed

Only = npt.NDArray[np.integer[Any]] | None  # the triples that there are, sorted; None: all of a corpus


class Composer(Protocol):
    """Makes rows of triples: a pure function, which several threads may call at once."""

    def __call__(self, triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        """Return the text of the rows of triples, and the image whose regions each row shows, int64 [rows].

        Args:
            triples: int64 [n], which stand at `place`, `place + 1`, ... of an epoch's order.
            seed, epoch, place: what random numbers are drawn for; see `oscar_train.data.sampling.philox.words`.
        """
        ...


class Stream:
    """Batches of a run, or the share of them that one rank of several trains on.

    Step s (from 0) takes positions s * B to (s + 1) * B of an endless sequence of epochs; B is the global batch, and of
    its rows rank r of R takes those from r * B / R on. Each epoch is every triple once in an order of its own (of a
    source of weight w: w times). A batch may reach from one epoch into the next, so nothing is dropped, and every rank
    has the same number of batches. What stands at a position, and every mask and negative, is a function of (corpus,
    seed, objective, weights, window, position): not of B, ranks, threads, or where a run was continued.

    Args:
        corpus, reader: what is read.
        batch_size: B.
        objective: what is replaced and masked, and how that is called.
        weights: of the corpus' sources; all 1 if none are given.
        window: shards that are shuffled together.
        only: the triples that there are, and that texts are drawn from, sorted; None: all of the corpus.
        shape: of a triple's rows.
        composer: makes them, for a task other than the objective's: a function of (corpus, weights, only).
        rank, ranks: r and R; B is a multiple of R.
        threads: that make batches.
        pin: whether batches lie in pinned memory.
    """

    def __init__(
        self,
        corpus: Corpus,
        reader: RegionReader,
        *,
        seed: int,
        batch_size: int,
        objective: Objective = OSCAR,
        weights: Sequence[Fraction] = (),
        window: int = WINDOW,
        only: Only = None,
        shape: Shape = PAIR,
        composer: Callable[[Corpus, Sequence[Fraction], Only], Composer] | None = None,
        rank: int = 0,
        ranks: int = 1,
        threads: int = 1,
        pin: bool = False,
    ) -> None:
        if batch_size % ranks:
            raise UsageError(f"--batch-size {batch_size}: not a multiple of the {ranks} ranks; give one that is")

        weights = tuple(weights) or (Fraction(1),) * len(corpus.sources)
        self.corpus, self.reader, self.seed, self.batch_size, self.pin = corpus, reader, seed, batch_size, pin
        self.size, self.threads, self.objective = batch_size // ranks, threads, objective
        self._first, self.only, self.shape = rank * self.size, only, shape
        self._compose = composer(corpus, weights, only) if composer else pairs(corpus, weights, objective, only)
        starts = corpus.shard_triples if only is None else np.searchsorted(only, corpus.shard_triples)
        self._order = Order(seed, starts, corpus.source_shards, weights, window)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that a training run could see of the corpus, or with the triples that there are."""
        corpus_fingerprint = self.corpus.fingerprint
        return (
            corpus_fingerprint
            if self.only is None
            else digest((corpus_fingerprint, xxh3_128_hexdigest(self.only.tobytes())))
        )

    def buffer(self) -> BatchBuffer:
        """Make the buffer for a batch."""
        return make_batch_buffer(self.size, self.corpus.feature_dim, self.pin, self.shape)

    @property
    def buffers(self) -> int:
        """How many batches there is room for while batches are made ahead."""
        return -(-self.threads // self._parts) + 1

    @property
    def _parts(self) -> int:
        """In how many parts a batch is made."""
        return max(1, min(self.threads, self.size // LEAST))

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that the first triple of a step belongs to."""
        return self._order.find(step * self.batch_size)[0]

    def triples(self, step: int) -> Ints:
        """Return the triples of this rank's share of a step, int64 [B / R]."""
        return self._triples(self._position(step), self.size)

    def first_images(self, count: int) -> Ints:
        """Return the images of the first triples, each once, at most `count`: the same on all ranks."""
        total = len(self.corpus) if self.only is None else len(self.only)
        images = self.corpus.image[self._triples(0, min(8 * count, total))]
        first = np.sort(np.unique(images, return_index=True)[1])
        return images[first[:count]].astype(np.int64)

    def keys(self, step: int) -> list[str]:
        """Return the keys of the images of a step's whole global batch, in its order."""
        triples = self._triples(step * self.batch_size, self.batch_size)
        return [self.corpus.key(image) for image in self.corpus.image[triples].tolist()]

    def text(self, step: int) -> TextBatch:
        """Return the text of a step's triples."""
        return self._rows(self._position(step), self.size)[0]

    def batch(self, step: int, buffer: BatchBuffer) -> Batch:
        """Return the batch of a step, which lies in `buffer`."""
        self._make(self._position(step), buffer)
        return buffer.batch

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """Yield the batches of steps `first` to `end`, made ahead."""
        for buffer in self._ahead(self._make, first, end):
            yield buffer.batch

    def regions(self, first: int, end: int) -> Iterator[Tensor]:
        """Yield the features of steps `first` to `end` alone, float16 [B / R, 50, P], read ahead."""
        for buffer in self._ahead(self._read, first, end):
            yield buffer.batch.features

    def _position(self, step: int) -> int:
        """Return where this rank's share of a step begins in the endless sequence."""
        return step * self.batch_size + self._first

    def _segments(self, position: int, count: int) -> Iterator[tuple[int, int, Ints]]:
        """Yield (epoch, place, triples) of some positions; see `Order.segments`, which counts those that there are."""
        for epoch, place, triples in self._order.segments(position, position + count):
            yield epoch, place, triples if self.only is None else self.only[triples].astype(np.int64)

    def _triples(self, position: int, count: int) -> Ints:
        return np.concatenate([triples for _, _, triples in self._segments(position, count)])

    def _rows(self, position: int, count: int) -> tuple[TextBatch, Ints]:
        """Return the text of the rows of some triples, and their images."""
        parts = [
            self._compose(triples, self.seed, epoch, place) for epoch, place, triples in self._segments(position, count)
        ]
        texts, images = zip(*parts, strict=True)
        joined = {f.name: np.concatenate([getattr(text, f.name) for text in texts]) for f in fields(TextBatch)}
        return TextBatch(**joined), np.concatenate(images)

    def _read(self, position: int, buffer: BatchBuffer) -> None:
        """Read the features of as many triples as there is room for, each of its own image."""
        images = self.corpus.image[self._triples(position, len(buffer) // self.shape.rows)]
        self.reader.read(np.repeat(images, self.shape.rows), buffer.slots)

    def _make(self, position: int, buffer: BatchBuffer) -> None:
        """Make as many triples as there is room for."""
        count = len(buffer) // self.shape.rows
        buffer.batch.triples.numpy()[:] = np.repeat(self._triples(position, count), self.shape.rows)
        text, images = self._rows(position, count)
        self.reader.read(images, buffer.slots)
        put_regions(self.reader, images, buffer)
        put_text(text, buffer, self.corpus.tokenizer, self.shape.rows)

    def _ahead(self, make: Callable[[int, BatchBuffer], object], first: int, end: int) -> Iterator[BatchBuffer]:
        """Yield the rooms of steps, filled by several threads.

        Each makes rows of a batch in one go, text and regions, so that few hands ask for the interpreter's lock: a
        share of a large batch, so that memory does not grow with the threads, or a small one whole.
        """
        depth = self.buffers - 1
        edges = [self.size * part // self._parts for part in range(self._parts + 1)]
        buffers = [self.buffer() for _ in range(self.buffers)]
        rows = self.shape.rows
        pieces = [
            [(begin, buffer.rows(begin * rows, end * rows)) for begin, end in pairwise(edges)] for buffer in buffers
        ]

        with (
            self.reader.tars.reading(),  # until the makers are gone, whom the end of fetching stops
            ThreadPoolExecutor(self.threads, "stream") as makers,
            self._fetching(end) as tell,
        ):

            def begun(step: int) -> list[Future[object]]:
                position = self._position(step)
                return [makers.submit(make, position + row, piece) for row, piece in pieces[step % len(buffers)]]

            coming = deque(map(begun, range(first, min(first + depth, end))))
            for step in range(first, end):
                tell(step)
                if step + depth < end:
                    coming.append(begun(step + depth))
                for part in coming.popleft():
                    part.result()
                yield buffers[step % len(buffers)]

    @contextmanager
    def _fetching(self, end: int) -> Iterator[Callable[[int], None]]:
        """Yield what each step needs, so that tars behind URLs are fetched before they are needed."""
        cache = self.reader.tars.cache
        if cache is None:
            yield lambda step: None
            return

        last: list[list[int]] = []
        with Ahead(self.reader.tars) as ahead:

            def tell(step: int) -> None:
                nonlocal last
                begin = step * self.batch_size
                if last and begin // SLICE == (begin - self.batch_size) // SLICE:
                    return

                if (windows := list(self._order.shards(begin, begin + 1))) != last:
                    last = windows
                    ahead.want(self._needed(begin, end * self.batch_size, cache.limit))

            yield tell

    def _needed(self, begin: int, end: int, limit: int) -> list[int]:
        """Return the shards that are needed for some positions, in order: for an epoch, or as many as `limit` bytes."""
        needed: dict[int, None] = {}
        for window in self._order.shards(begin, min(end, begin + len(self.corpus))):
            needed |= dict.fromkeys(window)
            if self.corpus.tar_bytes[list(needed)].sum() > limit:
                break
        return list(needed)


def pairs(corpus: Corpus, weights: Sequence[Fraction], objective: Objective, only: Only) -> Composer:
    """Return what makes the rows of pre-training: one of each triple, beside the regions of its own image."""
    pools = make_pools(corpus, weights, objective, only)

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        return assemble(corpus, pools, objective, triples, seed, epoch, place), corpus.image[triples]

    return compose


@contextmanager
def open_stream(
    shards: Sequence[str | Source],
    *,
    batch_size: int,
    seed: int = 42,
    tokenizer: Tokenizer | None = None,
    objective: Objective = OSCAR,
    tags: TagRule | None = None,
    texts: Sequence[str] = (),
    mix: Sequence[float] = (),
    window: int = WINDOW,
    only: Callable[[Corpus], Only] = lambda corpus: None,
    shape: Shape = PAIR,
    composer: Callable[[Corpus, Sequence[Fraction], Only], Composer] | None = None,
    rank: int = 0,
    ranks: int = 1,
    threads: int | None = None,
    cache: str | Path | None = None,
    cache_size: float = 100.0,
    skip_corrupt: bool = False,
    pin: bool = False,
) -> Iterator[Stream]:
    """Open a stream over folders of shards, here or behind URLs; see `Stream`, and `oscar_common.settings.Train`.

    Args:
        shards: the folders.
        batch_size: of all ranks together.
        tokenizer: bert-base-uncased's, unless another is given.
        objective: Oscar's, unless another is given.
        tags: which tags are q; the detected ones, unless something else is said.
        texts: overlays made by `oscar-shards texts`.
        mix: a weight for each folder.
        only: chooses the triples, as `Stream` takes them.
        shape, composer: of another task than the objective's, as `Stream` takes them.
        threads: that make batches; unless it is said, one for each core that the ranks of this machine leave, at most
            8.
        cache, cache_size: folder for token ids and fetched shards, and the most GB of these.

    Raises:
        UsageError: something is missing, damaged, refused, or does not fit together.
    """
    folder = cache_folder(cache)
    sources = [place if isinstance(place, Source) else open_source(place, skip_corrupt) for place in shards]
    check_together(sources)
    overlays = [Path(file) for file in texts]
    corpus = open_corpus(
        sources,
        tokenizer or load_tokenizer(None),
        folder,
        overlays,
        skip_corrupt,
        tags=tags or DETECTED,
        width=shape.text,
    )
    remote = any(source.remote is not None for source in sources)
    tars = Tars(corpus, ShardCache(folder, round(cache_size * 1e9)) if remote else None)
    if tars.cache is not None:
        check_window(corpus, tars.cache, window)

    weights = [Fraction(str(weight)) for weight in mix]
    yield Stream(
        corpus,
        RegionReader(corpus, tars, skip_corrupt),
        seed=seed,
        batch_size=batch_size,
        objective=objective,
        weights=weights,
        window=window,
        only=only(corpus),
        shape=shape,
        composer=composer,
        rank=rank,
        ranks=ranks,
        threads=threads or _threads(ranks),
        pin=pin,
    )


def _threads(ranks: int) -> int:
    """Return how many threads make batches in one of the ranks of this machine."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks > 1 else 1
    return max(1, min(len(os.sched_getaffinity(0)) // ranks_here, THREADS))
