"""Suppression for all classes at once, held against one class after the other."""

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from oscar_extract.steps.nms import (
    first_survivors,
    intersection_over_union,
    nms_by_class,
    strict,
)


def some_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 300
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 120], dim=1)


def slow_nms(boxes, scores, threshold, plus):
    """The greedy rule, a loop for each box and each box kept before; with `plus`, the threshold itself suppresses."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda n: -scores[n]):
        x1, y1, x2, y2 = boxes[index]
        area = (x2 - x1 + plus) * (y2 - y1 + plus)
        for other in kept:
            u1, v1, u2, v2 = boxes[other]
            wide = max(min(x2, u2) - max(x1, u1) + plus, 0)
            high = max(min(y2, v2) - max(y1, v1) + plus, 0)
            iou = wide * high / (area + (u2 - u1 + plus) * (v2 - v1 + plus) - wide * high)
            if iou > threshold or (plus and iou == threshold):
                break
        else:
            kept.append(index)
    return kept


@pytest.mark.parametrize("count", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_every_class_of_every_image_is_suppressed_as_if_alone(count, threshold):
    """In groups of images with different numbers of boxes."""
    boxes = torch.stack([some_boxes(count, seed) for seed in range(3)])
    scores = torch.rand(3, 20, count, generator=torch.Generator().manual_seed(1))
    numbers = [count, max(count - 5, 1), max(count // 2, 1)]
    valid = torch.arange(count) < torch.tensor(numbers)[:, None]
    survives = nms_by_class(intersection_over_union(boxes, plus=0) > threshold, scores, valid)
    assert survives.shape == (3, 20, count)
    for image, number in enumerate(numbers):
        for label in range(20):
            alone = nms(boxes[image, :number], scores[image, label, :number], threshold)
            assert survives[image, label].nonzero()[:, 0].tolist() == sorted(alone.tolist())


def test_the_gpus_kernel_suppresses_as_the_cpu_does():
    """On a GPU, or else in Triton's interpreter (see conftest.py)."""
    pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")
    from oscar_extract.steps.nms_kernel import nms_by_class as by_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    boxes = torch.stack([some_boxes(21, seed) for seed in range(2)])
    over = intersection_over_union(boxes, plus=0) > 0.02
    scores = torch.rand(2, 3, 21, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # some are equal
    valid = torch.arange(21) < torch.tensor([[21], [12]])
    order = scores.argsort(dim=-1, descending=True, stable=True)

    expected = nms_by_class(over, scores, valid)
    assert 2 * 3 < expected.sum() < 3 * valid.sum()
    assert torch.equal(by_kernel(over.to(device), order.to(device), valid.to(device)).cpu(), expected)


def test_equal_scores_go_in_the_boxes_order():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [0, 0, 10, 12]])
    over = intersection_over_union(boxes, plus=0)[None] > 0.5
    assert nms_by_class(over, torch.ones(1, 1, 3), torch.ones(1, 3, dtype=torch.bool)).tolist() == [
        [[True, False, False]]
    ]


@pytest.mark.parametrize("plus", [0, 1])
def test_overlap_counts_pixels_or_edges(plus):
    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 0, 14, 9], [40, 40, 40, 40]])
    side, shared = 9 + plus, 4 + plus
    expected = shared * side / (2 * side * side - shared * side)
    found = intersection_over_union(boxes, plus)
    assert found[0, 1].item() == pytest.approx(expected)
    assert found[0, 2] == 0


def survivors(boxes, threshold, plus):
    """Those of one image's boxes, which come in order of score, the second image having only half of them."""
    both = torch.stack([boxes, boxes])
    valid = torch.stack([torch.ones(len(boxes)), (torch.arange(len(boxes)) % 2 == 0).float()]).bool()
    index, found = first_survivors(both, valid, threshold, plus, len(boxes))
    half = index[1][found[1]]
    assert (half % 2 == 0).all()
    assert half.tolist() == [2 * n for n in slow_nms(*of_pixels(boxes[::2]), threshold, plus)]
    return index[0][found[0]].tolist()


def of_pixels(boxes):
    return boxes.tolist(), [-n for n in range(len(boxes))]


@pytest.mark.parametrize("plus", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_the_rpns_suppression_is_the_greedy_rule(threshold, plus):
    """On boxes of whole pixels, so that an IoU may be the threshold."""
    boxes = some_boxes(200).round()
    assert survivors(boxes, threshold, plus) == slow_nms(*of_pixels(boxes), threshold, plus)


def test_an_overlap_of_exactly_the_threshold_suppresses_in_caffe():
    """Rows of 30 and of 15 pixels, which share 15 of 30."""
    boxes = torch.tensor([[0.0, 0, 29, 0], [15, 0, 29, 0]])
    assert survivors(boxes, 0.5, 1) == [0]
    assert survivors(boxes, 0.51, 1) == [0, 1]
    edges = boxes + torch.tensor([0, 0, 1, 1])
    assert survivors(edges, 0.5, 0) == [0, 1]


def test_every_second_of_a_chain_survives():
    """Each box overlaps the next alone, so the last is decided after all others."""
    ends = torch.arange(64.0) * 4
    boxes = torch.stack([ends, torch.zeros_like(ends), ends + 10, torch.full_like(ends, 10)], dim=1)[None]
    index, found = first_survivors(boxes, torch.ones(1, 64, dtype=torch.bool), 0.4, 0, 300)
    assert index[found].tolist() == list(range(0, 64, 2))


@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_float_is_compared_as_torchvision_compares_it(threshold):
    """Above the threshold in float64, however float32 rounds it."""
    nearest = np.float32(threshold)
    for iou in (np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(1))):
        assert bool(torch.tensor(iou) > strict(threshold)) == (float(iou) > threshold)
