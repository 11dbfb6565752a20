"""The parts of Visual Genome's detectors that detectron2 lacks."""

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from oscar_extract.detector import build, configure, fold_batch_norms, load_config
from oscar_extract.network.architecture import AttributeHead, CaffeAnchorGenerator, CaffeStem
from oscar_extract.steps.presets import PRESETS

# What generate_anchors.py of py-faster-rcnn prints for scales 8, 16, 32, in its own comment but for the shift of one.
PY_FASTER_RCNN = [
    [-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199],
    [-56, -56, 71, 71], [-120, -120, 135, 135], [-248, -248, 263, 263],
    [-36, -80, 51, 95], [-80, -168, 95, 183], [-168, -344, 183, 359],
]  # fmt: skip


def test_caffes_anchors():
    bottom_up = CaffeAnchorGenerator(sizes=[[64, 128, 256, 512]], aspect_ratios=[[0.5, 1, 2]], strides=[16], offset=0.0)
    assert bottom_up.generate_cell_anchors((128, 256, 512), (0.5, 1, 2)).tolist() == PY_FASTER_RCNN
    (grid,) = bottom_up([torch.zeros(1, 1, 2, 3)])
    assert len(grid) == 2 * 3 * 12
    assert grid.tensor[0].tolist() == [-38, -16, 53, 31]
    assert grid.tensor[12 * 4].tolist() == [-38 + 16, -16 + 16, 53 + 16, 31 + 16]


def test_caffes_pooling_begins_at_the_edge_and_ends_with_a_part():
    stem = CaffeStem(in_channels=1, out_channels=1, norm="")
    nn.init.zeros_(stem.conv1.weight)
    stem.conv1.weight[0, 0, 3, 3].data.fill_(1)  # the pixel itself, every second one
    image = torch.arange(12.0 * 12).view(1, 1, 12, 12)
    halved = image[0, 0, ::2, ::2].numpy()  # 6 x 6, of which windows of 3 begin at 0, 2 and, one column short, 4
    expected = [[halved[y : y + 3, x : x + 3].max() for x in (0, 2, 4)] for y in (0, 2, 4)]
    np.testing.assert_array_equal(stem(image)[0, 0].detach().numpy(), expected)


def test_res5_is_dilated_where_the_preset_says_so():
    for name, stride, dilation in (("bua", 1, 2), ("lxmert", 1, 2)):
        res5 = build("vg", configure(load_config("vg", "vg-r101"), PRESETS[name], "cpu")).roi_heads.res5
        assert [b.conv2.dilation[0] for b in res5] == [dilation] * 3
        assert res5[0].conv1.stride == res5[0].shortcut.stride == (stride, stride)
        assert res5(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 14, 14)
    stock = build("vg", configure(load_config("vg", "vg-r101"), PRESETS["bua-d2"], "cpu")).roi_heads.res5
    assert stock(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 7, 7)


def test_the_attribute_head_sees_feature_and_class():
    head = AttributeHead(features=8, classes=5, attributes=3, background=True, embed=4, hidden=6)
    features, classes = torch.randn(2, 8), torch.tensor([1, 5])
    joined = torch.cat([features, head.embedding.weight[classes]], dim=1)
    hidden = (joined @ head.hidden.weight.T + head.hidden.bias).clamp(min=0)
    torch.testing.assert_close(head(features, classes), hidden @ head.score.weight.T + head.score.bias)
    assert head(features, classes).shape == (2, 4)


def test_folded_norms_give_the_same_numbers():
    torch.manual_seed(0)
    backbone = build("vg", configure(load_config("vg", "vg-r101"), PRESETS["vinvl"], "cpu")).backbone
    assert isinstance(backbone.output_shape()["res4"], ShapeSpec)
    for name, buffer in backbone.named_buffers():
        if name.endswith(("running_mean", "norm.bias")):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("conv3.norm.weight"):
            buffer.fill_(0.2)
    image = torch.randn(1, 3, 64, 96)
    before = backbone(image)["res4"]
    fold_batch_norms(backbone)
    assert not any("norm" in name for name, _ in backbone.named_buffers())
    torch.testing.assert_close(backbone(image)["res4"], before, rtol=1e-3, atol=1e-3)
