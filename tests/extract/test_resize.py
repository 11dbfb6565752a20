"""The resize rules, held against OpenCV and literal arithmetic."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg

from oscar_extract.steps.resize import normalize, shrink, target_of

SHAPES = [(480, 640), (333, 500), (427, 640), (640, 427), (1200, 1600), (2000, 900), (301, 299), (97, 431), (600, 600)]
MEAN = [102.9801, 115.9465, 122.7717]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 600, 1000
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = MEAN, [1.0, 1.0, 1.0]
    return cfg


def noise(shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_caffes_rule_is_opencvs(cfg, shape):
    pixels = noise(shape)
    target = target_of("caffe", cfg, *shape)
    factor = 600 / min(shape)
    if np.round(factor * max(shape)) > 1000:
        factor = 1000 / max(shape)
    blob = pixels[:, :, ::-1].astype(np.float32) - np.array(MEAN, np.float32)
    expected = cv2.resize(blob, None, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    ours = normalize("caffe", cfg, shrink("caffe", pixels, target), target, torch.device("cpu"))
    assert (target.scale_x, target.scale_y) == (factor, factor)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((480, 640), (600, 800)), ((427, 640), (600, 899)), ((333, 500), (600, 900)), ((500, 333), (900, 600)),
     ((97, 431), (225, 999)), ((2000, 900), (1000, 450)), ((1000, 601), (998, 600)), ((600, 777), (600, 777))],
)  # fmt: skip
def test_vinvls_rule_truncates_the_long_side(cfg, shape, expected):
    """600 * 640 / 427 = 899.3, 225 * 431 / 97 = 999.7: both cut."""
    target = target_of("maskrcnn-benchmark", cfg, *shape)
    assert (target.height, target.width) == expected
    assert shrink("maskrcnn-benchmark", noise(shape), target).shape == (*expected, 3)


@pytest.mark.parametrize(
    ("shape", "expected"), [((480, 640), (600, 800)), ((427, 640), (600, 899)), ((97, 431), (225, 1000))]
)
def test_detectron2s_rule_rounds(cfg, shape, expected):
    target = target_of("detectron2", cfg, *shape)
    assert (target.height, target.width) == expected
    assert target.scale_x == expected[1] / shape[1]


def test_channels_and_mean_are_the_configs(cfg):
    pixels = np.zeros((600, 600, 3), np.uint8)
    pixels[..., 0] = 255  # red
    target = target_of("detectron2", cfg, 600, 600)
    blue, green, red = normalize("detectron2", cfg, pixels, target, torch.device("cpu"))[:, 5, 5].tolist()
    assert (blue, green, red) == pytest.approx((-MEAN[0], -MEAN[1], 255 - MEAN[2]))
