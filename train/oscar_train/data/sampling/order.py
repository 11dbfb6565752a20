"""The order of triples: which one stands at a place of an epoch, as a pure function of (seed, epoch, place).

Shards are shuffled, then the triples within a window of neighbouring shards: reads stay local, and what is fetched
ahead is known. Nothing as long as an epoch is ever made, so opening a place in its middle costs one window's shuffle.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np

from oscar_train.data.sampling.philox import MIX, SHARDS, WINDOW, permutation
from oscar_train.data.texts.ragged import Ints

BLOCK = 1 << 16  # places within which the sources are mixed


class Order:
    """An endless sequence of epochs over the triples of several sources.

    A source is an endless sequence of passes, each with all of its T triples once. Of weight w it gives w * T triples
    to each epoch, going on where it was: with weight 1 an epoch has every triple once, with 2 twice, with 0.5 every
    triple once in two epochs. So no triple is ever more than one time ahead of another of its source.

    Args:
        shards: int64 [S + 1], the first triple of each shard; those of one shard are neighbours.
        sources: int64 [F + 1], the first shard of each source.
        weights: of the sources.
        window: shards that are shuffled together.
    """

    def __init__(self, seed: int, shards: Ints, sources: Ints, weights: Sequence[Fraction], window: int) -> None:
        self.seed, self.window = seed, window
        self._shards, self._sources = shards, sources
        self._sizes = np.diff(shards[sources]).tolist()  # T of each source
        # w * T of each source as a ratio of whole numbers: exact, and quicker than a Fraction
        self._shares = [(weight * size).as_integer_ratio() for weight, size in zip(weights, self._sizes, strict=True)]
        self._length = sum(Fraction(*share) for share in self._shares)
        self._plan = lru_cache(maxsize=2 * len(weights))(self._make_plan)
        self._shuffled = lru_cache(maxsize=2 * len(weights))(self._shuffle)
        self._starts = lru_cache(maxsize=2)(self._block_starts)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def start(self, epoch: int) -> int:
        """Return how many triples come before an epoch."""
        return sum(epoch * times // per for times, per in self._shares)

    def find(self, position: int) -> tuple[int, int]:
        """Return the (epoch, place) of a position in the endless sequence."""
        epoch = floor(position / self._length)
        while self.start(epoch) > position:
            epoch -= 1
        while self.start(epoch + 1) <= position:
            epoch += 1
        return epoch, position - self.start(epoch)

    def segments(self, begin: int, end: int) -> Iterator[tuple[int, int, Ints]]:
        """Yield (epoch, place, triples) for each epoch that the positions from `begin` to `end` reach into."""
        while begin < end:
            epoch, place = self.find(begin)
            count = min(end - begin, self.start(epoch + 1) - begin)
            yield epoch, place, self.triples(epoch, place, place + count)
            begin += count

    def triples(self, epoch: int, begin: int, end: int) -> Ints:
        """Return the triples at some places of an epoch, int64 [end - begin]."""
        starts = self._starts(epoch)
        parts = [np.zeros(0, np.int64)]
        for block in range(int(np.searchsorted(starts, begin, "right")) - 1, len(starts) - 1):
            if starts[block] >= end:
                break
            inside = slice(max(begin - int(starts[block]), 0), end - int(starts[block]))
            parts.append(self._block(epoch, block)[inside])

        return np.concatenate(parts)

    def shards(self, begin: int, end: int) -> Iterator[list[int]]:
        """Yield the shards of each window that is needed from position `begin` on, to `end` or a little further."""
        visited: dict[tuple[int, int, int], None] = {}
        while begin < end:
            epoch, place = self.find(begin)
            starts = self._starts(epoch)
            block = int(np.searchsorted(starts, place, "right")) - 1
            passed = self._passed(epoch, block, place - int(starts[block]))

            for source, first, last in self._pieces(epoch, block):
                for number, window, _, _ in self._windows(source, first + passed[source], last):
                    if (source, number, window) not in visited:
                        visited[source, number, window] = None
                        yield self._plan(source, number)[0][window * self.window :][: self.window].tolist()

            begin += int(starts[block + 1]) - place

    def _block_starts(self, epoch: int) -> Ints:
        """Return the first place of each block, int64 [blocks + 1]. Every block has its share of every source."""
        counts = [(epoch + 1) * times // per - epoch * times // per for times, per in self._shares]
        blocks = max(1, -(-sum(counts) // BLOCK))
        starts: Ints = np.sum([count * np.arange(blocks + 1) // blocks for count in counts], 0, np.int64)
        return starts

    def _pieces(self, epoch: int, block: int) -> Iterator[tuple[int, int, int]]:
        """Yield (source, begin, end): what a block takes of the endless sequence of each source."""
        blocks = len(self._starts(epoch)) - 1
        for source, (times, per) in enumerate(self._shares):
            begin, end = epoch * times // per, (epoch + 1) * times // per
            yield source, begin + (end - begin) * block // blocks, begin + (end - begin) * (block + 1) // blocks

    def _passed(self, epoch: int, block: int, count: int) -> list[int]:
        """Return how many triples of each source the first places of a block have."""
        if not count:
            return [0] * len(self._sizes)
        sources = np.searchsorted(self._shards[self._sources], self._block(epoch, block)[:count], "right") - 1
        counts: list[int] = np.bincount(sources, minlength=len(self._sizes)).tolist()
        return counts

    def _make_block(self, epoch: int, block: int) -> Ints:
        """Return the triples of a block: those of each source in their order, at places drawn for them."""
        pieces = [self._taken(*piece) for piece in self._pieces(epoch, block)]
        if len(pieces) == 1:
            return pieces[0]

        ends = np.cumsum([0, *map(len, pieces)])
        places = permutation(self.seed, MIX, epoch, int(ends[-1]), (block, 0))
        triples = np.empty(len(places), np.int64)

        for part, begin, end in zip(pieces, ends, ends[1:], strict=False):
            triples[np.sort(places[begin:end])] = part

        return triples

    def _taken(self, source: int, begin: int, end: int) -> Ints:
        """Return a stretch of a source's endless sequence."""
        windows = self._windows(source, begin, end)
        parts = [self._shuffled(source, number, window)[first:last] for number, window, first, last in windows]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _windows(self, source: int, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (pass, window, begin, end): where a stretch of a source's endless sequence lies in its windows."""
        while begin < end:
            number, place = divmod(begin, self._sizes[source])
            edges = self._plan(source, number)[1]
            window = int(np.searchsorted(edges, place, "right")) - 1
            count = min(end - begin, int(edges[window + 1]) - place)
            yield number, window, place - int(edges[window]), place - int(edges[window]) + count
            begin += count

    def _make_plan(self, source: int, number: int) -> tuple[Ints, Ints]:
        """Return the shards of a pass in their order, and the first place of each window, int64 [windows + 1]."""
        first, last = self._sources[source], self._sources[source + 1]
        shards = first + permutation(self.seed, SHARDS, number, int(last - first), (source, 0))
        ends = np.cumsum([0, *(self._shards[shards + 1] - self._shards[shards])])
        return shards, ends[np.minimum(np.arange(0, len(shards) + self.window, self.window), len(shards))]

    def _shuffle(self, source: int, number: int, window: int) -> Ints:
        """Return the triples of a window of shards in their order."""
        shards = self._plan(source, number)[0][window * self.window :][: self.window]
        triples = np.concatenate([np.arange(self._shards[s], self._shards[s + 1]) for s in shards])
        return triples[permutation(self.seed, WINDOW, number, len(triples), (source, window))]
