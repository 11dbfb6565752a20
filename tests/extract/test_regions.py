"""The numerics of preset `detectron2`, held against slow, literal code and against detectron2's own inference."""

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from PIL import Image
from support import photo

from oscar_common.settings import Detector as Entry
from oscar_extract.detect import detect, load_batch, make_input, pool
from oscar_extract.detector import load_config, load_detector
from oscar_extract.images import RefusedImage
from oscar_extract.steps.resize import Target
from oscar_extract.steps.selection import Candidates, Selection, select_detectron2

USUAL = Selection(min_boxes=10, max_boxes=100, score_threshold=0.2)


@pytest.fixture(scope="module")
def detector():
    return load_detector("builtin", Entry(), "cpu")


def regions_of(detector, image, selection=USUAL):
    pixels = np.asarray(image)
    return detect(detector, [make_input(detector, pixels)], selection)[0]


def iou(a, b):
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0) * max(high, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def slow_select(probabilities, regressed, shape, nms_threshold, selection):
    """The rule of `select`, a loop for each of its sentences, on Python floats."""
    candidates = []
    for row, boxes in zip(probabilities.tolist(), regressed.tolist(), strict=True):
        best = max(range(len(row) - 1), key=lambda c: row[c])
        x1, y1, x2, y2 = boxes[4 * best : 4 * best + 4] if len(boxes) > 4 else boxes
        box = [
            min(max(x1, 0), shape[1]),
            min(max(y1, 0), shape[0]),
            min(max(x2, 0), shape[1]),
            min(max(y2, 0), shape[0]),
        ]
        if box[2] > box[0] and box[3] > box[1]:
            candidates.append((row[best], best, box))
    survivors = []
    for score, label, box in sorted(candidates, key=lambda c: -c[0]):
        if all(label != other or iou(box, placed) <= nms_threshold for _, other, placed in survivors):
            survivors.append((score, label, box))
    kept = []
    for n, found in enumerate(survivors):
        if n < selection.max_boxes and (n < selection.min_boxes or found[0] >= selection.score_threshold):
            kept.append(found)
    return kept


def one_class_head(agnostic):
    """A box predictor of 7 classes whose deltas of 0 leave a proposal as it is."""
    return FastRCNNOutputLayers(
        4, box2box_transform=Box2BoxTransform((1.0,) * 4), num_classes=7, cls_agnostic_bbox_reg=agnostic
    )


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "threshold"), [(10, 100, 0.2), (36, 36, 0.5), (1, 5, 0.0), (1, 100, 1.0), (300, 300, 0.9)]
)
def test_selection_is_the_rule(agnostic, low, high, threshold):
    """Of two images at once, the second with fewer proposals."""
    generator = torch.Generator().manual_seed(low)
    logits = torch.randn(2, 200, 8, generator=generator) * 2
    corner = torch.rand(2, 200, 2, generator=generator) * 160 - 20
    boxes = torch.cat([corner, corner + torch.rand(2, 200, 2, generator=generator) * 80], dim=2)
    deltas = torch.randn(2, 200, 4 if agnostic else 28, generator=generator) * 0.1
    numbers = (200, 150)
    selection = Selection(min_boxes=low, max_boxes=high, score_threshold=threshold)
    head = one_class_head(agnostic)
    found = Candidates(
        boxes=boxes,
        valid=torch.arange(200) < torch.tensor(numbers)[:, None],
        features=torch.zeros(2, 200, 4),
        logits=logits,
        deltas=deltas,
        targets=[Target(height=120, width=150, scale_y=1.0, scale_x=1.0)] * 2,
    )
    kept = select_detectron2(head, found, selection)
    for image, number in enumerate(numbers):
        regressed = head.box2box_transform.apply_deltas(deltas[image, :number], boxes[image, :number])
        expected = slow_select(logits[image, :number].softmax(dim=1), regressed, (120, 150), 0.5, selection)
        assert kept.number[image] == len(expected)
        assert kept.classes[image, : len(expected)].tolist() == [c for _, c, _ in expected]
        np.testing.assert_allclose(kept.scores[image, : len(expected)], [s for s, _, _ in expected], rtol=1e-6)
        np.testing.assert_allclose(kept.boxes[image, : len(expected)], [b for _, _, b in expected], atol=1e-4)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "camera"])
def test_what_detectron2_itself_finds_is_found(detector, name, tmp_path):
    """Each detection above 0.5 of detectron2's own predictor is one of our regions: same box, tag and score.

    Below that, detectron2 may give one proposal several classes; a region has one.
    """
    cfg = load_config("builtin", "builtin")
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = "cpu", 0.5
    torch.save({"model": detector.model.state_dict()}, tmp_path / "w.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    image = photo(name)
    theirs = DefaultPredictor(cfg)(np.asarray(image)[:, :, ::-1])["instances"]
    ours = regions_of(detector, image)
    assert len(theirs) > 0
    for box, label, score in zip(
        theirs.pred_boxes.tensor.tolist(), theirs.pred_classes, theirs.scores.tolist(), strict=True
    ):
        best = max(range(len(ours.tags)), key=lambda n: iou(box, ours.boxes[n]))
        assert iou(box, ours.boxes[best]) > 0.999
        assert ours.tags[best] == detector.record.classes[label]
        assert ours.scores[best] == pytest.approx(score, abs=1e-4)


def test_a_feature_is_what_the_box_head_pools_in_its_box(detector):
    """Recomputed one region at a time, through detectron2's pooler and box head, from the stored boxes."""
    image = photo("coffee")
    found = regions_of(detector, image)
    item = make_input(detector, np.asarray(image))
    maps = detector.model.backbone(load_batch(detector, [item]).tensor)
    scale = torch.tensor([item.target.scale_x, item.target.scale_y] * 2)
    for n in range(len(found.tags)):
        alone = pool(detector, maps, [torch.tensor(found.boxes[n : n + 1]) * scale])
        np.testing.assert_allclose(found.features[n], alone[0].detach().numpy(), atol=2e-2, rtol=2e-2)
    assert found.features.dtype == np.float16
    assert found.features.shape == (len(found.tags), detector.record.feature_dim)


def test_batching_does_not_change_a_region(detector):
    images = [photo("coffee"), photo("coffee").transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    inputs = [make_input(detector, np.asarray(i)) for i in images]
    for together, image in zip(detect(detector, inputs, USUAL), images, strict=True):
        alone = regions_of(detector, image)
        assert together.tags == alone.tags
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=0.05)
        np.testing.assert_allclose(together.features.astype(float), alone.features.astype(float), atol=2e-2, rtol=2e-2)


def test_boxes_are_original_pixels_in_confidence_order(detector):
    image = photo("astronaut").resize((900, 500))
    found = regions_of(detector, image)
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.boxes.dtype == np.float32
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2] <= 900).all()
    assert (found.boxes[:, 3] <= 500).all()
    assert found.boxes[:, 2].max() > 450
    assert 10 <= len(found.tags) <= 100


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (30, 7), (1500, 40)])
def test_odd_shapes_pass(detector, size):
    found = regions_of(detector, photo("coffee").resize(size))
    assert len(found.tags) > 0
    assert np.isfinite(found.features.astype(np.float32)).all()


def test_a_line_is_refused(detector):
    with pytest.raises(RefusedImage, match="resized to a line"):
        make_input(detector, np.zeros((1, 30000, 3), np.uint8))
