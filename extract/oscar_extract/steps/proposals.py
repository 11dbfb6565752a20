"""From the RPN's outputs to proposals: the rules of the reference extractors."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import Tensor

from oscar_extract.steps.nms import first_survivors, pad
from oscar_extract.steps.resize import Target

MAX_LOG_GROWTH = math.log(1000 / 16)  # detectron2's and maskrcnn-benchmark's limit on dw and dh


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """The proposals of a batch, in descending order of objectness.

    boxes: [B, R, 4], xyxy, pixels of the input. valid: bool [B, R], which of them there are.
    """

    boxes: Tensor
    valid: Tensor


def propose_detectron2(model: Any, images: ImageList, maps: dict[str, Tensor], targets: list[Target]) -> Proposals:
    """Use detectron2's own RPN."""
    instances, _ = model.proposal_generator(images, maps, None)
    boxes, valid = pad([i.proposal_boxes.tensor for i in instances])
    return Proposals(boxes=boxes, valid=valid)


def propose_caffe(model: Any, images: ImageList, maps: dict[str, Tensor], targets: list[Target]) -> Proposals:
    """Follow py-faster-rcnn's proposal layer (`lib/rpn/proposal_layer.py`) in MILVLG's reading.

    Decode all, clip, drop what is small in the original image, then take the best and suppress.
    """
    rpn = model.proposal_generator
    logits, deltas, anchors = _outputs(rpn, maps)
    boxes = clip_pixels(decode_pixels(anchors, deltas, minus=0), targets[0])
    scale = boxes.new_tensor([t.scale_x for t in targets])[:, None, None]
    sides = boxes[..., 2:] - boxes[..., :2]
    large = ((sides > 0) & (sides + 1 > rpn.min_box_size * scale)).all(dim=-1)
    best, order = _best(logits.masked_fill(~large, -math.inf), rpn.pre_nms_topk[False])

    return _suppress(rpn, boxes.gather(1, order[..., None].expand(-1, -1, 4)), best, 1)


def propose_maskrcnn_benchmark(
    model: Any, images: ImageList, maps: dict[str, Tensor], targets: list[Target]
) -> Proposals:
    """Follow maskrcnn-benchmark's RPNPostProcessor: take the best, then decode, clip, and suppress."""
    rpn = model.proposal_generator
    logits, deltas, anchors = _outputs(rpn, maps)
    best, order = _best(logits, rpn.pre_nms_topk[False])
    chosen = deltas.gather(1, order[..., None].expand(-1, -1, 4))
    boxes = clip_pixels(decode_pixels(anchors[order], chosen, minus=1), targets[0])
    return _suppress(rpn, boxes, best, 0)


def _suppress(rpn: Any, boxes: Tensor, scores: Tensor, plus: int) -> Proposals:
    """Take the survivors among boxes [B, N, 4] in order of score; what is not finite is not there."""
    valid = scores.isfinite() & boxes.isfinite().all(dim=-1)
    boxes = boxes.masked_fill(~valid[..., None], 0)
    count = rpn.post_nms_topk[False]
    index, is_kept = first_survivors(boxes, valid, rpn.nms_thresh, plus, count)
    kept_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Proposals(boxes=kept_boxes.masked_fill(~is_kept[..., None], 0), valid=is_kept)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest scores of every image and their indices, descending; equal ones in their order."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], indices[:, :count]


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
