"""Random numbers belong to a place, not to a process."""

import numpy as np

from oscar_train.data.sampling.philox import MIX, SAMPLE, WINDOW, below, permutation, uniform, words


def test_a_place_has_the_same_words_wherever_reading_begins():
    whole = words(7, SAMPLE, 3, 0, 50, 12)
    for first, rows in ((0, 1), (1, 4), (17, 33), (49, 1)):
        np.testing.assert_array_equal(words(7, SAMPLE, 3, first, rows, 12), whole[first : first + rows])


def test_seed_purpose_and_epoch_each_make_another_stream():
    streams = [words(s, p, e, 0, 8, 4).tobytes() for s in (0, 2**63 - 1) for p in (MIX, SAMPLE) for e in (0, 1)]
    assert len(set(streams)) == 8
    lanes = [words(0, WINDOW, 0, 0, 8, 4, lane).tobytes() for lane in ((0, 0), (0, 1), (1, 0), (5, 2**40))]
    assert len({*streams, *lanes}) == 12


def test_numbers_are_spread_evenly():
    drawn = words(1, SAMPLE, 0, 0, 5000, 4)
    assert 0 <= uniform(drawn).min() <= uniform(drawn).max() < 1
    assert abs(uniform(drawn).mean() - 0.5) < 0.01
    counts = np.bincount(below(drawn, 7).ravel(), minlength=7)
    assert counts.min() > 0.9 * drawn.size / 7


def test_an_order_is_every_number_once_and_another_each_epoch():
    orders = [permutation(5, WINDOW, epoch, 1001) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1001))
    assert not (orders[0] == orders[1]).all()
    np.testing.assert_array_equal(permutation(5, WINDOW, 2, 1001), orders[2])


def test_the_numbers_themselves_never_change():
    """Another library version must not silently change the order of a run that is to be continued."""
    assert permutation(42, WINDOW, 0, 10).tolist() == [5, 7, 3, 4, 0, 9, 6, 8, 1, 2]
    assert words(42, SAMPLE, 1, 2, 1, 4)[0, 1:3].tolist() == [6168269473986820063, 436808374135530087]
