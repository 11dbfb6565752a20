"""Suppression for all classes at once, held against one class after the other."""

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from oscar_extract.nms import intersection_over_union, nms_by_class, nms_of_pixels


def some_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 300
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 120], dim=1)


def slow_nms(boxes, scores, threshold, plus, inclusive):
    """The greedy rule, a loop for each box and each box kept before, on Python floats."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda n: -scores[n]):
        x1, y1, x2, y2 = boxes[index]
        area = (x2 - x1 + plus) * (y2 - y1 + plus)
        for other in kept:
            u1, v1, u2, v2 = boxes[other]
            wide = max(min(x2, u2) - max(x1, u1) + plus, 0)
            high = max(min(y2, v2) - max(y1, v1) + plus, 0)
            iou = wide * high / (area + (u2 - u1 + plus) * (v2 - v1 + plus) - wide * high)
            if iou > threshold or (inclusive and iou == threshold):
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


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_of_pixels_is_caffes(threshold):
    boxes, scores = some_boxes(200).round(), torch.rand(200, generator=torch.Generator().manual_seed(3))
    expected = slow_nms(boxes.tolist(), scores.tolist(), float(np.float32(threshold)), plus=1, inclusive=True)
    assert nms_of_pixels(boxes, scores, threshold).tolist() == expected


def test_an_overlap_of_exactly_the_threshold_suppresses():
    """Boxes of 30, 20 and 15 pixels in a row: the last shares 15 of 30 with the first."""
    boxes, scores = torch.tensor([[0.0, 0, 29, 0], [10, 0, 29, 0], [15, 0, 29, 0]]), torch.tensor([0.9, 0.1, 0.8])
    assert nms_of_pixels(boxes, scores, 0.5).tolist() == [0]
    assert nms_of_pixels(boxes, scores, 0.51).tolist() == [0, 2]
