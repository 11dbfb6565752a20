"""A light convolutional backbone with FPN, registered in detectron2 as ``build_lite_fpn_backbone``.

The trunk is NanoDet-g (CSP stages of plain 3x3 convolutions, a small path-aggregation neck and, per level, a 3x3
convolution and a 1x1 for classes and boxes) with its batch norms folded into the convolutions, so there is nothing
to calibrate: a state dict of weights and biases is all it takes. Importing this module is enough to make
``cfg.MODEL.BACKBONE.NAME = "build_lite_fpn_backbone"`` known; importing it again does nothing.
"""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor, nn
from torch.nn import functional

NECK_CHANNELS = 128
STAGES = ((32, 32, 1, 1), (64, 64, 2, 2), (128, 128, 2, 2), (256, 256, 3, 2))  # in, width, blocks, stride
STRIDES = {"level3": 8, "level4": 16, "level5": 32}
CLASSES, BINS, ANCHOR = 80, 11, 5  # ANCHOR: size in strides that box deltas refer to
DETECTED = 5 + CLASSES


class Conv(nn.Conv2d):
    """A biased convolution with "same" padding, then a leaky ReLU (slope 0.1) unless ``activate`` is false."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, activate: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [N,inputs,H,W] to [N,outputs,H/stride,W/stride]."""
        x = super().forward(x)
        return functional.leaky_relu(x, 0.1, inplace=True) if self.activate else x


class Block(nn.Module):
    """Two 3x3 convolutions whose outputs are concatenated: [N,C,H,W] -> [N,2*width,H,W]."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first = Conv(inputs, width)
        self.second = Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N,inputs,H,W] to [N,2*width,H,W]."""
        x = self.first(x)
        return torch.cat([self.second(x), x], dim=1)


class Stage(nn.Module):
    """A cross-stage-partial stage: [N,C,H,W] -> [N,2*width,H/stride,W/stride]."""

    def __init__(self, inputs: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.down = Conv(inputs, width, stride=stride)
        self.blocks = nn.Sequential(*[Block(width, width // 2) for _ in range(blocks)])
        self.out = Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N,inputs,H,W] to [N,2*width,H/stride,W/stride]."""
        x = self.down(x)
        return torch.cat([self.out(self.blocks(x)), x], dim=1)


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """Bilinear resize of [N,C,h,w] to the height and width of ``other``."""
    return functional.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


def detections(predicted: Tensor, coarser: Tensor | None) -> Tensor:
    """What NanoDet detects at each cell, [N,85,h,w], from its output [N,80+4*11,h,w] at one level.

    Channel 0 is the best class logit, 1 to 4 are the box as RPN deltas (dx, dy, dw, dh) to a square anchor of 5
    strides, 5 to 84 are the class logits, raised to those of the next coarser level where these are higher.
    A distance to one side (left, top, right, bottom) is the mean of a distribution over 0..10 strides.
    """
    n, _, h, w = predicted.shape
    logits = predicted[:, :CLASSES]
    bins = torch.arange(BINS, dtype=predicted.dtype, device=predicted.device).view(1, 1, BINS, 1, 1)
    left, top, right, bottom = (predicted[:, CLASSES:].view(n, 4, BINS, h, w).softmax(2) * bins).sum(2).unbind(1)
    width, height = ((a + b).clamp(min=0.1) / ANCHOR for a, b in ((left, right), (top, bottom)))
    x, y = (right - left) / (2 * ANCHOR), (bottom - top) / (2 * ANCHOR)
    boxes = torch.stack([logits.max(1).values, x, y, width.log(), height.log()], dim=1)

    return torch.cat([boxes, logits if coarser is None else torch.maximum(logits, coarser[:, 5:])], dim=1)


class LiteTrunk(Backbone):
    """Bottom-up network for an FPN.

    Input: normalised BGR images [N,3,H,W]. Output: ``level3``, ``level4``, ``level5`` at strides 8, 16, 32, each
    [N,341,h,w]: 128 channels of the neck, 128 of its 3x3 convolution, and the 85 of :func:`detections`.
    The 85 hold the difference to the next coarser level, as an FPN adds that level again on its way down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, stride=2)
        self.stages = nn.ModuleList([Stage(*stage) for stage in STAGES])
        self.laterals = nn.ModuleList([Conv(2 * s[1], NECK_CHANNELS, 1, activate=False) for s in STAGES[1:]])
        self.towers = nn.ModuleList([Conv(NECK_CHANNELS, NECK_CHANNELS) for _ in STRIDES])
        outputs = CLASSES + 4 * BINS
        self.heads = nn.ModuleList([Conv(NECK_CHANNELS, outputs, 1, activate=False) for _ in STRIDES])

    def neck(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images to the path-aggregated features of strides 8, 16, 32, each [N,128,h,w]."""
        x = functional.max_pool2d(self.stem(x), 3, 2, 1)
        sides = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i:
                sides.append(self.laterals[i - 1](x))

        middle = sides[1] + resize_like(sides[2], sides[1])
        fine = sides[0] + resize_like(middle, sides[0])
        middle = middle + resize_like(fine, middle)
        return fine, middle, sides[2] + resize_like(middle, sides[2])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [N,3,H,W] (H and W multiples of 32) to the three named levels."""
        maps: dict[str, Tensor] = {}
        coarser = None
        levels = list(zip(STRIDES, self.neck(x), self.towers, self.heads, strict=True))

        for name, y, tower, head in reversed(levels):
            hidden = tower(y)
            detections_of_head = detections(head(hidden), coarser)
            maps[name] = torch.cat(
                [y, hidden, detections_of_head if coarser is None else detections_of_head - coarser], dim=1
            )
            coarser = functional.interpolate(detections_of_head, scale_factor=2.0)

        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, for FPN."""
        channels = 2 * NECK_CHANNELS + DETECTED
        return {name: ShapeSpec(channels=channels, stride=stride) for name, stride in STRIDES.items()}

    def freeze(self, parts: int) -> None:
        """Stop gradients into the first ``parts`` of: stem, stages 1 to 4, neck. Cheap, as those come first."""
        neck = nn.ModuleList([self.laterals, self.towers, self.heads])
        for part in [self.stem, *self.stages, neck][:parts]:
            part.requires_grad_(False)


def build_lite_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over :class:`LiteTrunk`: ``p3``, ``p4``, ``p5`` (strides 8, 16, 32), each [N,MODEL.FPN.OUT_CHANNELS,h,w].

    ``cfg.MODEL.BACKBONE.FREEZE_AT`` (0 to 6) is passed to :meth:`LiteTrunk.freeze`.
    """
    trunk = LiteTrunk()
    trunk.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return FPN(
        bottom_up=trunk,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


if "build_lite_fpn_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_lite_fpn_backbone)
