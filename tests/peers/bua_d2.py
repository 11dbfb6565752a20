"""MILVLG/bottom-up-attention.pytorch in its detectron2 mode: another network, and detectron2's own inference."""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms, roi_align

from peers.lxmert import propose_stock, regress
from peers.networks import (
    Found,
    Prepared,
    State,
    as_input,
    attribute_logits,
    detectron2_trunk,
    linear,
    resize_caffe,
    stock_anchors,
)

TRUNK = detectron2_trunk(caffe_pool=False, dilated=False)
CELL = stock_anchors((32, 64, 128, 256, 512))
PREDICTOR = "roi_heads.box_predictor"
ATTRIBUTES = tuple(f"roi_heads.attribute_predictor.{layer}" for layer in ("obj_embed", "fc.0", "attr_score"))
MEAN = np.array([103.530, 116.280, 123.675], dtype=np.float32)


def prepare(image: np.ndarray, min_size: int, max_size: int) -> Prepared:
    """The float image is resized, then the mean goes."""
    bgr = image[:, :, ::-1].astype(np.float32)
    bgr, scale = resize_caffe(bgr, min_size, max_size)
    return as_input(bgr - MEAN, scale, scale)


def propose(state: State, maps: Tensor, prepared: Prepared) -> Tensor:
    """Maps → at most 1000 boxes [N, 4] on the resized image, best first."""
    return propose_stock(state, maps, prepared, CELL, most=1000)


def pool(state: State, maps: Tensor, boxes: Tensor) -> Tensor:
    """Boxes [N, 4] on the resized image → features [N, P]."""
    return TRUNK.head(state, roi_align(maps, [boxes], 14, spatial_scale=1 / 16, sampling_ratio=2, aligned=True))


@torch.no_grad()
def extract(
    state: State,
    image: np.ndarray,
    *,
    min_size: int = 600,
    max_size: int = 1000,
    min_boxes: int = 0,
    max_boxes: int = 100,
    threshold: float = 0.05,
    overlap: float = 0.5,
) -> Found:
    """image: uint8 RGB [H, W, 3]. A proposal may be there in several classes.

    This mode heeds no least number of boxes; the other two numbers are detectron2's. If both are 100, M sets a
    threshold of 0 and an overlap of 0.3.
    """
    prepared = prepare(image, min_size, max_size)
    maps = TRUNK.maps(state, prepared.pixels)
    proposals = propose(state, maps, prepared)
    features = pool(state, maps, proposals)
    logits = linear(state, f"{PREDICTOR}.cls_score", features)
    probabilities = logits.softmax(dim=1)[:, :-1]  # [N, C]
    deltas = linear(state, f"{PREDICTOR}.bbox_pred", features)

    found = []  # (score, proposal, class, box)
    for label in range(probabilities.shape[1]):
        above = torch.nonzero(probabilities[:, label] > threshold)[:, 0]
        scores = probabilities[above, label]
        boxes = regress(deltas[above], proposals[above], torch.full_like(above, label), prepared)
        for n in nms(boxes, scores, overlap).tolist():
            found.append((float(scores[n]), int(above[n]), label, boxes[n]))
    found.sort(key=lambda one: -one[0])

    # detectron2 drops what has no area only after it has taken the best.
    found = [one for one in found[:max_boxes] if one[3][2] > one[3][0] and one[3][3] > one[3][1]]
    boxes = torch.stack([one[3] for one in found]) if found else torch.empty(0, 4)
    of = [one[1] for one in found]

    rows = logits.argmax(dim=1)  # may be the background's
    attributes = attribute_logits(state, ATTRIBUTES, features, rows).softmax(dim=1)[of]
    return Found(
        boxes=(boxes / prepared.scale_x).numpy(),
        classes=np.array([one[2] for one in found], dtype=np.int64),
        scores=np.array([one[0] for one in found], dtype=np.float32),
        features=features[of].numpy(),
        attributes=[[(int(row.argmax()), float(row.max()))] for row in attributes],
    )
