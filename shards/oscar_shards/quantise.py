"""Features as int8 with a scale a row: half the bytes of float16, at an error that docs/shards.md has measured."""

from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST = 127
FLOAT16_LIMIT = 65520  # float32 from here on is infinite as float16


def quantise(features: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return values int8 [K, P] and scales float32 [K] of features [K, P]: a feature is nearly value times scale.

    A row's largest feature becomes 127 or -127. The scale is rounded up to 17 significant bits: then its product with
    any value is exact in float32, and quantising such products gives the same values and scales again.
    """
    rows = features.astype(np.float32)
    exact = np.abs(rows).max(1, initial=0) / np.float32(LARGEST)
    scales = ((exact.view(np.uint32) + np.uint32(0x7F)) & ~np.uint32(0x7F)).view(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(scales[:, None] > 0, np.rint(rows / scales[:, None]), 0)
        return values.astype(np.int8), scales


def dequantise(values: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return features, float32 [K, P], of values int8 [K, P] and scales float32 [K]."""
    return values * scales[:, None]


def are_finite(array: npt.NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite; float16, which processors do not compute with, is tested by its bits."""
    if array.dtype == np.float16:
        return not array.size or bool((array.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return array.dtype == np.int8 or bool(np.isfinite(array).all())
