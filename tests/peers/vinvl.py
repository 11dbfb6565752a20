"""microsoft/scene_graph_benchmark as VinVL's features were made: NMS_FILTER 1 and IGNORE_BOX_REGRESSION."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import nms, roi_align

from peers.networks import (
    Found,
    Prepared,
    State,
    Trunk,
    anchors_of,
    attribute_logits,
    caffe_anchors,
    clip,
    convolve,
    decode,
    linear,
    per_anchor,
)

TRUNK = Trunk(
    stem="backbone.body.stem.conv1",
    stages=(*(f"backbone.body.layer{n}" for n in (1, 2, 3)), "roi_heads.box.feature_extractor.head.layer4"),
    shortcut="downsample.0",
    norm=lambda conv: conv.replace(".conv", ".bn").replace("downsample.0", "downsample.1"),
    eps=0.0,
    caffe_pool=False,
    stride_in_1x1=False,
    dilated=False,
)
CELL = caffe_anchors((2, 4, 8, 16, 32))
RPN = "rpn.head"
PREDICTOR = "roi_heads.box.predictor"
ATTRIBUTES = tuple(f"attribute.predictor.{layer}" for layer in ("cls_embedding", "fc_attr", "attr_score"))
MEAN = torch.tensor([103.530, 116.280, 123.675])


def prepare(image: np.ndarray, min_size: int, max_size: int) -> Prepared:
    """The shorter side is rounded where the longer one limits it; the longer side is cut down to whole pixels."""
    height, width = image.shape[:2]
    shorter, longer = float(min(height, width)), float(max(height, width))
    size = min_size
    if longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
    if size == shorter:
        high, wide = height, width
    elif width < height:
        high, wide = int(size * height / width), size
    else:
        high, wide = size, int(size * width / height)
    resized = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255
    pixels = pixels[[2, 1, 0]] * 255 - MEAN[:, None, None]
    return Prepared(pixels[None], wide / width, high / height)


def propose(state: State, maps: Tensor, prepared: Prepared) -> Tensor:
    """Maps → at most 300 boxes [N, 4] on the resized image, best first."""
    hidden = F.relu(convolve(state, f"{RPN}.conv", maps, padding=1))
    scores = per_anchor(convolve(state, f"{RPN}.cls_logits", hidden), 1)[:, 0].sigmoid()
    deltas = per_anchor(convolve(state, f"{RPN}.bbox_pred", hidden), 4)

    best = scores.argsort(descending=True, stable=True)[:6000]
    scores = scores[best]
    boxes = decode(anchors_of(CELL, maps)[best], deltas[best], (1, 1, 1, 1), one=1)
    boxes = boxes - torch.tensor([0, 0, 1, 1])
    boxes = clip(boxes, prepared.width - 1, prepared.height - 1)

    large = (boxes[:, 2] - boxes[:, 0] + 1 >= 0) & (boxes[:, 3] - boxes[:, 1] + 1 >= 0)
    boxes, scores = boxes[large], scores[large]
    return boxes[nms(boxes, scores, 0.7)[:300]]


def pool(state: State, maps: Tensor, boxes: Tensor) -> Tensor:
    """Boxes [N, 4] on the resized image → features [N, P]."""
    return TRUNK.head(state, roi_align(maps, [boxes], 14, spatial_scale=1 / 16, sampling_ratio=0, aligned=False))


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
) -> Found:
    """image: uint8 RGB [H, W, 3]."""
    prepared = prepare(image, min_size, max_size)
    maps = TRUNK.maps(state, prepared.pixels)
    proposals = propose(state, maps, prepared)
    features = pool(state, maps, proposals)
    probabilities = linear(state, f"{PREDICTOR}.cls_score", features).softmax(dim=1)  # [N, 1 + C]

    masked = torch.zeros_like(probabilities)
    for label in range(1, probabilities.shape[1]):
        scores = probabilities[:, label]
        kept = nms(proposals, scores, 0.3)
        masked[kept, label] = scores[kept]
    scores, rows = masked.max(dim=1)

    order = [n for n in scores.argsort(descending=True, stable=True).tolist() if scores[n] > 0]
    above = int((scores >= threshold).sum())
    kept = order[: min(max(above, min_boxes), max_boxes)]
    boxes, rows, scores = proposals[kept], rows[kept], scores[kept]

    ratio = torch.tensor([image.shape[1] / prepared.width, image.shape[0] / prepared.height] * 2)
    again = pool(state, maps, boxes)
    return Found(
        boxes=(boxes * ratio).numpy(),
        classes=(rows - 1).numpy(),
        scores=scores.numpy(),
        features=features[kept].numpy(),
        attributes=choose_attributes(attribute_logits(state, ATTRIBUTES, again, rows).softmax(dim=1)),
    )


def choose_attributes(probabilities: Tensor) -> list[list[tuple[int, float]]]:
    """[K, 1 + A] → at most 16 of each row that are above 0.05, best first.

    No more than 100 in an image are meant to stay, but the zeros are counted among the numbers that are compared: with
    as many attributes as any published network has, the limit is 0.
    """
    probabilities = probabilities.clone()
    probabilities[:, 0] = 0
    probabilities[probabilities <= 0.05] = 0
    above = int((probabilities > 0).sum())
    if above > 100:
        limit = probabilities.flatten().sort().values[above - 100]
        probabilities[probabilities < limit] = 0
    chosen = []
    for row in probabilities:
        best = row.argsort(descending=True, stable=True)[:16]
        chosen.append([(int(n) - 1, float(row[n])) for n in best if row[n] > 0])
    return chosen
