"""The Triton kernel of `nms.nms_by_class`, for GPUs.

A loop over ranks in torch launches eight small kernels for each of 300 boxes, and a GPU waits for the host that
launches them. Here one program has one class of one image and goes through all its ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _survivors(over, order, valid, out, count, classes, BLOCK: tl.constexpr):
    of_class = tl.program_id(0).to(tl.int64)
    image = of_class // classes
    boxes = tl.arange(0, BLOCK)
    inside = boxes < count
    lives = tl.load(valid + image * count + boxes, mask=inside, other=0).to(tl.int32)

    for rank in range(BLOCK):
        box = tl.load(order + of_class * count + rank, mask=rank < count, other=-1)
        if tl.sum(tl.where(boxes == box, lives, 0), 0) > 0:
            overlaps = tl.load(over + (image * count + box) * count + boxes, mask=inside, other=0).to(tl.int32)
            lives = tl.where((overlaps != 0) & (boxes != box), 0, lives)

    tl.store(out + of_class * count + boxes, lives.to(tl.uint8), mask=inside)


def nms_by_class(over: Tensor, order: Tensor, valid: Tensor) -> Tensor:
    """Return which boxes survive in which class, bool [G, C, R].

    Args:
        over: bool [G, R, R], which boxes of image g suppress each other.
        order: int64 [G, C, R], in which class c of image g takes the boxes.
        valid: bool [G, R], which boxes there are.
    """
    groups, classes, count = order.shape
    survives = torch.empty(order.shape, dtype=torch.uint8, device=order.device)
    flags = over.contiguous().view(torch.uint8), order.contiguous(), valid.contiguous().view(torch.uint8)
    block = max(16, triton.next_power_of_2(count))
    _survivors[(groups * classes,)](*flags, survives, count, classes, BLOCK=block, num_warps=1)
    return survives.bool()
