"""What the Visual Genome detectors have and detectron2 lacks, as parts that a detectron2 config can name.

Caffe's anchors and stem pooling, a dilated res5, an attribute head, MILVLG's ResNet of pre-activation blocks. The rest
is detectron2's own. `add_config` adds the keys of these parts to a config.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, Backbone
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.modeling.backbone.resnet import BasicStem, ResNet, build_resnet_backbone
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import Tensor, nn
from torch.nn import functional

BASE = 16  # pixels; the side of Caffe's base anchor, and the stride of res4


def add_config(cfg: CfgNode) -> None:
    """Add this module's keys to a detectron2 config, with the values of a model that uses none of it."""
    cfg.MODEL.ROI_ATTRIBUTE_HEAD = CfgNode()
    cfg.MODEL.ROI_ATTRIBUTE_HEAD.NUM_CLASSES = 0  # attributes, the background not counted; 0: no such head
    cfg.MODEL.ROI_ATTRIBUTE_HEAD.BACKGROUND = True  # the head has a last class "none"
    cfg.MODEL.ROI_ATTRIBUTE_HEAD.OBJ_EMBED_DIM = 256
    cfg.MODEL.ROI_ATTRIBUTE_HEAD.FC_DIM = 512


class CaffeAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of the first Faster R-CNN: rounded, ratio-major, and centred at (7.5, 7.5) of a cell.

    Use it with OFFSET 0 on one map of stride 16. With SIZES 64, 128, 256, 512 the first is [-38, -16, 53, 31], as
    py-faster-rcnn's generate_anchors.py makes it.
    """

    def generate_cell_anchors(
        self, sizes: tuple[float, ...] = (64, 128, 256, 512), aspect_ratios: tuple[float, ...] = (0.5, 1, 2)
    ) -> Tensor:
        """Return the anchors of one cell, float32 [len(aspect_ratios) * len(sizes), 4], xyxy."""
        ratios = torch.tensor(aspect_ratios, dtype=torch.float64)
        width = (BASE * BASE / ratios).sqrt().round()
        height = (width * ratios).round()
        scale = torch.tensor(sizes, dtype=torch.float64) / BASE
        half = (torch.stack([width, height], dim=1)[:, None] * scale[None, :, None]).flatten(0, 1) / 2 - 0.5
        return torch.cat([(BASE - 1) / 2 - half, (BASE - 1) / 2 + half], dim=1).float()


class CaffeStem(BasicStem):
    """The ResNet stem with Caffe's pooling: no padding on the left and top, a last column or row if one is begun."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to [N, 64, about H / 4, about W / 4]."""
        x = functional.relu_(self.conv1(x))
        return functional.max_pool2d(x, kernel_size=3, stride=2, padding=0, ceil_mode=True)


def build_caffe_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's ResNet with `CaffeStem`."""
    backbone = build_resnet_backbone(cfg, input_shape)
    channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    backbone.stem = CaffeStem(in_channels=input_shape.channels, out_channels=channels, norm=cfg.MODEL.RESNETS.NORM)
    return backbone


class AttributeHead(nn.Module):
    """The most likely class of a region and its feature to attributes (Anderson et al. 2018, section 3.1).

    Logits of attribute a stand in column a; with `background`, "none" stands last.
    """

    def __init__(self, *, features: int, classes: int, attributes: int, background: bool, embed: int, hidden: int):
        super().__init__()
        self.background = background
        self.embedding = nn.Embedding(classes + 1, embed)
        self.hidden = nn.Linear(features + embed, hidden)
        self.score = nn.Linear(hidden, attributes + background)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """Return logits [N, A (+ 1)] of features [N, P] and class indices [N] (the last class is the background)."""
        joined = torch.cat([features, self.embedding(classes)], dim=1)
        logits: Tensor = self.score(functional.relu(self.hidden(joined)))
        return logits


