"""Weights files: three forms give one model, nothing in them is executed, and nothing is left out silently."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from oscar_common.errors import UsageError
from oscar_common.settings import Detector as Entry
from oscar_extract.detector import load_config, load_detector
from oscar_extract.network.families import DETECTRON2
from oscar_extract.network.weights import fill, read_weights


def model():
    return nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})


def load_weights(empty, path):
    fill(empty, DETECTRON2, "detectron2", read_weights(path), path)


@pytest.fixture
def state():
    torch.manual_seed(1)
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model().state_dict().items()}


def save(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".pkl":
        arrays = {n: t.numpy() for n, t in state.items()} | {"x.anchor_generator.cell_anchors.0": np.zeros((3, 4))}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    else:
        torch.save({"model": {f"module.{n}": t for n, t in state.items()}, "iteration": 7}, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pkl", "w.pth"])
def test_every_form_fills_the_model(tmp_path, state, name):
    filled = model()
    load_weights(filled, save(tmp_path / name, state))
    for key, tensor in filled.state_dict().items():
        assert torch.equal(tensor, state[key])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["w.pkl", "w.pth"])
def test_nothing_in_a_file_is_executed(tmp_path, name):
    hostile = {"model": {"a": Hostile(tmp_path / "executed")}}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read") as error:
        load_weights(model(), tmp_path / name)
    assert "\n" not in error.value.message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv.bias"), "missing conv.bias [4]"),
        (lambda s: s.update(extra=torch.ones(2)), "unused extra [2]"),
        (lambda s: s.update({"conv.bias": torch.ones(5)}), "conv.bias is [5], not [4]"),
        (lambda s: s.clear(), "missing conv.weight [4, 3, 3, 3]; missing conv.bias"),
    ],
)
def test_differences_are_listed(tmp_path, state, change, message):
    change(state)
    with pytest.raises(UsageError) as error:
        load_weights(model(), save(tmp_path / "w.safetensors", state))
    assert message in error.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("w.pth", b"junk", "cannot be read"), ("w.pkl", b"", "cannot be read"), ("w.onnx", b"", "unknown form '.onnx'"),
     ("w.safetensors", b"\xff" * 16, "cannot be read"), ("w.pkl", pickle.dumps([1]), "holds a list")],
)  # fmt: skip
def test_a_file_of_another_kind_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_weights(model(), tmp_path / name)


def test_a_config_executes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/executed']\n")
    with pytest.raises(UsageError, match="not a detectron2 config"):
        load_config("mine", str(tmp_path / "c.yaml"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {NO_SUCH_KEY: 1}", "not a detectron2 config"),
        ("MODEL: {META_ARCHITECTURE: ProposalNetwork}", "a ProposalNetwork with NoneType; allowed: GeneralizedRCNN"),
        ("MODEL: {ROI_HEADS: {NUM_CLASSES: 7}}", "it has 7 classes"),
        ("MODEL: {META_ARCHITECTURE: NoSuchThing}", "detectron2 cannot build it"),
    ],
)
def test_a_config_that_is_no_faster_rcnn_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(UsageError) as error:
        load_detector("mine", Entry(config=str(tmp_path / "c.yaml"), weights=str(tmp_path / "w.pth")), "cpu")
    assert message in error.value.message
    assert "\n" not in error.value.message
