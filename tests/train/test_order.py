"""The order: every triple as often as its source's weight says, read from any place, near its neighbours."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from oscar_train.data.sampling.order import BLOCK, Order

COUNTS = np.random.default_rng(0).integers(0, 9, 70)  # triples of each shard; some have none
SHARDS = np.concatenate([[0], np.cumsum(COUNTS)])
SOURCES = np.array([0, 20, 50, 70])


def order(*weights: str, window: int = 4, seed: int = 3) -> Order:
    return Order(seed, SHARDS, SOURCES, [Fraction(w) for w in weights], window)


def epoch(given: Order, number: int) -> np.ndarray:
    return given.triples(number, 0, given.start(number + 1) - given.start(number))


def source_of(triples: np.ndarray) -> np.ndarray:
    return np.searchsorted(SHARDS[SOURCES], triples, "right") - 1


def test_with_equal_weights_an_epoch_is_every_triple_once():
    orders = [epoch(order("1", "1", "1"), number) for number in range(3)]
    for one in orders:
        np.testing.assert_array_equal(np.sort(one), np.arange(SHARDS[-1]))
    assert not (orders[0] == orders[1]).all()
    assert not (orders[0] == epoch(order("1", "1", "1", seed=4), 0)).all()


@pytest.mark.parametrize("weights", [("2", "1", "0.5"), ("0.3", "1", "1.7"), ("0.001", "3", "1")])
def test_a_triple_comes_as_often_as_its_sources_weight(weights: tuple[str, ...]):
    given = order(*weights)
    seen: Counter[int] = Counter()
    for number in range(10):
        seen.update(epoch(given, number).tolist())
        for source, weight in enumerate(map(Fraction, weights)):
            first, last = SHARDS[SOURCES[source]], SHARDS[SOURCES[source + 1]]
            times = [seen[t] for t in range(first, last)]
            assert max(times) - min(times) <= 1
            assert sum(times) == (number + 1) * weight * int(last - first) // 1


def test_any_stretch_is_what_the_whole_has_there():
    given = order("1", "2", "0.5")
    whole = np.concatenate([epoch(given, number) for number in range(5)])
    for size in (1, 7, 331, 500):
        begins = range(0, len(whole) - size + 1, size)
        parts = [t for begin in begins for _, _, t in order("1", "2", "0.5").segments(begin, begin + size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[: len(begins) * size])
    for position in (0, 330, 331, 700):
        number, place = given.find(position)
        assert given.start(number) + place == position
        assert epoch(given, number)[place] == whole[position]


def test_triples_stay_near_those_of_their_window():
    """Reads are local: of each source, the shards in work are those of one window, or of two where one ends."""
    shards = np.arange(0, 400 * 1000 + 1, 1000)
    given = Order(1, shards, np.array([0, 100, 400]), [Fraction(1), Fraction(1)], 4)
    for begin in range(0, 400_000, 1000):
        part = np.unique(given.triples(0, begin, begin + 1000) // 1000)
        assert (part < 100).sum() <= 8
        assert (part >= 100).sum() <= 8
    alone = Order(1, shards, np.array([0, 400]), [Fraction(1)], 4).triples(0, 0, 400_000)
    assert all(len(np.unique(alone[begin : begin + 4000] // 1000)) == 4 for begin in range(0, 400_000, 4000))
    assert BLOCK < 400_000


def test_sources_are_mixed_evenly_all_along():
    shards = np.arange(0, 300_001, 100)
    given = Order(1, shards, np.array([0, 1000, 3000]), [Fraction(1), Fraction(1)], 64)
    whole = given.triples(0, 0, 300_000)
    shares = [np.mean(whole[begin : begin + 10_000] < 100_000) for begin in range(0, 300_000, 10_000)]
    assert np.allclose(shares, 1 / 3, atol=0.02)


def test_the_shards_to_come_are_those_of_the_triples_to_come():
    given = order("1", "2", "0.5")
    for begin, end in ((0, 100), (250, 400), (600, 1200)):
        needed = {
            int(np.searchsorted(SHARDS, t, "right")) - 1 for _, _, part in given.segments(begin, end) for t in part
        }
        said = [shard for window in given.shards(begin, end) for shard in window]
        assert needed <= set(said)


def test_an_epoch_of_millions_is_no_work_before_it_is_read():
    shards = np.arange(4101) * 1585
    given = Order(5, shards, np.array([0, 4100]), [Fraction(1)], 64)
    places = [0, 3_000_000, int(shards[-1]) - 1]
    assert len({int(given.triples(0, p, p + 1)[0]) for p in places}) == 3
    assert given._shuffled.cache_info().currsize <= 2
