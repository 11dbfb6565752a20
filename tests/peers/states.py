"""Random weights under the names of each peer's files: small networks that all the same find something.

The tensors and names are those that the peers' code saves, buffers with them; none of their files was opened for this.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peers import bua, bua_d2, bua_r152, lxmert, vinvl
from peers.networks import State, Trunk, convolve, linear

EMBEDDED, HIDDEN = 256, 512
SMALL = {"min_size": 160, "max_size": 260}  # of the photos that the heads are fitted to


@dataclass(frozen=True)
class Family:
    """How a peer names its heads, and in what their shapes differ from the others'."""

    peer: ModuleType
    rpn: tuple[str, str, str]  # hidden layer, objectness, deltas
    attributes: tuple[str, str, str]  # embedding, hidden layer, output
    rpn_channels: int | None  # as many as the map has, where it is None
    logits_per_anchor: int
    background: int  # where the class scores have it: 0 or -1
    attribute_background: int | None
    boxes_of_background: bool
    anchors: str  # the buffer that holds them

    @property
    def cls_score(self) -> str:
        return f"{self.peer.PREDICTOR}.cls_score"

    @property
    def bbox_pred(self) -> str:
        return f"{self.peer.PREDICTOR}.bbox_pred"


DETECTRON2_RPN = tuple(
    f"proposal_generator.rpn_head.{layer}" for layer in ("conv", "objectness_logits", "anchor_deltas")
)
DETECTRON2_ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
FAMILIES = {
    "milvlg-caffe": Family(
        peer=bua,
        rpn=DETECTRON2_RPN,
        attributes=bua.ATTRIBUTES,
        rpn_channels=512,
        logits_per_anchor=2,
        background=0,
        attribute_background=0,
        boxes_of_background=True,
        anchors=DETECTRON2_ANCHORS,
    ),
    "milvlg-r152": Family(
        peer=bua_r152,
        rpn=DETECTRON2_RPN,
        attributes=bua.ATTRIBUTES,
        rpn_channels=512,
        logits_per_anchor=2,
        background=0,
        attribute_background=0,
        boxes_of_background=True,
        anchors=DETECTRON2_ANCHORS,
    ),
    "airsplay": Family(
        peer=lxmert,
        rpn=DETECTRON2_RPN,
        attributes=lxmert.ATTRIBUTES,
        rpn_channels=512,
        logits_per_anchor=1,
        background=-1,
        attribute_background=-1,
        boxes_of_background=False,
        anchors=DETECTRON2_ANCHORS,
    ),
    "milvlg-d2": Family(
        peer=bua_d2,
        rpn=DETECTRON2_RPN,
        attributes=bua_d2.ATTRIBUTES,
        rpn_channels=None,
        logits_per_anchor=1,
        background=-1,
        attribute_background=None,
        boxes_of_background=False,
        anchors=DETECTRON2_ANCHORS,
    ),
    "vinvl": Family(
        peer=vinvl,
        rpn=("rpn.head.conv", "rpn.head.cls_logits", "rpn.head.bbox_pred"),
        attributes=vinvl.ATTRIBUTES,
        rpn_channels=None,
        logits_per_anchor=1,
        background=0,
        attribute_background=0,
        boxes_of_background=True,
        anchors="rpn.anchor_generator.cell_anchors.0",
    ),
}


