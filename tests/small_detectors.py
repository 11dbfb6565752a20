"""Networks of the reference extractors' kinds, small enough for a test: random weights under the peers' own names."""

import pickle

import torch
from peers.states import SMALL, random_state
from safetensors.torch import save_file

from oscar_common.settings import Detector as Entry
from oscar_extract.detector import load_detector

CONFIG = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  RESNETS: {{DEPTH: 50, NUM_GROUPS: {groups}, WIDTH_PER_GROUP: {width}, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32,
    STRIDE_IN_1X1: {stride_in_1x1}}}
  ROI_HEADS: {{NAME: AttributeRes5ROIHeads, NUM_CLASSES: 1600}}
  ROI_ATTRIBUTE_HEAD: {{NUM_CLASSES: 400}}
INPUT: {{MIN_SIZE_TEST: {min_size}, MAX_SIZE_TEST: {max_size}}}
"""
GROUPS = {"vinvl": 4}
SIZES = SMALL


def state_of(family, seed=0):
    return random_state(family, width=8, groups=GROUPS.get(family, 1), seed=seed)


def save(state, path):
    """Write a state dict in the form that the file's ending says, wrapped as publishers wrap theirs."""
    if path.suffix == ".safetensors":
        save_file({name: t.clone() for name, t in state.items()}, path)
    elif path.suffix == ".pkl":
        arrays = {name: t.numpy() for name, t in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol=2))
    elif path.suffix == ".bin":
        torch.save(state, path)
    else:
        torch.save({"model": {f"module.{name}": t for name, t in state.items()}, "iteration": 7}, path)
    return path


def entry_of(family, folder, weights, preset=None):
    groups = GROUPS.get(family, 1)
    stride = {"groups": groups, "width": 8 // groups, "stride_in_1x1": str(family != "vinvl").lower()}
    (folder / "config.yaml").write_text(CONFIG.format(**stride, **SIZES))
    return Entry(config=str(folder / "config.yaml"), weights=str(weights), preset=preset)


def small_detector(family, folder, state, preset=None, name="weights.pth", precision="fp32"):
    entry = entry_of(family, folder, save(state, folder / name), preset)
    return load_detector(family, entry, "cpu", precision)
