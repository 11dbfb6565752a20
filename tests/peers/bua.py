"""MILVLG/bottom-up-attention.pytorch in its Caffe mode, which follows peteanderson80/bottom-up-attention."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_pool

from peers.networks import (
    Found,
    Prepared,
    State,
    Trunk,
    anchors_of,
    as_input,
    attribute_logits,
    caffe_anchors,
    clip,
    convolve,
    decode,
    detectron2_trunk,
    linear,
    overlaps,
    per_anchor,
    resize_caffe,
    suppress,
)

TRUNK = detectron2_trunk(caffe_pool=True, dilated=True)
CELL = caffe_anchors((4, 8, 16, 32))
RPN = "proposal_generator.rpn_head"
PREDICTOR = "roi_heads.box_predictor"
ATTRIBUTES = (f"{PREDICTOR}.cls_embed", f"{PREDICTOR}.attr_linear1", f"{PREDICTOR}.attr_linear2")
MEAN = np.array([102.9801, 115.9465, 122.7717])


def prepare(image: np.ndarray, min_size: int, max_size: int, mean: np.ndarray = MEAN) -> Prepared:
    """The mean goes first, then the float image is resized."""
    bgr = (image[:, :, ::-1] - mean).astype(np.float32)
    bgr, scale = resize_caffe(bgr, min_size, max_size)
    return as_input(bgr, scale, scale)


def propose(state: State, maps: Tensor, prepared: Prepared) -> Tensor:
    """Maps → at most 300 boxes [N, 4] on the resized image, best first."""
    hidden = F.relu(convolve(state, f"{RPN}.conv", maps, padding=1))
    logits = convolve(state, f"{RPN}.objectness_logits", hidden)
    background, foreground = logits.view(2, len(CELL), *logits.shape[2:])
    scores = torch.stack([background, foreground]).softmax(dim=0)[1]
    scores = per_anchor(scores[None], 1)[:, 0]

    deltas = per_anchor(convolve(state, f"{RPN}.anchor_deltas", hidden), 4)
    boxes = decode(anchors_of(CELL, maps), deltas, (1, 1, 1, 1), one=1)
    boxes = clip(boxes, prepared.width - 1, prepared.height - 1)

    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    least = 16 * prepared.scale_x
    large = (wide > 0) & (high > 0) & (wide + 1 > least) & (high + 1 > least)
    boxes, scores = boxes[large], scores[large]

    best = scores.argsort(descending=True, stable=True)[:6000]
    boxes, scores = boxes[best], scores[best]
    corners = boxes.numpy()
    return boxes[suppress(scores.numpy(), lambda n: overlaps(corners[n], corners) >= 0.7, most=300)]


def pool(state: State, maps: Tensor, boxes: Tensor, trunk: Trunk = TRUNK) -> Tensor:
    """Boxes [N, 4] on the resized image → features [N, P]."""
    return trunk.head(state, roi_pool(maps, [boxes], output_size=14, spatial_scale=1 / 16))


@torch.no_grad()
def extract(
    state: State,
    image: np.ndarray,
    *,
    min_size: int = 600,
    max_size: int = 1000,
    min_boxes: int = 10,
    max_boxes: int = 100,
    threshold: float = 0.2,
    trunk: Trunk = TRUNK,
    mean: np.ndarray = MEAN,
) -> Found:
    """image: uint8 RGB [H, W, 3]."""
    prepared = prepare(image, min_size, max_size, mean)
    maps = trunk.maps(state, prepared.pixels)
    proposals = propose(state, maps, prepared)
    features = pool(state, maps, proposals, trunk)
    logits = linear(state, f"{PREDICTOR}.cls_score", features)
    probabilities = logits.softmax(dim=1).numpy()  # [N, 1 + C]
    boxes = (proposals / prepared.scale_x).numpy()

    # The best score that a proposal keeps in any class. All classes suppress on the same boxes, on the original image.
    removes = [overlaps(box, boxes) >= 0.3 for box in boxes]
    best = np.zeros(len(boxes), dtype=np.float32)
    for label in range(1, probabilities.shape[1]):
        for n in suppress(probabilities[:, label], removes.__getitem__):
            best[n] = max(best[n], probabilities[n, label])

    kept = np.flatnonzero(best >= threshold)
    by_confidence = np.argsort(-best, kind="stable")
    if len(kept) < min_boxes:
        kept = by_confidence[:min_boxes]
    elif len(kept) > max_boxes:
        kept = by_confidence[:max_boxes]

    rows = logits.argmax(dim=1)  # may be the background's
    attributes = attribute_logits(state, ATTRIBUTES, features, rows).softmax(dim=1).numpy()[:, 1:]
    return Found(
        boxes=boxes[kept],
        classes=probabilities[kept, 1:].argmax(axis=1),
        scores=probabilities[kept, 1:].max(axis=1),
        features=features.numpy()[kept],
        attributes=[[(int(row.argmax()), float(row.max()))] for row in attributes[kept]],
    )