def random_state(
    family: str,
    *,
    depth_blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
    width: int = 8,
    groups: int = 1,
    classes: int = 1600,
    attributes: int = 400,
    seed: int = 0,
) -> State:
    """Every tensor of a network whose res2 has bottlenecks of `width` channels, and res5 P = 32 · width.

    To a random trunk all regions look alike. So the heads are fitted to what four photos give: each output is shifted
    and scaled to have mean 0 and a certain spread over regions; see `Maker.scores` for the classes.
    """
    kind = FAMILIES[family]
    peer = kind.peer
    make = Maker(np.random.default_rng(seed))
    state = make.state
    if peer is bua_r152:
        make.preactivation_trunk(peer.TRUNK.stages, depth_blocks, width)
    else:
        make.trunk(peer.TRUNK, depth_blocks, width, groups)
    make.layer(kind.rpn[0], kind.rpn_channels or 16 * width, 16 * width, 3)
    with torch.no_grad():
        prepared = [peer.prepare(image, **SMALL) for image in photos()]
        maps = [peer.TRUNK.maps(state, one.pixels) for one in prepared]
        hidden = torch.cat([F.relu(convolve(state, kind.rpn[0], one, padding=1)).flatten(2)[0].T for one in maps])
        for name, numbers, spread in ((kind.rpn[1], kind.logits_per_anchor, 1.5), (kind.rpn[2], 4, 0.1)):
            make.fitted(name, hidden, len(peer.CELL) * numbers, spread)
            state[f"{name}.weight"] = state[f"{name}.weight"][:, :, None, None]

        proposals = [peer.propose(state, *one)[::4] for one in zip(maps, prepared, strict=True)]
        features = torch.cat([peer.pool(state, *one) for one in zip(maps, proposals, strict=True)])
        make.scores(kind.cls_score, features, classes + 1, kind.background)
        make.fitted(kind.bbox_pred, features, 4 * (classes + kind.boxes_of_background), 1.0)

        embedding, inner, output = kind.attributes
        state[f"{embedding}.weight"] = make.normal(classes + 1, EMBEDDED)
        make.fitted(inner, features, HIDDEN, 1.0)
        of_class = make.normal(HIDDEN, EMBEDDED) / EMBEDDED**0.5
        state[f"{inner}.weight"] = torch.cat([state[f"{inner}.weight"], of_class], dim=1)
        rows = linear(state, kind.cls_score, features).argmax(dim=1)
        together = torch.cat([features, state[f"{embedding}.weight"][rows]], dim=1)
        hidden = F.relu(linear(state, inner, together))
        make.scores(output, hidden, attributes + (kind.attribute_background is not None), kind.attribute_background)

    state[kind.anchors] = peer.CELL.clone()
    if family == "milvlg-d2":
        state["pixel_mean"] = torch.from_numpy(bua_d2.MEAN)[:, None, None].clone()
        state["pixel_std"] = torch.ones(3, 1, 1)
    if family == "milvlg-caffe":  # res4 and res5 can be trained on there, so their norms count
        names = [n for n in state if n.endswith("running_mean") and n.startswith(("backbone.res4", "roi_heads.res5"))]
        state |= {n.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for n in names}
    if family == "vinvl":  # the attribute head shares the box head's layers, which are saved under both names
        shared = [n for n in state if n.startswith("roi_heads.box.feature_extractor.")]
        state |= {n.replace("roi_heads.box.", "attribute."): state[n] for n in shared}
    return state


def photos() -> list[np.ndarray]:
    """Four photos that scikit-image carries, uint8 RGB [H, W, 3]."""
    import skimage.data

    return [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]


