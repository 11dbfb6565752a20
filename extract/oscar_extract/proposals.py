"""From the RPN's outputs to proposals: the rules of the reference extractors.

Proposals are xyxy in pixels of the input, in descending order of objectness, per image: a list of float32 [R, 4].
"""

import math
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import Tensor
from torchvision.ops import nms

from oscar_extract.nms import nms_of_pixels
from oscar_extract.resize import Target

MAX_LOG_GROWTH = math.log(1000 / 16)  # detectron2's and maskrcnn-benchmark's limit on dw and dh


def propose_detectron2(model: Any, images: ImageList, maps: dict[str, Tensor], targets: list[Target]) -> list[Tensor]:
    """Use detectron2's own RPN."""
    instances, _ = model.proposal_generator(images, maps, None)
    return [i.proposal_boxes.tensor for i in instances]


def propose_caffe(model: Any, images: ImageList, maps: dict[str, Tensor], targets: list[Target]) -> list[Tensor]:
    """Follow py-faster-rcnn's proposal layer (`lib/rpn/proposal_layer.py`) in MILVLG's reading.

    Decode all, clip, drop what is small in the original image, then take the best and suppress.
    """
    rpn = model.proposal_generator
    logits, deltas, anchors = _outputs(rpn, maps)
    boxes = decode_pixels(anchors, deltas, minus=0)
    kept = []
    for scores, of_image, target in zip(logits, boxes, targets, strict=True):
        clipped = clip_pixels(of_image, target)
        sides = clipped[:, 2:] - clipped[:, :2]
        large = (sides > 0).all(dim=1) & (sides + 1 > rpn.min_box_size * target.scale_x).all(dim=1)
        best, order = _best(scores.masked_fill(~large, -math.inf), rpn.pre_nms_topk[False])
        found = best.isfinite()
        candidates = clipped[order[found]]
        kept.append(candidates[nms_of_pixels(candidates, best[found], rpn.nms_thresh)[: rpn.post_nms_topk[False]]])
    return kept


def propose_maskrcnn_benchmark(
    model: Any, images: ImageList, maps: dict[str, Tensor], targets: list[Target]
) -> list[Tensor]:
    """Follow maskrcnn-benchmark's RPNPostProcessor: take the best, then decode, clip, and suppress with torchvision."""
    rpn = model.proposal_generator
    logits, deltas, anchors = _outputs(rpn, maps)
    kept = []
    for scores, of_image, target in zip(logits, deltas, targets, strict=True):
        best, order = _best(scores, rpn.pre_nms_topk[False])
        candidates = clip_pixels(decode_pixels(anchors[order], of_image[order], minus=1), target)
        found = best.isfinite() & candidates.isfinite().all(dim=1)
        candidates = candidates[found]
        kept.append(candidates[nms(candidates, best[found], rpn.nms_thresh)[: rpn.post_nms_topk[False]]])
    return kept


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest scores and their indices, descending; equal ones in their order."""
    values, indices = scores.sort(descending=True, stable=True)
    return values[:count], indices[:count]


def _outputs(rpn: Any, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [B, N], deltas [B, N, 4] and anchors [N, 4] of the one map of a C4 model, cell by cell."""
    (level,) = [maps[f] for f in rpn.in_features]
    (anchors,) = rpn.anchor_generator([level])
    (logits,), (deltas,) = rpn.rpn_head([level])
    by_anchor = deltas.float().permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
    return logits.float().permute(0, 2, 3, 1).flatten(1), by_anchor, anchors.tensor


def decode_pixels(boxes: Tensor, deltas: Tensor, minus: int) -> Tensor:
    """Apply deltas (dx, dy, dw, dh) to boxes that are x2 - x1 + 1 wide, [..., 4].

    The result spans its width exactly (`minus` 0: Caffe's bbox_transform_inv) or pixels (1: maskrcnn-benchmark).
    """
    size = boxes[..., 2:] - boxes[..., :2] + 1
    center = boxes[..., :2] + 0.5 * size + deltas[..., :2] * size
    half = 0.5 * size * deltas[..., 2:].clamp(max=MAX_LOG_GROWTH).exp()
    return torch.cat([center - half, center + half - minus], dim=-1)


def clip_pixels(boxes: Tensor, target: Target) -> Tensor:
    """Clip to the image's pixels: x to 0 .. width - 1, y to 0 .. height - 1."""
    limit = boxes.new_tensor([target.width - 1, target.height - 1] * 2)
    return boxes.clamp(min=0).minimum(limit)
