"""What the four peers have in common, written out: a C4 ResNet, anchors, boxes, suppression, the attribute head.

Shapes: h × w is the resized image, a map is [1, channels, h / 16, w / 16], N proposals, K regions, P features, C
classes and A attributes without their backgrounds. Boxes are x1, y1, x2, y2.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, islice

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass
class Found:
    """The regions of an image, in the extractor's own order."""

    boxes: np.ndarray  # float32 [K, 4], pixels of the original image
    classes: np.ndarray  # int64 [K], 0 is the first foreground class
    scores: np.ndarray  # float32 [K]
    features: np.ndarray  # float32 [K, P]
    attributes: list[list[tuple[int, float]]]  # of each region: (attribute, probability), 0 is the first foreground one


@dataclass
class Prepared:
    """An image as a network takes it."""

    pixels: Tensor  # float32 [1, 3, h, w], BGR, mean subtracted
    scale_x: float  # pixels of the network per pixel of the original
    scale_y: float

    @property
    def height(self) -> int:
        return self.pixels.shape[2]

    @property
    def width(self) -> int:
        return self.pixels.shape[3]


def as_input(bgr: np.ndarray, scale_x: float, scale_y: float) -> Prepared:
    """Of a float image [h, w, 3] that needs nothing more."""
    pixels = torch.from_numpy(np.ascontiguousarray(bgr.transpose(2, 0, 1), dtype=np.float32))
    return Prepared(pixels[None], scale_x, scale_y)


def resize_caffe(bgr: np.ndarray, min_size: int, max_size: int) -> tuple[np.ndarray, float]:
    """A float image by one factor, which cv2 is told instead of a size; returns [h, w, 3] and the factor."""
    shorter, longer = min(bgr.shape[:2]), max(bgr.shape[:2])
    scale = float(min_size) / float(shorter)
    if np.round(scale * longer) > max_size:
        scale = float(max_size) / float(longer)
    return cv2.resize(bgr, None, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR), scale


@dataclass(frozen=True)
class Trunk:
    """How a peer names its ResNet, and in what it differs from the others'."""

    stem: str
    stages: tuple[str, str, str, str]  # res2 to res4, and res5 in the head
    shortcut: str
    norm: Callable[[str], str]  # the name of a convolution → that of its norm
    eps: float
    caffe_pool: bool  # the stem's pooling: no padding, and a last window that sticks out
    stride_in_1x1: bool
    dilated: bool  # res5 keeps its resolution and looks twice as far

    def maps(self, state: State, pixels: Tensor) -> Tensor:
        """[1, 3, h, w] → [1, channels of res4, h / 16, w / 16]."""
        x = F.relu(self._layer(state, self.stem, pixels, stride=2, padding=3))
        if self.caffe_pool:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=0, ceil_mode=True)
        else:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for name, stride in zip(self.stages[:3], (1, 2, 2), strict=True):
            x = self._stage(state, name, x, stride=stride)
        return x

    def head(self, state: State, pooled: Tensor) -> Tensor:
        """[N, channels of res4, 14, 14] → [N, P]."""
        if self.dilated:
            x = self._stage(state, self.stages[3], pooled, stride=1, dilation=2)
        else:
            x = self._stage(state, self.stages[3], pooled, stride=2)
        return x.mean(dim=(2, 3))

    def _stage(self, state: State, name: str, x: Tensor, *, stride: int, dilation: int = 1) -> Tensor:
        for number in count():
            if f"{name}.{number}.conv1.weight" not in state:
                return x
            x = self._block(state, f"{name}.{number}", x, stride=stride if number == 0 else 1, dilation=dilation)
        raise AssertionError

    def _block(self, state: State, name: str, x: Tensor, *, stride: int, dilation: int) -> Tensor:
        first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
        y = F.relu(self._layer(state, f"{name}.conv1", x, stride=first))
        y = F.relu(self._layer(state, f"{name}.conv2", y, stride=second, padding=dilation, dilation=dilation))
        y = self._layer(state, f"{name}.conv3", y)
        if f"{name}.{self.shortcut}.weight" in state:
            x = self._layer(state, f"{name}.{self.shortcut}", x, stride=stride)
        return F.relu(y + x)

    def _layer(
        self, state: State, name: str, x: Tensor, *, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> Tensor:
        """A convolution and its norm; how many groups there are is in the weight's shape."""
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1] // weight.shape[1])
        norm = self.norm(name)
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + self.eps).sqrt()
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]


def detectron2_trunk(*, caffe_pool: bool, dilated: bool) -> Trunk:
    """The names that M and A take over from detectron2."""
    return Trunk(
        stem="backbone.stem.conv1",
        stages=("backbone.res2", "backbone.res3", "backbone.res4", "roi_heads.res5"),
        shortcut="shortcut",
        norm=lambda conv: f"{conv}.norm",
        eps=1e-5,
        caffe_pool=caffe_pool,
        stride_in_1x1=True,
        dilated=dilated,
    )


