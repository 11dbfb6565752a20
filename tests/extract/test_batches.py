"""Images wait for others of their shape, but not for ever, and not too many of them."""

import numpy as np
import pytest

from oscar_common.sample import ImageRecord
from oscar_extract import shard_job
from oscar_extract.detect import Input
from oscar_extract.plan import PlannedImage
from oscar_extract.shard_job import Loaded, ahead, in_batches, pace
from oscar_extract.steps.resize import Target
from oscar_shards.write import Reject


def loaded(number, shape, pixels=1):
    target = Target(height=shape, width=shape, scale_y=1.0, scale_x=1.0)
    return Loaded(
        planned=PlannedImage(key=str(number), source="", id=str(number), path="", also=[], texts=[], root=0),
        input=Input(pixels=np.zeros((pixels, 1, 3), np.uint8), target=target, height=shape, width=shape),
        record=ImageRecord(source="", id=str(number), path="", width=shape, height=shape, sha256=""),
    )


def keys(batches):
    return [b.path if isinstance(b, Reject) else [i.planned.key for i in b] for b in batches]


def test_a_batch_has_one_shape_and_goes_when_it_is_full():
    items = [
        loaded(0, 5),
        loaded(1, 7),
        Reject(path="r", reason="", message=""),
        loaded(2, 5),
        loaded(3, 7),
        loaded(4, 9),
    ]
    assert keys(in_batches(items, 2)) == ["r", ["0", "2"], ["1", "3"], ["4"]]


@pytest.mark.parametrize("pixels", [1, 1000])
def test_what_waits_is_bounded_in_images_and_in_bytes(monkeypatch, pixels):
    """By three images or by three thousand pixels: the group that has waited longest makes room."""
    monkeypatch.setattr(shard_job, "PENDING_BATCHES", 1 if pixels == 1 else 1000)
    monkeypatch.setattr(shard_job, "PENDING_BYTES", 3 * 3000 if pixels > 1 else 1 << 30)
    items = (loaded(n, shape, pixels) for n, shape in enumerate((5, 6, 5, 7, 8, 9)))
    assert keys(in_batches(items, 3)) == [["0", "2"], ["1"], ["3"], ["4"], ["5"]]


@pytest.mark.parametrize("threads", [1, 3])
def test_work_is_so_many_items_ahead_as_there_are_threads_and_in_order(threads):
    """When the first result is looked at, the next ones are being worked on; and no more than that."""
    taken = []
    results = ahead(lambda n: n * n, (taken.append(n) or n for n in range(8)), threads)
    assert next(results) == 0
    assert taken == list(range(threads + 1))
    assert list(results) == [1, 4, 9, 16, 25, 36, 49]


def test_what_goes_wrong_ahead_is_raised_in_its_place():
    results = ahead(lambda n: 1 // n, [2, 1, 0, 1], 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_parts_that_ran_ahead_do_not_count_as_done_in_no_time():
    few = [(0.0, 0), (4.0, 1), (4.0, 2), (4.001, 3)]  # two threads: the third was begun long before
    assert pace(few, threads=2) == pytest.approx(3 / 4, rel=0.01)
    many = [(0.0, 0), *((10.0 + 0.5 * n, n) for n in range(1, 20))]  # the first ones warm up
    assert pace(many, threads=2) == pytest.approx(2)
    assert pace([(0.0, 0)], threads=2) == 0
