"""Too large a batch: halve it and go on, saying so."""

import sys
from dataclasses import dataclass

import torch

from oscar_common.sample import Regions
from oscar_extract.detect import Input, detect
from oscar_extract.detector import Detector
from oscar_extract.images import RefusedImage
from oscar_extract.steps.selection import Selection


@dataclass(kw_only=True)
class Limit:
    """How many images the device has been found to have the memory for."""

    images: int


def detect_within(
    limit: Limit, detector: Detector, inputs: list[Input], selection: Selection
) -> list[Regions | RefusedImage | None]:
    """Find the regions of a batch, in parts of at most `limit` images; None where a single image is too much.

    When memory runs out the limit is halved, for all that comes after as well. Smaller batches give the same regions.
    """
    results: list[Regions | RefusedImage | None] = []
    while len(results) < len(inputs):
        part = inputs[len(results) : len(results) + limit.images]
        regions = _try(detector, part, selection)
        if regions is not None:
            results += regions
        elif len(part) == 1:
            results.append(None)
        else:
            limit.images = len(part) // 2
            shape = f"{part[0].target.width}x{part[0].target.height}"
            print(f"out of memory at {len(part)} images of {shape}: going on with {limit.images}", file=sys.stderr)

    return results


def _try(detector: Detector, inputs: list[Input], selection: Selection) -> list[Regions | RefusedImage] | None:
    try:
        return detect(detector, inputs, selection)
    except torch.cuda.OutOfMemoryError:
        pass  # what the exception holds is let go first
    torch.cuda.empty_cache()
    return None
