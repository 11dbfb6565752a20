"""Greedy non-maximum suppression of one set of boxes under many orders at once: every class, every threshold.

The classes of a detector see the same boxes with other scores. So who overlaps whom is computed once, kept as bits,
and the greedy rule runs rank by rank for all classes of all images together: no loop over classes, and on a GPU nothing
that the host would have to wait for.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms

BITS = 64
ROUNDS = 32


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


def strict(threshold: float) -> float:
    """Return the float32 that a float32 IoU exceeds when it exceeds the float64 threshold, as torchvision compares."""
    nearest = torch.tensor(threshold)
    return (nearest if nearest.item() <= threshold else torch.nextafter(nearest, torch.tensor(0.0))).item()


def first_survivors(
    boxes: Tensor, valid: Tensor, threshold: float, plus: int, count: int, wait: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run greedy NMS over boxes that come in descending order of score, in every image.

    Args:
        boxes: [B, N, 4], xyxy. valid: bool [B, N], which of them there are.
        threshold: of IoU. plus: see `intersection_over_union`; with 1, as in Caffe, an IoU of the threshold suppresses.
        count: how many survivors are wanted.
        wait: whether the host may wait for a GPU.

    Returns:
        index: [B, R], the survivors; R is `count`, or less if no image has so many.
        found: bool [B, R], which of them are real. settled: bool [B], see `survivors_in_rounds`.
    """
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item() if plus else strict(threshold)
    wider = boxes + boxes.new_tensor([0, 0, plus, plus])
    if boxes.device.type != "cpu" and not wait:
        return survivors_in_rounds(wider, valid, below, count)
    kept = []
    for of_image, there in zip(wider, valid, strict=True):
        rows = there.nonzero()[:, 0]
        kept.append(rows[nms(of_image[rows], -rows.float(), below)[:count]])
    index, found = pad(kept)
    return index, found, valid.new_ones(len(boxes))


def survivors_in_rounds(boxes: Tensor, valid: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `first_survivors` says without the host, which torchvision's NMS tells how many boxes survive.

    A box survives if no survivor before it overlaps it: after t rounds that is settled for all whose chain of
    suppressions has up to t links. `settled` says if the last round changed nothing; if not, the result is no NMS.
    """
    kept, settled = [], []
    for of_image, there in zip(boxes, valid, strict=True):
        before = (intersection_over_union(of_image, plus=0) > threshold).triu(diagonal=1)
        survives = there
        for _ in range(ROUNDS):
            last = survives
            survives = there & ~(before & last[:, None]).any(dim=0)
        kept.append(survives)
        settled.append((survives == last).all())
    survivors = torch.stack(kept)
    index = survivors.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return index, survivors.gather(1, index), torch.stack(settled)


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack lists to [B, longest (1 at least), ...], and say which entries are real: bool [B, longest]."""
    stacked = pad_sequence(rows, batch_first=True)
    if stacked.shape[1] == 0:
        stacked = stacked.new_zeros(len(rows), 1, *stacked.shape[2:])
    length = torch.tensor([len(r) for r in rows], device=stacked.device)
    return stacked, torch.arange(stacked.shape[1], device=stacked.device) < length[:, None]
