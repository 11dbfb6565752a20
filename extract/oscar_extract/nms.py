"""Greedy non-maximum suppression of one set of boxes under many orders at once: every class, every threshold.

The classes of a detector see the same boxes with other scores. So who overlaps whom is computed once, kept as bits,
and the greedy rule runs rank by rank for all classes of all images together: no loop over classes, and on a GPU nothing
that the host would have to wait for.
"""

import torch
from torch import Tensor
from torchvision.ops import nms

BITS = 64


def intersection_over_union(boxes: Tensor, plus: float) -> Tensor:
    """Return the IoU of every pair of xyxy boxes: [..., R, 4] to [..., R, R].

    `plus` is what a box is wider than x2 - x1: 1 where pixels are counted (Caffe), 0 where edges are measured.
    """
    low = torch.maximum(boxes[..., :, None, :2], boxes[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], boxes[..., None, :, 2:])
    inside = (high - low + plus).clamp(min=0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2] + plus).prod(dim=-1)
    return inside / (area[..., :, None] + area[..., None, :] - inside)


def nms_by_class(over: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Run greedy NMS in every class of every image.

    Args:
        over: bool [G, R, R], which boxes of image g suppress each other.
        scores: [G, C, R], the order in which class c of image g takes the boxes, descending.
        valid: bool [G, R], which boxes there are.

    Returns:
        bool [G, C, R], which boxes survive in which class.
    """
    groups, classes, count = scores.shape
    apart = ~torch.eye(count, dtype=torch.bool, device=over.device)
    neighbours = _pack(over & apart).flatten(0, 1)  # [G R, words]
    order = scores.argsort(dim=-1, descending=True, stable=True).permute(2, 0, 1)  # rank first: a step reads one row
    word = (order // BITS).reshape(count, -1, 1)
    bit = (order % BITS).reshape(count, -1, 1)
    first = torch.arange(groups, device=over.device)[:, None] * count
    row = (order + first).reshape(count, -1)
    dead = _pack(~valid).repeat_interleave(classes, dim=0)  # [G C, words]
    for rank in range(count):
        lives = 1 - ((dead.gather(1, word[rank]) >> bit[rank]) & 1)  # of the box that is next in its class
        dead |= neighbours.index_select(0, row[rank]) & -lives
    survives: Tensor = ~_unpack(dead, count).reshape(scores.shape)
    return survives


def _pack(flags: Tensor) -> Tensor:
    """Put bool [..., R] into int64 words, box i at bit i % 64 of word i // 64."""
    count = flags.shape[-1]
    padded = torch.nn.functional.pad(flags, (0, -count % BITS)).unflatten(-1, (-1, BITS))
    words: Tensor = (padded.long() << torch.arange(BITS, device=flags.device)).sum(dim=-1)
    return words


def _unpack(words: Tensor, count: int) -> Tensor:
    bits: Tensor = ((words[..., None] >> torch.arange(BITS, device=words.device)) & 1).flatten(-2)
    return bits[..., :count].bool()


def nms_of_pixels(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Run torchvision's NMS with Caffe's arithmetic: a box is x2 - x1 + 1 wide, and IoU >= threshold suppresses.

    Returns the indices of the survivors of `boxes` [R, 4], in descending order of score.
    """
    wider = boxes + boxes.new_tensor([0, 0, 1, 1])
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()
    survivors: Tensor = nms(wider, scores, below)
    return survivors