class AttributeRes5ROIHeads(Res5ROIHeads):
    """detectron2's C4 heads, with res5 dilated where RES5_DILATION is 2 and an attribute head where one is asked for.

    detectron2 itself ignores RES5_DILATION in a C4 model.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        if cfg.MODEL.RESNETS.RES5_DILATION == 2:
            for conv in (res5[0].conv1, res5[0].conv2, res5[0].shortcut):
                conv.stride = (1, 1)
            for block in res5:
                block.conv2.dilation = block.conv2.padding = (2, 2)

        return res5, channels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read detectron2's arguments and those of the attribute head."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        return arguments | {"attributes": cfg.MODEL.ROI_ATTRIBUTE_HEAD}

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, *, attributes: CfgNode, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attribute_head = None
        if attributes.NUM_CLASSES:
            self.attribute_head = AttributeHead(
                features=self.box_predictor.cls_score.in_features,
                classes=self.num_classes,
                attributes=attributes.NUM_CLASSES,
                background=attributes.BACKGROUND,
                embed=attributes.OBJ_EMBED_DIM,
                hidden=attributes.FC_DIM,
            )


class PreActivationBlock(CNNBlockBase):
    """A bottleneck whose norms and ReLUs come before its convolutions (He et al. 2016), the stride in the 3x3.

    The first block of res5 has no norm of its own input: the backbone ends with it, as the RPN wants it, too.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int, bottleneck_channels: int, stride: int, normed: bool = True
    ):
        super().__init__(in_channels, out_channels, stride)
        self.norm = FrozenBatchNorm2d(in_channels) if normed else None
        self.conv1 = nn.Conv2d(in_channels, bottleneck_channels, 1, bias=False)
        self.norm2 = FrozenBatchNorm2d(bottleneck_channels)
        self.conv2 = nn.Conv2d(bottleneck_channels, bottleneck_channels, 3, stride, padding=1, bias=False)
        self.norm3 = FrozenBatchNorm2d(bottleneck_channels)
        self.conv3 = nn.Conv2d(bottleneck_channels, out_channels, 1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, h, w] to [N, out_channels, h / stride, w / stride], without a ReLU at the end."""
        y = x if self.norm is None else functional.relu(self.norm(x))
        out = self.conv1(y)
        out = self.conv2(functional.relu(self.norm2(out)))
        out = self.conv3(functional.relu(self.norm3(out)))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return torch.add(out, shortcut)


class PreActivationStem(CaffeStem):
    """`CaffeStem` after a norm of the pixels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = FrozenBatchNorm2d(self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to [N, 64, about H / 4, about W / 4]."""
        return super().forward(self.norm(x))


class PreActivationResNet(ResNet):
    """A ResNet of such blocks, up to res4, and the norm and ReLU that its last map needs."""

    def __init__(self, stem: nn.Module, stages: list[list[CNNBlockBase]]) -> None:
        super().__init__(stem, stages, out_features=["res4"])
        self.norm = FrozenBatchNorm2d(stages[-1][-1].out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [N, 3, H, W] to res4, [N, 1024, about H / 16, about W / 16]."""
        return {name: functional.relu(self.norm(m)) for name, m in super().forward(x).items()}


def build_preactivation_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MILVLG's R152 (`RESNET_VERSION: 2`), or one of another DEPTH."""
    resnets = cfg.MODEL.RESNETS
    channels = resnets.STEM_OUT_CHANNELS
    stem = PreActivationStem(in_channels=input_shape.channels, out_channels=channels, norm=resnets.NORM)
    stages = []

    for number, count in enumerate({50: (3, 4, 6), 101: (3, 4, 23), 152: (3, 8, 36)}[resnets.DEPTH]):
        out = resnets.RES2_OUT_CHANNELS << number
        stages.append(
            _preactivation_stage(count, channels, out, resnets.WIDTH_PER_GROUP << number, 1 if number == 0 else 2)
        )
        channels = out

    return PreActivationResNet(stem, stages)


def _preactivation_stage(
    count: int, into: int, out: int, width: int, stride: int, normed: bool = True
) -> list[CNNBlockBase]:
    first = {"in_channels": into, "stride": stride, "normed": normed}
    later_blocks = [{"in_channels": out, "stride": 1}] * (count - 1)
    return [PreActivationBlock(out_channels=out, bottleneck_channels=width, **b) for b in (first, *later_blocks)]  # type: ignore


class PreActivationRes5ROIHeads(AttributeRes5ROIHeads):
    """C4 heads for `PreActivationResNet`: res5 ends with the norm and ReLU that its last block lacks."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        out, width = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8, cfg.MODEL.RESNETS.WIDTH_PER_GROUP * 8
        blocks = _preactivation_stage(3, out // 2, out, width, stride=2, normed=False)
        return nn.Sequential(*blocks, FrozenBatchNorm2d(out), nn.ReLU()), out


for registry, part in (
    (ANCHOR_GENERATOR_REGISTRY, CaffeAnchorGenerator),
    (BACKBONE_REGISTRY, build_caffe_resnet_backbone),
    (BACKBONE_REGISTRY, build_preactivation_resnet_backbone),
    (ROI_HEADS_REGISTRY, AttributeRes5ROIHeads),
    (ROI_HEADS_REGISTRY, PreActivationRes5ROIHeads),
):
    if part.__name__ not in registry:
        registry.register(part)
