"""The regions of images, read at their offsets in the tars straight into a batch: each byte is copied once.

Features that are stored as int8 are read into a scratch row first, and multiplied into the batch.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oscar_common.errors import OperationError, UsageError
from oscar_common.settings import DTYPES
from oscar_shards.read import ShardFolder
from oscar_train.ragged import Ints

MAX_REGIONS = 50  # the first ones: those the detector is surest of
BOX = 6  # numbers in z


@dataclass(frozen=True)
class Slots:
    """Room for the regions of B images. features: float16 [B, 50, P]; boxes: float32 [B, 50, 4]; counts: int64 [B]."""

    features: npt.NDArray[np.float16]
    boxes: npt.NDArray[np.float32]
    counts: Ints


class RegionReader:
    """Reads regions of any images of a folder. Threads share the work; `preadv` lets go of the interpreter's lock."""

    def __init__(self, folder: ShardFolder, threads: int = 2) -> None:
        self.folder = folder
        self.feature_dim = folder.manifest.detector.feature_dim
        self.quantised = folder.manifest.detector.dtype == "int8"
        columns = {n: folder.table.column(n).fill_null(0).to_numpy() for n in _COLUMNS}
        self._shard, self._count = columns["shard"], columns["num_boxes"].astype(np.int64)
        self._boxes, self._features = columns["boxes_offset"], columns["features_offset"]
        self._scales = columns["scales_offset"]
        self._size = np.stack([columns["width"], columns["height"]], 1).astype(np.float32)  # [N, 2]
        self._check(columns)
        self._pool = ThreadPoolExecutor(threads, "regions")
        self._scratch = threading.local()

    def slots(self, batch_size: int, pin: bool = False) -> Slots:
        """Make room for a batch, pinned for copies to a GPU or not; `read` may fill the same room again and again."""
        shape = (batch_size, MAX_REGIONS)
        features = torch.zeros((*shape, self.feature_dim), dtype=torch.float16, pin_memory=pin).numpy()
        return Slots(features, np.zeros((*shape, 4), np.float32), np.zeros(batch_size, np.int64))

    def read(self, images: Ints, slots: Slots) -> None:
        """Fill `slots` with the first 50 regions of some images (rows of the table); the rest of each row becomes 0.

        Raises:
            OperationError: a tar is gone or cut; names the tar and the image.
        """
        slots.counts[:] = np.minimum(self._count[images], MAX_REGIONS)
        for done in [self._pool.submit(self._read_shard, images, slots, rows) for rows in self._by_shard(images)]:
            done.result()

    def z(self, images: Ints, slots: Slots) -> npt.NDArray[np.float32]:
        """Return (x1/W, y1/H, x2/W, y2/H, w/W, h/H) of each region (Oscar section 3), float32 [B, 50, 6]."""
        corners = slots.boxes / np.tile(self._size[images], 2)[:, None]
        return np.concatenate([corners, corners[..., 2:] - corners[..., :2]], -1)

    def _by_shard(self, images: Ints) -> Iterator[Ints]:
        """Group the places in a batch by shard, so that each tar is opened once a batch and no handle is kept."""
        order = np.argsort(self._shard[images], kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(self._shard[images][order])) + 1)

    def _read_shard(self, images: Ints, slots: Slots, rows: Ints) -> None:
        tar = self.folder.tars[self._shard[images[rows[0]]]]
        try:
            handle = os.open(tar, os.O_RDONLY)
            try:
                for row in rows:
                    self._read_image(handle, int(images[row]), slots, row)
            finally:
                os.close(handle)
        except OSError as error:
            raise OperationError(f"{tar}: cannot be read: {error.strerror}") from None

    def _read_image(self, handle: int, image: int, slots: Slots, row: int) -> None:
        count = int(slots.counts[row])
        slots.boxes[row, count:] = 0
        slots.features[row, count:] = 0
        if not count:
            return
        self._fill(handle, slots.boxes[row, :count], self._boxes[image], image)
        if not self.quantised:
            self._fill(handle, slots.features[row, :count], self._features[image], image)
            return
        values, scales = (rows[:count] for rows in self._scratch_rows())
        self._fill(handle, values, self._features[image], image)
        self._fill(handle, scales, self._scales[image], image)
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and the loss tells of it
            np.multiply(values, scales[:, None], out=slots.features[row, :count], casting="same_kind")

    def _fill(self, handle: int, array: npt.NDArray[Any], offset: np.int64, image: int) -> None:
        """Read so many bytes from `offset` as the array has; it is contiguous."""
        if os.preadv(handle, [array.reshape(-1).view(np.uint8).data], int(offset)) != array.nbytes:
            tar, key = self._named(image)
            raise OperationError(f"{tar}: image {key} is cut off; the file changed after the run began")

    def _scratch_rows(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """Return this thread's room for the values, int8 [50, P], and scales, float32 [50], of one image."""
        if not hasattr(self._scratch, "rows"):
            self._scratch.rows = np.empty((MAX_REGIONS, self.feature_dim), np.int8), np.empty(MAX_REGIONS, np.float32)
        rows: tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]] = self._scratch.rows
        return rows

    def _named(self, image: int) -> tuple[Path, str]:
        """Return the tar and the key of an image, for messages."""
        return self.folder.tars[self._shard[image]], self.folder.table.column("key")[image].as_py()

    def _check(self, columns: dict[str, npt.NDArray[np.int64]]) -> None:
        """Refuse an index that contradicts the manifest: reads would go to the wrong bytes."""
        dtype = self.folder.manifest.detector.dtype
        if dtype not in DTYPES:
            raise UsageError(f"--shards: manifest.json has features of dtype {dtype!r}; known: {', '.join(DTYPES)}")
        stored_as_int8 = self.folder.table.column("scales_offset").is_valid().to_numpy()
        if len(wrong := np.flatnonzero(stored_as_int8 != self.quantised)):
            tar, key = self._named(int(wrong[0]))
            raise UsageError(
                f"--shards: {tar}: image {key} has features as {DTYPES[int(stored_as_int8[wrong[0]])]}, manifest.json "
                f"says {dtype}; extract it again"
            )
        per_region = {
            "boxes_bytes": 16,
            "scales_bytes": 4 * self.quantised,
            "features_bytes": (1 if self.quantised else 2) * self.feature_dim,
        }
        for name, size in per_region.items():
            if len(wrong := np.flatnonzero(columns[name] != self._count * size)):
                tar, key = self._named(int(wrong[0]))
                raise UsageError(
                    f"--shards: {tar}: image {key} has {columns[name][wrong[0]]} {name} for {self._count[wrong[0]]} "
                    f"regions, not {size} each (P = {self.feature_dim} in manifest.json); extract it again"
                )
        if len(wrong := np.flatnonzero(self._size.min(1) < 1)):
            raise UsageError(f"--shards: image {self._named(int(wrong[0]))[1]} has no size; extract it again")


_COLUMNS = (
    "shard",
    "num_boxes",
    "boxes_offset",
    "boxes_bytes",
    "scales_offset",
    "scales_bytes",
    "features_offset",
    "features_bytes",
    "width",
    "height",
)
