"""Checkpoints of the published detectors: which family a file is of, and how its tensors become this project's.

Here the network has detectron2's names, classes and attributes have their background last, objectness is one logit an
anchor, and anchors come in the preset's order. Each family below says how its files differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RATIOS, SIZES = 3, 4  # of bottom-up attention's anchors
ANCHORS = RATIOS * SIZES
PREDICTOR = "roi_heads.box_predictor."
HEAD = "roi_heads.attribute_head."
RPN = "proposal_generator.rpn_head."


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the files of one publisher differ from this project's names and order.

    presets: which read such files; the first is the default. renames: (theirs, ours), replaced one after the other.
    background_first: row 0 of the classes and of the attributes is the background, and boxes have rows for it.
    two_logits: the RPN has a background and a foreground channel for every anchor. anchors: the order of its channels.
    """

    name: str
    presets: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    background_first: bool = False
    two_logits: bool = False
    anchors: str = "as-they-are"

    def ours(self, name: str) -> str:
        """Return this project's name of a tensor."""
        for theirs, ours in self.renames:
            name = name.replace(theirs, ours)
        return name

    def theirs(self, name: str) -> str:
        """Return the file's name of a tensor."""
        for theirs, ours in reversed(self.renames):
            name = name.replace(ours, theirs)
        return name


MILVLG_CAFFE = Family(
    name="milvlg-caffe",
    presets=("bua", "lxmert"),
    renames=(
        (PREDICTOR + "cls_embed.", HEAD + "embedding."),
        (PREDICTOR + "attr_linear1.", HEAD + "hidden."),
        (PREDICTOR + "attr_linear2.", HEAD + "score."),
    ),
    background_first=True,
    two_logits=True,
    anchors="ratio-major",
)
MILVLG_R152 = replace(
    MILVLG_CAFFE,
    name="milvlg-r152",
    presets=("bua-r152",),
    renames=(
        *MILVLG_CAFFE.renames,
        (".conv2.norm.", ".norm2."),
        (".conv3.norm.", ".norm3."),
        ("roi_heads.res5.0.norm.", "backbone.norm."),
        ("roi_heads.res5_bn.", "roi_heads.res5.3."),
    ),
)
AIRSPLAY = Family(  # and transformers' copy of it on the hub
    name="airsplay",
    presets=("bua", "lxmert"),
    renames=(
        (PREDICTOR + "cls_embedding.", HEAD + "embedding."),
        (PREDICTOR + "fc_attr.", HEAD + "hidden."),
        (PREDICTOR + "attr_score.", HEAD + "score."),
    ),
    anchors="size-major",
)
MILVLG_D2 = Family(
    name="milvlg-d2",
    presets=("bua-d2",),
    renames=(
        ("roi_heads.attribute_predictor.obj_embed.", HEAD + "embedding."),
        ("roi_heads.attribute_predictor.fc.0.", HEAD + "hidden."),
        ("roi_heads.attribute_predictor.attr_score.", HEAD + "score."),
    ),
)
VINVL = Family(
    name="vinvl",
    presets=("vinvl",),
    renames=(
        ("backbone.body.stem.bn1.", "backbone.stem.conv1.norm."),
        ("backbone.body.stem.", "backbone.stem."),
        ("backbone.body.layer1.", "backbone.res2."),
        ("backbone.body.layer2.", "backbone.res3."),
        ("backbone.body.layer3.", "backbone.res4."),
        ("roi_heads.box.feature_extractor.head.layer4.", "roi_heads.res5."),
        (".bn1.", ".conv1.norm."),
        (".bn2.", ".conv2.norm."),
        (".bn3.", ".conv3.norm."),
        (".downsample.0.", ".shortcut."),
        (".downsample.1.", ".shortcut.norm."),
        ("rpn.anchor_generator.", "proposal_generator.anchor_generator."),
        ("rpn.head.conv.", "proposal_generator.rpn_head.conv."),
        ("rpn.head.cls_logits.", "proposal_generator.rpn_head.objectness_logits."),
        ("rpn.head.bbox_pred.", "proposal_generator.rpn_head.anchor_deltas."),
        ("roi_heads.box.predictor.", PREDICTOR),
        ("attribute.predictor.cls_embedding.", HEAD + "embedding."),
        ("attribute.predictor.fc_attr.", HEAD + "hidden."),
        ("attribute.predictor.attr_score.", HEAD + "score."),
    ),
    background_first=True,
)
DETECTRON2 = Family(name="detectron2", presets=("detectron2",))
# VinVL's files hold the box feature extractor twice, as the attribute head shares it.
SHARED = ("attribute.feature_extractor.", "roi_heads.box.feature_extractor.")


