"""From decoded pixels to the detector's input: the three resize rules of the reference extractors.

Each rule says to which shape an image goes, so that images of one shape can share a batch, and how. Pillow's rules work
on uint8 in the decoding threads; OpenCV's, on float32, is done on the detector's device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image
from torch import Tensor

from oscar_extract.images import RefusedImage

RULES = ("detectron2", "caffe", "maskrcnn-benchmark")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an image is resized to. `scale_x`, `scale_y`: pixels of the input per pixel of the original."""

    height: int
    width: int
    scale_y: float
    scale_x: float


def target_of(rule: str, cfg: Any, height: int, width: int) -> Target:
    """Return the input's shape for an image of height x width pixels.

    Raises:
        RefusedImage: so thin that a side would vanish.
    """
    short, long = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if rule == "caffe":
        target = _caffe(height, width, short, long)
    elif rule == "maskrcnn-benchmark":
        target = _both(height, width, *_maskrcnn_benchmark(height, width, short, long))
    else:
        transform = ResizeShortestEdge([short] * 2, long).get_transform(np.empty((height, width)))
        target = _both(height, width, transform.new_h, transform.new_w)

    if min(target.height, target.width) < 1:
        raise RefusedImage("too-thin", f"{width}x{height} pixels would be resized to a line")

    return target


def _both(height: int, width: int, h: int, w: int) -> Target:
    return Target(height=h, width=w, scale_y=h / height, scale_x=w / width)


def _caffe(height: int, width: int, short: int, long: int) -> Target:
    """One factor for both sides, kept as it is though the shape is rounded (Caffe `_get_image_blob`, cv2.resize)."""
    scale = short / min(height, width)
    if np.round(scale * max(height, width)) > long:
        scale = long / max(height, width)
    return Target(height=round(height * scale), width=round(width * scale), scale_y=scale, scale_x=scale)


def _maskrcnn_benchmark(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The shorter side is exact, the longer one truncated (`maskrcnn_benchmark` transforms `Resize.get_size`)."""
    low, high = float(min(height, width)), float(max(height, width))
    if high / low * short > long:
        short = round(long * low / high)
    if min(height, width) == short:
        return height, width
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


def shrink(rule: str, pixels: npt.NDArray[np.uint8], target: Target) -> npt.NDArray[np.uint8]:
    """Resize uint8 RGB [H, W, 3] as far as the rule does it on uint8: with Pillow's bilinear filter, or not at all."""
    if rule == "caffe" or pixels.shape[:2] == (target.height, target.width):
        return pixels
    size = (target.width, target.height)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def normalize(rule: str, cfg: Any, pixels: npt.NDArray[np.uint8], target: Target, device: torch.device) -> Tensor:
    """Return the input, float32 [3, h, w] in the model's channel order, mean subtracted and divided by std."""
    image = torch.tensor(pixels).to(device).permute(2, 0, 1)
    if cfg.INPUT.FORMAT == "BGR":
        image = image.flip(0)

    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD, device=device).view(3, 1, 1)
    image = (image.float() - mean) / std
    return _bilinear(image, target) if rule == "caffe" else image


def _bilinear(image: Tensor, target: Target) -> Tensor:
    """Do what cv2.resize(image, fx=scale, fy=scale) does: sample at (x + 1/2) / scale - 1/2, without antialiasing.

    torch's own `interpolate` takes the scale or the shape but not both, and places the samples in float32, OpenCV in
    float64: on noise that differs by 0.02 of 255.
    """
    for axis, count, scale in ((2, target.width, target.scale_x), (1, target.height, target.scale_y)):
        low, high, weight = _taps(image.shape[axis], count, scale, image.device)
        shape = [-1 if a == axis else 1 for a in range(3)]
        image = torch.lerp(image.index_select(axis, low), image.index_select(axis, high), weight.view(shape))
    return image


def _taps(size: int, count: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of `count` samples its two pixels of `size`, and the weight of the second."""
    at = ((np.arange(count) + 0.5) / scale - 0.5).clip(0, size - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return tuple(torch.from_numpy(a).to(device) for a in (low, high, (at - low).astype(np.float32)))  # type: ignore
