"""Photos as captions are written for them: their tags in the places of training, and their regions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from oscar_shards.read import ShardFolder
from oscar_train.batch import BOX, IGNORED, MAX_REGIONS, MAX_TEXT, Batch
from oscar_train.captioning.layout import laid_out
from oscar_train.data.reading.photo import read_regions
from oscar_train.data.sampling.text_pairs import Bools, Tokens
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tags import Tagging, TagRule
from oscar_train.data.texts.tokens import Tokenizer


@dataclass(frozen=True)
class Photos:
    """Some images of shards: their rows of the index as dicts, the tars they are in, and the batch that they make."""

    rows: list[dict[str, Any]]
    tars: list[Path]
    batch: Batch


def read_photos(
    folder: ShardFolder, rule: TagRule, tokenizer: Tokenizer, size: int, regions: int = MAX_REGIONS
) -> Iterator[Photos]:
    """Yield all images of a folder in the order of its shards, `size` at a time.

    Args:
        rule: which tags are taken.
        regions: as many of an image are taken, the first.

    Raises:
        OperationError: a shard is gone or cut.
    """
    tagging = Tagging(tokenizer, rule, MAX_TEXT)
    for rows in folder.table.to_batches(size):
        listed = rows.to_pylist()
        tars = [folder.tars[row["shard"]] for row in listed]
        text = _text(rows, tagging, tokenizer)
        yield Photos(listed, tars, _batch(listed, tars, text, folder.manifest.detector.feature_dim, regions))


def _text(rows: pa.RecordBatch, tagging: Tagging, tokenizer: Tokenizer) -> tuple[Tokens, Ints, Bools]:
    """Return the tags of images in their places, as `laid_out` does, without captions."""
    count = len(rows)
    tags, _ = tagging(rows)
    nothing, lengths = np.zeros((count, 0), np.int32), np.zeros(count, np.int64)
    return laid_out(tokenizer, nothing, lengths, *tags.padded(np.arange(count), MAX_TEXT))


def _batch(
    rows: Sequence[dict[str, Any]],
    tars: Sequence[Path],
    text: tuple[Tokens, Ints, Bools],
    feature_dim: int,
    most: int,
) -> Batch:
    count, (ids, types, present) = len(rows), text
    features = torch.zeros(count, most, feature_dim, dtype=torch.float16)
    z = torch.zeros(count, most, BOX)
    regions = torch.zeros(count, most, dtype=torch.bool)

    for number, (row, tar) in enumerate(zip(rows, tars, strict=True)):
        if not row["num_boxes"]:
            continue
        of_image, z_of_image = read_regions(tar, row, most)
        first = len(of_image)
        features[number, :first], z[number, :first] = of_image, z_of_image
        regions[number, :first] = True

    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        token_type_ids=torch.from_numpy(types),
        attention_mask=torch.from_numpy(present & (types == 1)),
        mlm_labels=torch.full(ids.shape, IGNORED),
        features=features,
        z=z,
        region_mask=regions,
        match_labels=torch.full((count,), IGNORED),
        dropout_seeds=zeros,
        triples=zeros,
    )
