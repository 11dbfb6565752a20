"""The regions of images, read at their offsets in the tars straight into a batch: each byte is copied once."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from oscar_common.errors import OperationError, UsageError
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
        columns = {n: folder.table.column(n).to_numpy() for n in _COLUMNS}
        self._shard, self._count = columns["shard"], columns["num_boxes"].astype(np.int64)
        self._boxes, self._features = columns["boxes_offset"], columns["features_offset"]
        self._size = np.stack([columns["width"], columns["height"]], 1).astype(np.float32)  # [N, 2]
        self._check(columns)
        self._pool = ThreadPoolExecutor(threads, "regions")

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
        for array, offset in ((slots.boxes[row], self._boxes[image]), (slots.features[row], self._features[image])):
            array[count:] = 0
            if (
                count
                and os.preadv(handle, [array[:count].reshape(-1).view(np.uint8)], int(offset)) != array[:count].nbytes
            ):
                tar, key = self.folder.tars[self._shard[image]], self.folder.table.column("key")[image]
                raise OperationError(f"{tar}: image {key} is cut off; the file changed after the run began")

    def _check(self, columns: dict[str, npt.NDArray[np.int64]]) -> None:
        """Refuse an index that contradicts the manifest: reads would go to the wrong bytes."""
        per_region = {"boxes_bytes": 16, "features_bytes": 2 * self.feature_dim}
        for name, size in per_region.items():
            if len(wrong := np.flatnonzero(columns[name] != self._count * size)):
                tar, key = self.folder.tars[self._shard[wrong[0]]], self.folder.table.column("key")[int(wrong[0])]
                raise UsageError(
                    f"--shards: {tar}: image {key} has {columns[name][wrong[0]]} {name} for {self._count[wrong[0]]} "
                    f"regions, not {size} each (P = {self.feature_dim} in manifest.json); extract it again"
                )
        if len(wrong := np.flatnonzero(self._size.min(1) < 1)):
            raise UsageError(
                f"--shards: image {self.folder.table.column('key')[int(wrong[0])]} has no size; extract it again"
            )


_COLUMNS = (
    "shard",
    "num_boxes",
    "boxes_offset",
    "boxes_bytes",
    "features_offset",
    "features_bytes",
    "width",
    "height",
)