class Maker:
    """Draws tensors, and puts them into a state."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.state: State = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))

    def between(self, low: float, high: float, number: int) -> Tensor:
        return torch.from_numpy(self.rng.uniform(low, high, number).astype(np.float32))

    def trunk(self, trunk: Trunk, depth_blocks: tuple[int, int, int, int], width: int, groups: int) -> None:
        """Convolutions that keep the size of what passes, norms that change little but are not the identity."""
        self.normed(trunk, trunk.stem, width, 3, 7, variance=2e4)  # what 0 to 255 without its mean gives
        channels = width
        for number, (stage, blocks) in enumerate(zip(trunk.stages, depth_blocks, strict=True)):
            inner, outer = width * 2**number, 4 * width * 2**number
            for block in range(blocks):
                name = f"{stage}.{block}"
                self.normed(trunk, f"{name}.conv1", inner, channels, 1)
                self.normed(trunk, f"{name}.conv2", inner, inner // groups, 3)
                self.normed(trunk, f"{name}.conv3", outer, inner, 1, gain=0.3)
                if block == 0:
                    self.normed(trunk, f"{name}.{trunk.shortcut}", outer, channels, 1)
                channels = outer

    def preactivation_trunk(self, stages: tuple[str, ...], depth_blocks: tuple[int, int, int, int], width: int) -> None:
        """The same with the norms before the convolutions; the pixels' own has 0 to 255."""
        self.norm("backbone.stem.norm", 3, variance=5e3, mean=120.0)
        self.state["backbone.stem.conv1.weight"] = self.he(width, 3, 7)
        self.norm("backbone.stem.conv1.norm", width)
        channels = width
        for number, (stage, blocks) in enumerate(zip(stages, depth_blocks, strict=True)):
            inner, outer = width * 2**number, 4 * width * 2**number
            for block in range(blocks):
                name = f"{stage}.{block}"
                self.norm(f"{name}.norm", channels)
                self.state[f"{name}.conv1.weight"] = self.he(inner, channels, 1)
                self.norm(f"{name}.conv2.norm", inner)
                self.state[f"{name}.conv2.weight"] = self.he(inner, inner, 3)
                self.norm(f"{name}.conv3.norm", inner)
                self.state[f"{name}.conv3.weight"] = 0.3 * self.he(outer, inner, 1)
                if block == 0:
                    self.state[f"{name}.shortcut.weight"] = self.he(outer, channels, 1)
                channels = outer
        self.norm("roi_heads.res5_bn", channels)

    def norm(self, name: str, out: int, variance: float = 1.0, mean: float = 0.0) -> None:
        self.state[f"{name}.weight"] = self.between(0.8, 1.2, out)
        self.state[f"{name}.bias"] = 0.1 * self.normal(out)
        self.state[f"{name}.running_mean"] = mean + 0.1 * variance**0.5 * self.normal(out)
        self.state[f"{name}.running_var"] = variance * self.between(0.7, 1.4, out)

    def normed(
        self, trunk: Trunk, conv: str, out: int, into: int, size: int, gain: float = 1.0, variance: float = 1.0
    ) -> None:
        """A convolution and its norm, which expects values of that variance."""
        self.state[f"{conv}.weight"] = self.he(out, into, size)
        norm = trunk.norm(conv)
        self.state[f"{norm}.weight"] = gain * self.between(0.8, 1.2, out)
        self.state[f"{norm}.bias"] = 0.1 * self.normal(out)
        self.state[f"{norm}.running_mean"] = 0.1 * variance**0.5 * self.normal(out)
        self.state[f"{norm}.running_var"] = variance * self.between(0.7, 1.4, out)

    def layer(self, name: str, out: int, into: int, size: int) -> None:
        self.state[f"{name}.weight"] = self.he(out, into, size)
        self.state[f"{name}.bias"] = 0.1 * self.normal(out)

    def he(self, out: int, into: int, size: int) -> Tensor:
        return self.normal(out, into, size, size) * (2 / (into * size**2)) ** 0.5

    def fitted(self, name: str, inputs: Tensor, out: int, spread: float) -> None:
        """A linear layer: of inputs [N, channels], each of its outputs has mean 0 and standard deviation `spread`."""
        weight = self.normal(out, inputs.shape[1])
        middle = inputs.mean(dim=0)
        weight *= spread / ((inputs - middle) @ weight.T).std(dim=0)[:, None]
        self.state[f"{name}.weight"], self.state[f"{name}.bias"] = weight, -weight @ middle

    def scores(self, name: str, inputs: Tensor, out: int, background: int | None) -> None:
        """A linear layer whose softmax has its best foreground class above 0.2 for a quarter of inputs [N, channels].

        For half of them the background, one of the `out` if there is one, is better than that. Other photos give
        higher scores: about half of them above 0.2, and the background the best in one of ten.
        """
        self.fitted(name, inputs, out, 1.0)
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        foreground = torch.ones(out, dtype=torch.bool)
        if background is not None:
            foreground[background] = False
            weight[background] *= 0.3
            bias[background] *= 0.3
        logits = linear(self.state, name, inputs)
        if background is not None:
            lead = logits[:, foreground].max(dim=1).values - logits[:, background]
            logits[:, background] += lead.quantile(0.5)
            bias[background] += lead.quantile(0.5)

        def best(spread: float) -> Tensor:
            return (spread * logits).softmax(dim=1)[:, foreground].max(dim=1).values

        low, high = 0.01, 100.0
        for _ in range(20):
            spread = (low * high) ** 0.5
            low, high = (spread, high) if best(spread).quantile(0.75) < 0.2 else (low, spread)
        self.state[f"{name}.weight"], self.state[f"{name}.bias"] = spread * weight, spread * bias


def airsplay_from_caffe(state: State) -> State:
    """The same network as one of milvlg-caffe in A's names.

    Its anchors are others: A has detectron2's, size by size, where Caffe's go ratio by ratio.
    """
    theirs, ours = FAMILIES["airsplay"], FAMILIES["milvlg-caffe"]
    by_size = [4 * ratio + size for size in range(4) for ratio in range(3)]
    objectness, deltas = ours.rpn[1:]
    renamed = dict(zip(ours.attributes, theirs.attributes, strict=True))
    converted: State = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        if layer == objectness:
            background, foreground = tensor.chunk(2)
            tensor = (foreground - background)[by_size]
        elif layer == deltas:
            tensor = tensor.unflatten(0, (12, 4))[by_size].flatten(0, 1)
        elif layer == ours.bbox_pred:
            tensor = tensor[4:]
        elif layer in (ours.cls_score, ours.attributes[0], ours.attributes[2]):
            tensor = torch.cat([tensor[1:], tensor[:1]])
        elif name == ours.anchors:
            tensor = lxmert.CELL
        elif kind == "num_batches_tracked":
            continue
        converted[f"{renamed.get(layer, layer)}.{kind}"] = tensor.clone()
    return converted
