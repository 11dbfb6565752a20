"""A batch that does not fit is halved, said so, and nothing is lost."""

import pytest
import torch

from oscar_extract import out_of_memory
from oscar_extract.out_of_memory import Limit, detect_within


class Small:
    """A detector with memory for `room` images."""

    def __init__(self, room, monkeypatch):
        self.room, self.tried = room, []
        monkeypatch.setattr(out_of_memory, "detect", self.detect)

    def detect(self, detector, inputs, selection):
        self.tried.append(len(inputs))
        if len(inputs) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return [f"regions of {i.name}" for i in inputs]


class Image:
    def __init__(self, name):
        self.name = name
        self.target = type("Target", (), {"width": 800, "height": 600})


def found_in(small, limit, count):
    return detect_within(limit, small, [Image(n) for n in range(count)], None)


@pytest.mark.parametrize(
    ("room", "tried"), [(8, [8]), (4, [8, 4, 4]), (3, [8, 4, 2, 2, 2, 2]), (1, [8, 4, 2] + [1] * 8)]
)
def test_batches_are_halved_until_they_fit(monkeypatch, capsys, room, tried):
    small = Small(room, monkeypatch)
    assert found_in(small, Limit(images=8), 8) == [f"regions of {n}" for n in range(8)]
    assert small.tried == tried
    said = capsys.readouterr().err.splitlines()
    assert len(said) == sum(n > room for n in tried)
    assert all(line.startswith("out of memory at ") and "800x600" in line for line in said)


def test_the_smaller_batch_is_remembered(monkeypatch):
    small, limit = Small(2, monkeypatch), Limit(images=8)
    found_in(small, limit, 8)
    small.tried.clear()
    found_in(small, limit, 5)
    assert small.tried == [2, 2, 1]


def test_one_image_that_is_too_much_is_given_up_alone(monkeypatch):
    assert found_in(Small(0, monkeypatch), Limit(images=4), 3) == [None] * 3