def convolve(state: State, name: str, x: Tensor, padding: int = 0) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attribute_logits(state: State, names: tuple[str, str, str], features: Tensor, rows: Tensor) -> Tensor:
    """[N, P] features beside the embeddings of class rows [N] → [N, as many as the last layer has].

    names: the embedding, the hidden layer, the output.
    """
    embedding, hidden, output = names
    x = torch.cat([features, state[f"{embedding}.weight"][rows]], dim=1)
    return linear(state, output, F.relu(linear(state, hidden, x)))


def caffe_anchors(scales: Iterable[int]) -> Tensor:
    """Ratio by ratio, the scales of a 16-pixel square around (7.5, 7.5), sides in whole pixels: [3 · scales, 4]."""
    anchors = []
    for ratio in (0.5, 1.0, 2.0):
        wide = np.round(np.sqrt(16 * 16 / ratio))
        high = np.round(wide * ratio)
        for scale in scales:
            right, below = (wide * scale - 1) / 2, (high * scale - 1) / 2
            anchors.append([7.5 - right, 7.5 - below, 7.5 + right, 7.5 + below])
    return torch.tensor(anchors, dtype=torch.float32)


def stock_anchors(sizes: Iterable[int]) -> Tensor:
    """Size by size, three ratios of the same area around (0, 0): [3 · sizes, 4]."""
    anchors = []
    for size in sizes:
        for ratio in (0.5, 1.0, 2.0):
            wide = (size**2 / ratio) ** 0.5
            high = wide * ratio
            anchors.append([-wide / 2, -high / 2, wide / 2, high / 2])
    return torch.tensor(anchors, dtype=torch.float32)


def anchors_of(cell: Tensor, maps: Tensor) -> Tensor:
    """The anchors of a cell, [A, 4], at each cell of a map, 16 pixels apart: [rows · columns · A, 4]."""
    rows, columns = maps.shape[2:]
    placed = [cell + 16 * torch.tensor([x, y, x, y]) for y in range(rows) for x in range(columns)]
    return torch.cat(placed)


def per_anchor(x: Tensor, numbers: int) -> Tensor:
    """[1, A · numbers, rows, columns] → [rows · columns · A, numbers], in the order of `anchors_of`."""
    _, channels, rows, columns = x.shape
    return x.view(channels // numbers, numbers, rows, columns).permute(2, 3, 0, 1).reshape(-1, numbers)


def decode(boxes: Tensor, deltas: Tensor, weights: tuple[float, float, float, float], one: int) -> Tensor:
    """Boxes [N, 4] moved by deltas [N, 4]; `one` is what a side counts beyond the difference of its ends."""
    wide = boxes[:, 2] - boxes[:, 0] + one
    high = boxes[:, 3] - boxes[:, 1] + one
    middle_x = boxes[:, 0] + 0.5 * wide
    middle_y = boxes[:, 1] + 0.5 * high
    dx, dy, dw, dh = (deltas[:, n] / weights[n] for n in range(4))
    limit = float(np.log(1000.0 / 16))
    middle_x = dx * wide + middle_x
    middle_y = dy * high + middle_y
    wide = torch.exp(dw.clamp(max=limit)) * wide
    high = torch.exp(dh.clamp(max=limit)) * high
    sides = [middle_x - 0.5 * wide, middle_y - 0.5 * high, middle_x + 0.5 * wide, middle_y + 0.5 * high]
    return torch.stack(sides, dim=1)


def clip(boxes: Tensor, right: float, bottom: float) -> Tensor:
    """Boxes [N, 4] with no end left of 0 or beyond `right`, above 0 or below `bottom`."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    ends = [x1.clamp(0, right), y1.clamp(0, bottom), x2.clamp(0, right), y2.clamp(0, bottom)]
    return torch.stack(ends, dim=1)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Caffe's intersection over union, in which a side has one pixel more: [4] and [N, 4] → [N]."""
    wide = np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0]) + 1
    high = np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1]) + 1
    both = np.maximum(wide, 0) * np.maximum(high, 0)
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    return both / (area + areas - both)


def suppress(scores: np.ndarray, removed_by: Callable[[int], np.ndarray], most: int | None = None) -> list[int]:
    """Non-maximum suppression: the first `most` of [N] that no better one of those kept removes, best first.

    removed_by: which of the N a kept one removes, bool [N].
    """

    def survivors() -> Iterable[int]:
        removed = np.zeros(len(scores), dtype=bool)
        for n in np.argsort(-scores, kind="stable"):
            if not removed[n]:
                yield int(n)
                removed |= removed_by(n)

    return list(islice(survivors(), most))
