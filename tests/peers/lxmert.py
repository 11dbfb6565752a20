"""airsplay/py-bottom-up-attention, as LXMERT's features were made: its script, and the attributes of its notebook."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import nms, roi_pool

from peers.networks import (
    Found,
    Prepared,
    State,
    anchors_of,
    as_input,
    attribute_logits,
    clip,
    convolve,
    decode,
    detectron2_trunk,
    linear,
    per_anchor,
    stock_anchors,
)

TRUNK = detectron2_trunk(caffe_pool=True, dilated=True)
CELL = stock_anchors((64, 128, 256, 512))
RPN = "proposal_generator.rpn_head"
PREDICTOR = "roi_heads.box_predictor"
ATTRIBUTES = (f"{PREDICTOR}.cls_embedding", f"{PREDICTOR}.fc_attr", f"{PREDICTOR}.attr_score")
MEAN = np.array([102.9801, 115.9465, 122.7717], dtype=np.float32)


def prepare(image: np.ndarray, min_size: int, max_size: int) -> Prepared:
    """The image is resized as whole numbers, then the mean goes."""
    height, width = image.shape[:2]
    scale = min_size / min(height, width)
    high, wide = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(high, wide) > max_size:
        scale = max_size / max(high, wide)
        high, wide = high * scale, wide * scale
    high, wide = int(high + 0.5), int(wide + 0.5)
    bgr = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])).resize((wide, high), Image.Resampling.BILINEAR)
    return as_input(np.asarray(bgr, dtype=np.float32) - MEAN, wide / width, high / height)


def propose(state: State, maps: Tensor, prepared: Prepared) -> Tensor:
    """Maps → at most 300 boxes [N, 4] on the resized image, best first."""
    return propose_stock(state, maps, prepared, CELL, most=300)


def propose_stock(state: State, maps: Tensor, prepared: Prepared, cell: Tensor, most: int) -> Tensor:
    """What detectron2 does: maps and the anchors of a cell → at most `most` boxes [N, 4], best first."""
    hidden = F.relu(convolve(state, f"{RPN}.conv", maps, padding=1))
    logits = per_anchor(convolve(state, f"{RPN}.objectness_logits", hidden), 1)[:, 0]
    deltas = per_anchor(convolve(state, f"{RPN}.anchor_deltas", hidden), 4)

    best = logits.argsort(descending=True, stable=True)[:6000]
    logits = logits[best]
    boxes = decode(anchors_of(cell, maps)[best], deltas[best], (1, 1, 1, 1), one=0)
    boxes = clip(boxes, prepared.width, prepared.height)

    there = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, logits = boxes[there], logits[there]
    return boxes[nms(boxes, logits, 0.7)[:most]]


def pool(state: State, maps: Tensor, boxes: Tensor) -> Tensor:
    """Boxes [N, 4] on the resized image → features [N, P]."""
    return TRUNK.head(state, roi_pool(maps, [boxes], output_size=14, spatial_scale=1 / 16))


def regress(deltas: Tensor, proposals: Tensor, classes: Tensor, prepared: Prepared) -> Tensor:
    """The boxes of classes [N] out of deltas [N, C · 4], on proposals [N, 4]; clipped."""
    of_class = deltas.unflatten(1, (-1, 4))[torch.arange(len(deltas)), classes]
    boxes = decode(proposals, of_class, (10, 10, 5, 5), one=0)
    return clip(boxes, prepared.width, prepared.height)


@torch.no_grad()
def extract(
    state: State,
    image: np.ndarray,
    *,
    min_size: int = 600,
    max_size: int = 1000,
    min_boxes: int = 36,
    max_boxes: int = 36,
    threshold: float = 0.2,
) -> Found:
    """image: uint8 RGB [H, W, 3]. The script names a threshold, too, but nothing there looks at it."""
    prepared = prepare(image, min_size, max_size)
    maps = TRUNK.maps(state, prepared.pixels)
    proposals = propose(state, maps, prepared)
    features = pool(state, maps, proposals)
    logits = linear(state, f"{PREDICTOR}.cls_score", features)
    scores, classes = logits.softmax(dim=1)[:, :-1].max(dim=1)
    boxes = regress(linear(state, f"{PREDICTOR}.bbox_pred", features), proposals, classes, prepared)

    kept = torch.empty(0, dtype=torch.long)
    for overlap in np.arange(0.3, 1.0, 0.1):
        kept = nms(boxes, scores, overlap)[:max_boxes]
        if len(kept) >= min_boxes:
            break

    rows = logits.argmax(dim=1)  # may be the background's
    attributes = attribute_logits(state, ATTRIBUTES, features, rows)[:, :-1].softmax(dim=1)

    # On the original image. There a box without an area goes; the script leaves its features behind, one row off.
    height, width = image.shape[:2]
    boxes = boxes * torch.tensor([width / prepared.width, height / prepared.height] * 2)
    boxes = clip(boxes, width, height)
    there = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept = kept[there[kept]]
    return Found(
        boxes=boxes[kept].numpy(),
        classes=classes[kept].numpy(),
        scores=scores[kept].numpy(),
        features=features[kept].numpy(),
        attributes=[[(int(row.argmax()), float(row.max()))] for row in attributes[kept]],
    )
