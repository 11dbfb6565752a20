"""The built-in detector: what ships loads completely, has the promised shape and detects on ordinary photos."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import BACKBONE_REGISTRY, build_model

import oscar_extract.network.backbone

FOLDER = Path(oscar_extract.__file__).parent / "builtin"
WEIGHTS = FOLDER / "model.safetensors"


@pytest.fixture(scope="module")
def cfg() -> Any:
    cfg = get_cfg()
    cfg.merge_from_file(str(FOLDER / "config.yaml"))
    return cfg


@pytest.fixture(scope="module")
def predictor(cfg: Any) -> Any:
    predictor = DefaultPredictor(cfg)
    predictor.model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()}, strict=True)
    return predictor


def detected(predictor: Any, cfg: Any, rgb: np.ndarray, at_least: float) -> set[str]:
    found = predictor(rgb[:, :, ::-1])["instances"]
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    return {names[i] for i in found.pred_classes[found.scores >= at_least].tolist()}


def test_importing_twice_registers_once() -> None:
    importlib.reload(oscar_extract.network.backbone)
    assert "build_lite_fpn_backbone" in BACKBONE_REGISTRY


def test_the_config_names_the_80_classes_of_coco(cfg: Any) -> None:
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    assert len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert names[0] == "person"
    assert cfg.MODEL.WEIGHTS == ""


def test_the_weights_are_complete_float16_and_small(cfg: Any) -> None:
    assert WEIGHTS.stat().st_size <= 20e6
    with safe_open(WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    expected = {name: value.shape for name, value in build_model(cfg).state_dict().items()}
    assert {name: t.shape for name, t in tensors.items()} == expected


@pytest.mark.parametrize(("height", "width"), [(64, 64), (192, 256)])
def test_feature_maps_have_their_strides(cfg: Any, height: int, width: int) -> None:
    backbone = build_model(cfg).backbone.eval()
    with torch.inference_mode():
        maps = backbone(torch.zeros(2, 3, height, width))
    assert backbone.size_divisibility == 32
    for name, stride in {"p3": 8, "p4": 16, "p5": 32}.items():
        assert maps[name].shape == (2, cfg.MODEL.FPN.OUT_CHANNELS, height // stride, width // stride)
        assert backbone.output_shape()[name].stride == stride


@pytest.mark.parametrize("parts", [0, 3, 6])
def test_freezing_stops_gradients_from_the_input_on(cfg: Any, parts: int) -> None:
    frozen = cfg.clone()
    frozen.MODEL.BACKBONE.FREEZE_AT = parts
    trunk = build_model(frozen).backbone.bottom_up
    in_order = [trunk.stem, *trunk.stages, trunk.laterals]
    assert [next(part.parameters()).requires_grad for part in in_order] == [i >= parts for i in range(6)]


def test_a_cat_and_a_cup_are_found(predictor: Any, cfg: Any) -> None:
    data = pytest.importorskip("skimage.data")
    assert "cat" in detected(predictor, cfg, data.chelsea(), 0.3)
    assert "cup" in detected(predictor, cfg, data.coffee(), 0.5)
    assert "person" in detected(predictor, cfg, data.astronaut(), 0.8)


def test_detection_is_deterministic(predictor: Any) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    first, second = (predictor(photo)["instances"] for _ in range(2))
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
