"""The memory of a batch, and how it is filled."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oscar_train.batch import BOX, IGNORED, Batch
from oscar_train.data.reading.regions import RegionReader, Slots, make_slots
from oscar_train.data.sampling.shape import PAIR, Shape
from oscar_train.data.sampling.triples import TextBatch
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BatchBuffer:
    """The memory of a batch, used again and again: fresh pages are expensive, pinned ones more so."""

    batch: Batch
    slots: Slots

    def __len__(self) -> int:
        return len(self.slots.counts)

    def rows(self, begin: int, end: int) -> "BatchBuffer":
        """Return some rows of this buffer; they are the same memory."""
        part = slice(begin, end)
        return BatchBuffer(
            batch=self.batch.part(begin, end),
            slots=Slots(**{f.name: getattr(self.slots, f.name)[part] for f in fields(Slots)}),
        )


def make_batch_buffer(size: int, feature_dim: int, pin: bool = False, shape: Shape = PAIR) -> BatchBuffer:
    """Make the buffer for a batch of `size` triples; pinned for copies to a GPU, or not."""

    def empty(dtype: torch.dtype, *lengths: int) -> Tensor:
        return torch.zeros((size * shape.rows, *lengths), dtype=dtype, pin_memory=pin)

    batch = Batch(
        **{name: empty(torch.int64, shape.tokens) for name in ("input_ids", "token_type_ids", "mlm_labels")},
        **{name: empty(torch.int64) for name in ("match_labels", "dropout_seeds", "triples")},
        attention_mask=empty(torch.bool, shape.tokens),
        features=empty(torch.float16, shape.regions, feature_dim),
        z=empty(torch.float32, shape.regions, BOX),
        region_mask=empty(torch.bool, shape.regions),
    )
    return BatchBuffer(batch=batch, slots=make_slots(batch.features.numpy()))


def put_regions(reader: RegionReader, images: Ints, buffer: BatchBuffer) -> None:
    """Complete the regions of images whose features and boxes were read into a room."""
    reader.z(images, buffer.slots, buffer.batch.z.numpy())
    mask = buffer.batch.region_mask.numpy()
    np.less(np.arange(mask.shape[1]), buffer.slots.counts[:, None], out=mask)


def put_text(text: TextBatch, buffer: BatchBuffer, tokenizer: Tokenizer, rows: int = 1) -> None:
    """Put the text of as many rows as a room has into it; triples of which an image was skipped are left out.

    Args:
        rows: of a triple.
    """
    for f in fields(TextBatch):
        getattr(buffer.batch, f.name).numpy()[:] = getattr(text, f.name)
    if not buffer.slots.readable.all():
        whole = buffer.slots.readable.reshape(-1, rows).all(1)
        _leave_out(buffer.batch, ~np.repeat(whole, rows), tokenizer)


def _leave_out(batch: Batch, rows: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> None:
    """Leave triples whose image was skipped out of both losses."""
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        getattr(batch, name).numpy()[rows] = tokenizer.pad if name == "input_ids" else 0
    batch.input_ids.numpy()[rows, 0] = tokenizer.cls
    batch.attention_mask.numpy()[rows, 0] = True  # a row without anything to see would be no number
    for labels in (batch.mlm_labels, batch.match_labels):
        labels.numpy()[rows] = IGNORED


def triple_bytes(feature_dim: int, shape: Shape = PAIR) -> int:
    """Return the bytes that a triple takes in a room, but for a few hundred."""
    return 2 * shape.rows * shape.regions * feature_dim