def family_of(state: Mapping[str, Tensor]) -> Family:
    """Tell a checkpoint's family by its names and shapes."""
    hidden, objectness, deltas = (
        _rows(state, f"{RPN}{n}.weight") for n in ("conv", "objectness_logits", "anchor_deltas")
    )
    parts = {name.rpartition(".")[0].removeprefix(PREDICTOR) for name in state}
    if any(part.startswith("backbone.body.") for part in parts):
        return VINVL
    if parts & {"roi_heads.res5_bn", "backbone.stem.norm"}:
        return MILVLG_R152
    if any(part.startswith("roi_heads.attribute_predictor.") for part in parts):
        return MILVLG_D2
    if parts & {"cls_embed", "attr_linear1", "attr_linear2"} or (objectness and 2 * objectness == deltas):
        return MILVLG_CAFFE  # two channels an anchor, background and foreground
    if parts & {"cls_embedding", "fc_attr", "attr_score"}:
        return AIRSPLAY

    return AIRSPLAY if (objectness, hidden) == (ANCHORS, 512) and HEAD + "score" not in parts else DETECTRON2


def _rows(state: Mapping[str, Tensor], name: str) -> int:
    return state[name].shape[0] if name in state and state[name].dim() else 0


def convert(family: Family, preset: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in this project's names, folded and in its order; nothing is left out.

    Raises:
        ValueError: VinVL's attribute head has a feature extractor of its own.
    """
    converted = {family.ours(name): tensor for name, tensor in _without_twins(state).items()}
    anchors = converted.get("proposal_generator.anchor_generator.cell_anchors.0")
    order = _anchor_order(family, preset, anchors)
    return {name: _reorder(family, order, name, tensor) for name, tensor in converted.items()}


def _without_twins(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        twin = state.get(name.replace(*SHARED))
        if name.startswith(SHARED[0]) and (twin is None or not torch.equal(tensor, twin)):
            raise ValueError(f"{name} is not the tensor of {SHARED[1]} that the attribute head should share")
    return {name: tensor for name, tensor in state.items() if not name.startswith(SHARED[0])}


def _reorder(family: Family, order: list[int] | None, name: str, tensor: Tensor) -> Tensor:
    """Bring one tensor into this project's order; one of another shape than its family's stays as it is."""
    if tensor.dim() == 0:
        return tensor

    part, rows = name.rpartition(".")[0], len(tensor)
    if family.two_logits and part == RPN + "objectness_logits" and rows == 2 * ANCHORS:
        background, foreground = tensor.chunk(2)
        tensor, rows = foreground - background, ANCHORS  # softmax over two logits is the sigmoid of their difference

    if order and part == RPN + "objectness_logits" and rows == ANCHORS:
        return tensor[order]
    if order and part == RPN + "anchor_deltas" and rows == 4 * ANCHORS:
        return tensor.view(ANCHORS, 4, *tensor.shape[1:])[order].view_as(tensor)
    if family.background_first and part in (PREDICTOR + "cls_score", HEAD + "embedding", HEAD + "score"):
        return tensor.roll(-1, dims=0)
    if family.background_first and part == PREDICTOR + "bbox_pred":
        return tensor[4:]

    return tensor


def _anchor_order(family: Family, preset: str, anchors: Tensor | None) -> list[int] | None:
    """Return which of the file's RPN channels stands where in the preset's order, or None if all stay.

    Caffe's channels are ratio-major. detectron2 makes its anchors size-major, so the files of the port are, too; but if
    one holds its anchors and these begin with one ratio in all sizes, nobody reordered its channels.
    """
    stored, expected = family.anchors, "size-major" if preset == "lxmert" else "ratio-major"
    if family is AIRSPLAY and anchors is not None and anchors.shape == (ANCHORS, 4):
        width, height = (anchors[:SIZES, 2:] - anchors[:SIZES, :2]).unbind(dim=1)
        stored = "ratio-major" if (height / width).log().std() < 0.1 else "size-major"

    if stored in ("as-they-are", expected):
        return None

    outer, inner = (RATIOS, SIZES) if expected == "ratio-major" else (SIZES, RATIOS)
    return [i * outer + o for o in range(outer) for i in range(inner)]
