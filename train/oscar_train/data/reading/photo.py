"""The regions of one image, for those who read a few of them; `regions.py` reads batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oscar_common.errors import OperationError
from oscar_shards.read import read_boxes, read_features


def read_regions(tar: Path, row: dict[str, Any], most: int) -> tuple[Tensor, Tensor]:
    """Return the first regions of an image, at most so many: float16 [K, P] and z (Oscar section 3), float32 [K, 6].

    Args:
        tar: the shard.
        row: the image's, of the index.
        most: regions.

    Raises:
        OperationError: the shard is gone or cut.
    """
    try:
        features, boxes = read_features(tar, row), read_boxes(tar, row)
    except (OSError, ValueError):
        raise OperationError(f"{tar}: image {row['key']} cannot be read; see: oscar-shards verify {tar}") from None

    sides = np.maximum([row["width"], row["height"]], 1).astype(np.float32)
    corners = boxes[:most] / np.tile(sides, 2)
    z = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1)
    return torch.from_numpy(features[:most].astype(np.float16)), torch.from_numpy(z)
