"""What can be known of a GPU without one: on which device each tensor is, and what the host must wait for.

torch's fake tensors have a shape and a device, but no values: an operation that mixes devices, or whose result's shape
or value the host would have to be told, raises.
"""

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from oscar_extract.network.architecture import AttributeHead
from oscar_extract.steps.presets import PRESETS
from oscar_extract.steps.resize import Target, normalize
from oscar_extract.steps.selection import Candidates

TARGETS = [Target(height=60, width=80, scale_x=0.5, scale_y=0.5)] * 2


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield


def candidates():
    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(2, 300, *shape, dtype=dtype, device="cuda")

    valid = zeros(dtype=torch.bool)
    return Candidates(
        boxes=zeros(4), valid=valid, features=zeros(16), logits=zeros(21), deltas=zeros(80), targets=TARGETS
    )


def heads(background):
    """Made on the fake GPU: fake parameters cannot be moved there."""
    torch.set_default_device("cuda")
    try:
        transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
        return FastRCNNOutputLayers(16, box2box_transform=transform, num_classes=20), AttributeHead(
            features=16, classes=20, attributes=30, background=background, embed=4, hidden=6
        )
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ["bua", "vinvl", "lxmert"])
def test_selection_and_attributes_leave_the_gpu_alone(fake, name):
    preset, found = PRESETS[name], candidates()
    predictor, head = heads(background=True)
    kept = preset.select(predictor, found, preset.selection)
    most = preset.selection.max_boxes
    assert {f: (tuple(t.shape), t.device.type) for f, t in vars(kept).items()} == {
        "index": ((2, most), "cuda"),
        "boxes": ((2, most, 4), "cuda"),
        "scores": ((2, most), "cuda"),
        "classes": ((2, most), "cuda"),
        "number": ((2,), "cuda"),
    }
    for described in preset.describe(head, found, kept):
        assert described.device.type == "cuda"
        assert described.shape == (2, most, 16 if name == "vinvl" else 1)


def test_these_tests_would_notice_a_wait(fake):
    """detectron2's way of suppressing asks the GPU how many boxes are left."""
    predictor, _ = heads(background=True)
    with pytest.raises(DynamicOutputShapeException):
        PRESETS["detectron2"].select(predictor, candidates(), PRESETS["detectron2"].selection)


@pytest.mark.parametrize("rule", ["caffe", "detectron2", "maskrcnn-benchmark"])
def test_pixels_are_normalised_on_the_gpu(fake, rule):
    from detectron2.config import get_cfg

    image = normalize(rule, get_cfg(), np.zeros((60, 80, 3), np.uint8), TARGETS[0], torch.device("cuda"))
    assert (image.device.type, image.dtype, tuple(image.shape)) == ("cuda", torch.float32, (3, 60, 80))
