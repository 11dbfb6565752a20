"""MILVLG/bottom-up-attention.pytorch in its Caffe mode with RESNET_VERSION 2: the same steps about another ResNet.

Norm and ReLU come before a convolution, the pixels' means are left to a norm, and res5 is not dilated.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from peers import bua
from peers.networks import State

EPS = 2e-5
CELL, ATTRIBUTES, PREDICTOR = bua.CELL, bua.ATTRIBUTES, bua.PREDICTOR
MEAN = np.zeros(3)
FIRST = "roi_heads.res5.0"  # whose norm the map gets before the RPN and the pooling see it


def norm(state: State, name: str, x: Tensor) -> Tensor:
    scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + EPS).sqrt()
    shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


@dataclass(frozen=True)
class PreActivationTrunk:
    stages: tuple[str, str, str, str] = ("backbone.res2", "backbone.res3", "backbone.res4", "roi_heads.res5")

    def maps(self, state: State, pixels: Tensor) -> Tensor:
        """[1, 3, h, w] → [1, channels of res4, h / 16, w / 16], with the norm and ReLU of res5's first block."""
        x = norm(state, "backbone.stem.norm", pixels)
        x = F.conv2d(x, state["backbone.stem.conv1.weight"], stride=2, padding=3)
        x = F.relu(norm(state, "backbone.stem.conv1.norm", x))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=0, ceil_mode=True)
        for name, stride in zip(self.stages[:3], (1, 2, 2), strict=True):
            for number in count():
                if f"{name}.{number}.conv1.weight" not in state:
                    break
                block = f"{name}.{number}"
                y = F.relu(norm(state, f"{block}.norm", x))
                x = self._rest(state, block, x, y, stride if number == 0 else 1)
        return F.relu(norm(state, f"{FIRST}.norm", x))

    def head(self, state: State, pooled: Tensor) -> Tensor:
        """[N, channels of res4, 14, 14] → [N, P]."""
        x = self._rest(state, FIRST, pooled, pooled, 2)
        for block in ("roi_heads.res5.1", "roi_heads.res5.2"):
            x = self._rest(state, block, x, F.relu(norm(state, f"{block}.norm", x)), 1)
        return F.relu(norm(state, "roi_heads.res5_bn", x)).mean(dim=(2, 3))

    def _rest(self, state: State, block: str, x: Tensor, y: Tensor, stride: int) -> Tensor:
        """What a block does with its input x once that is normed and cut off at zero, y."""
        z = F.conv2d(y, state[f"{block}.conv1.weight"])
        z = F.relu(norm(state, f"{block}.conv2.norm", z))
        z = F.conv2d(z, state[f"{block}.conv2.weight"], stride=stride, padding=1)
        z = F.relu(norm(state, f"{block}.conv3.norm", z))
        z = F.conv2d(z, state[f"{block}.conv3.weight"])
        if f"{block}.shortcut.weight" in state:
            x = F.conv2d(y, state[f"{block}.shortcut.weight"], stride=stride)
        return z + x


TRUNK = PreActivationTrunk()
prepare = partial(bua.prepare, mean=MEAN)
propose = bua.propose
pool = partial(bua.pool, trunk=TRUNK)
extract = partial(bua.extract, trunk=TRUNK, mean=MEAN)
