"""The regions of images, read at their offsets in the tars straight into the rows of a batch, and checked.

Each byte is copied once: `preadv` puts boxes and features where the model takes them from, and lets go of the
interpreter's lock, so threads are enough. Their XXH3-64 is compared with the index' while they are in the processor's
cache, which costs a twentieth of the read. Features as int8, and images with more than 50 regions (the hash is of all
of them), go through a scratch buffer.
"""

import errno
import os
import threading
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from xxhash import xxh3_64_intdigest

from oscar_common.errors import OperationError
from oscar_common.progress import warn
from oscar_train.batch import BOX
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.tars import Lost, Tars
from oscar_train.data.texts.collection import FLOAT16, UNREADABLE
from oscar_train.data.texts.ragged import Ints

POSITIONS = (4, BOX)  # how many of them a model may take
GAP = 4096  # bytes between two arrays that are read along rather than with another call
TORCH_ALONE = 32767  # numbers that torch works on in the thread that asks
LAST = "; others will only be counted"
SAID = 20  # skipped images that are named; the others are counted


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Room for the regions of B images, which `RegionReader.read` may fill again and again.

    features: float16 [B, R, P]. boxes: float32 [B, R, 4]; R is 50 in pre-training. counts: int64 [B], regions of each.
    readable: bool [B], false where an image was skipped.
    """

    features: npt.NDArray[np.float16]
    boxes: npt.NDArray[np.float32]
    counts: Ints
    readable: npt.NDArray[np.bool_]
    feature_bytes: list[memoryview]  # of each row
    box_bytes: list[memoryview]


def make_slots(features: npt.NDArray[np.float16]) -> Slots:
    """Make room beside an array for features."""
    size, regions = features.shape[:2]
    boxes = np.zeros((size, regions, 4), np.float32)
    return Slots(
        features=features,
        boxes=boxes,
        counts=np.zeros(size, np.int64),
        readable=np.ones(size, bool),
        feature_bytes=_rows(features),
        box_bytes=_rows(boxes),
    )


class Place(NamedTuple):
    """Where the regions of the image in one row of a batch lie; see `oscar_train.data.corpus.Images`."""

    shard: int
    num_boxes: int
    boxes_offset: int
    boxes_xxh3: int
    scales_offset: int
    scales_xxh3: int
    features_offset: int
    features_xxh3: int
    image: int
    row: int


class RegionReader:
    """Reads regions of any images of a corpus; several threads may do so at once.

    skip_corrupt: an image that is gone or damaged is named, counted and left empty, instead of being an error.
    """

    def __init__(self, corpus: Corpus, tars: Tars, skip_corrupt: bool = False) -> None:
        self.corpus, self.tars, self.skip_corrupt = corpus, tars, skip_corrupt
        self.skipped: set[int] = set()
        self._scratch, self._counting = threading.local(), threading.Lock()

    def read(self, images: npt.NDArray[np.integer[Any]], slots: Slots) -> None:
        """Fill `slots` with the first R regions of some images; the rest of each row becomes 0.

        Raises:
            OperationError: a tar or an image is gone, cut or damaged.
        """
        slots.counts[:] = np.minimum(self.corpus.images.num_boxes[images], slots.features.shape[1])
        slots.readable[:] = True
        for shard, group in groupby(self._places(images), attrgetter("shard")):
            places = list(group)
            wrong = self._read_from(shard, places, slots)
            if wrong and self.tars.renew(shard):  # a copy that was damaged since it was fetched
                wrong = self._read_from(shard, [place for place, _ in wrong], slots)
            for place, fault in wrong:
                self._refuse(place, fault, slots)

    def z(self, images: npt.NDArray[np.integer[Any]], slots: Slots, out: npt.NDArray[np.float32]) -> None:
        """Write (x1/W, y1/H, x2/W, y2/H, w/W, h/H) of each region (Oscar section 3) into float32 [B, R, 6]."""
        sides = (self.corpus.images.width, self.corpus.images.height)
        size = [np.maximum(side[images], 1).astype(np.float32)[:, None] for side in sides]
        for column in range(4):  # numpy is slow where the last axis is short
            np.divide(slots.boxes[..., column], size[column % 2], out=out[..., column])
        for column in range(2):
            np.subtract(out[..., column + 2], out[..., column], out=out[..., column + 4])

    def _places(self, images: npt.NDArray[np.integer[Any]]) -> list[Place]:
        """Look the images up, in the order of their bytes."""
        columns = {name: getattr(self.corpus.images, name)[images] for name in Place._fields[:-2]}
        order = np.lexsort((columns["features_offset"], columns["shard"]))
        listed = [columns[name][order].tolist() for name in Place._fields[:-2]]
        return list(map(Place._make, zip(*listed, images[order].tolist(), order.tolist(), strict=True)))

    def _read_from(self, shard: int, places: list[Place], slots: Slots) -> list[tuple[Place, str]]:
        """Read images of one tar; return those that are damaged, and what is wrong with them."""
        try:
            with self.tars.open(shard) as handle:
                unusual = self._read_usual(handle, places, slots)
                read_images = [(place, self._read_image(handle, place, slots)) for place in unusual]
        except Lost as error:
            return [(place, str(error)) for place in places]

        return [(place, fault) for place, fault in read_images if fault]

    def _read_usual(self, handle: int, places: list[Place], slots: Slots) -> list[Place]:
        """Fill the rows of images that are as most are: float16, at most R regions, boxes and features with one call,
        nothing wrong. Return the others.

        One loop of few steps: two threads that read at once wait for each other's Python more than for the bytes.
        """
        gap_room, digest, preadv = self._room(GAP), xxh3_64_intdigest, os.preadv
        region, most = slots.features.strides[1], slots.features.shape[1]
        unusual = []

        for place in places:
            _, count, boxes_at, boxes_xxh3, scales_at, _, features_at, features_xxh3, _, row = place
            gap = features_at - boxes_at - 16 * count
            if count <= most and scales_at == FLOAT16 and 0 <= gap <= GAP:
                boxes, features = slots.box_bytes[row][: 16 * count], slots.feature_bytes[row][: region * count]
                try:
                    done = preadv(handle, (boxes, gap_room[:gap], features), boxes_at)
                except OSError:
                    done = -1

                whole = done == gap + (16 + region) * count
                if whole and digest(boxes) == boxes_xxh3 and digest(features) == features_xxh3:
                    if count < most:
                        _clear(slots, row, count)
                    continue

            unusual.append(place)

        return unusual

    def _read_image(self, handle: int, place: Place, slots: Slots) -> str | None:
        """Fill one row from arrays that are read whole, checked, and then copied or multiplied; return what is wrong
        with the image, if anything."""
        if place.features_offset == UNREADABLE:
            return "its index contradicts itself"

        try:
            arrays = self._arrays(handle, place, slots.features.shape[2])
        except EOFError:
            return "it is cut off"
        except OSError as error:
            if error.errno != errno.EIO:
                raise OperationError(f"{self.corpus.shard_name(place.shard)}: {error.strerror}") from None
            return f"it cannot be read ({error.strerror})"

        for name, content in arrays.items():
            if len(content) and xxh3_64_intdigest(content) != getattr(place, f"{name}_xxh3"):
                return f"its {name} are not those that were written (checksum)"

        total, count = place.num_boxes, min(place.num_boxes, slots.features.shape[1])
        int8 = place.scales_offset != FLOAT16
        slots.boxes[place.row, :count] = np.frombuffer(arrays["boxes"], "<f4").reshape(total, 4)[:count]
        features = np.frombuffer(arrays["features"], "i1" if int8 else "<f2").reshape(total, slots.features.shape[2])[
            :count
        ]
        if int8:
            _multiply(features, np.frombuffer(arrays["scales"], "<f4")[:count, None], slots.features[place.row, :count])
        else:
            slots.features[place.row, :count] = features

        _clear(slots, place.row, count)
        return None

    def _arrays(self, handle: int, place: Place, width: int) -> dict[str, memoryview]:
        """Read the arrays of an image into this thread's own room."""
        total, int8 = place.num_boxes, place.scales_offset != FLOAT16
        sizes = {"boxes": 16 * total, "scales": 4 * total * int8, "features": (1 if int8 else 2) * total * width}
        ends = np.cumsum([0, *sizes.values()]).tolist()
        scratch = self._room(ends[-1])
        arrays = {name: scratch[begin:end] for name, begin, end in zip(sizes, ends, ends[1:], strict=False)}

        for name, buffer in arrays.items():
            _fill(handle, buffer, getattr(place, f"{name}_offset"))

        return arrays

    def _room(self, size: int) -> memoryview:
        """Return so many bytes of this thread's own, which it may use until it asks again."""
        if len(getattr(self._scratch, "buffer", b"")) < size:
            self._scratch.buffer = memoryview(bytearray(size))
        buffer: memoryview = self._scratch.buffer
        return buffer[:size]

    def _refuse(self, place: Place, what: str, slots: Slots) -> None:
        """Leave a row empty, or stop."""
        line = f"{self.corpus.shard_name(place.shard)}: image {self.corpus.key(place.image)}: {what}"
        if not self.skip_corrupt:
            raise OperationError(
                f"{line}; extract its shard again (delete the tar and run the same oscar-extract command), or go on "
                "without what is damaged: --skip-corrupt"
            )

        slots.readable[place.row] = False
        slots.counts[place.row] = 0
        _clear(slots, place.row, 0)

        with self._counting:
            if place.image not in self.skipped:
                self.skipped.add(place.image)
                if len(self.skipped) <= SAID:
                    warn(f"skipped: {line}{LAST if len(self.skipped) == SAID else ''}")


def _multiply(values: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], out: npt.NDArray[np.float16]) -> None:
    """Multiply rows by their scale, rounded to float16; torch does it ten times as fast as numpy.

    A few rows at a time, so that it starts no threads of its own beside the readers'.
    """
    rows = max(1, TORCH_ALONE // max(values.shape[1], 1))
    arrays = (torch.from_numpy(array).split(rows) for array in (out, values, scales))
    for result, part, scale in zip(*arrays, strict=True):
        result.copy_(part * scale)


def _rows(array: npt.NDArray[Any]) -> list[memoryview]:
    return [row.data for row in array.reshape(len(array), -1).view(np.uint8)]


def _clear(slots: Slots, row: int, count: int) -> None:
    """Empty a row after its first regions."""
    slots.boxes[row, count:] = 0
    slots.features[row, count:] = 0


def _fill(handle: int, buffer: memoryview, offset: int) -> None:
    """Read until the buffer is full; file systems may give less at a time."""
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if not count:
            raise EOFError
        done += count
