"""The numerics of preset `detectron2`, held against slow, literal code and against detectron2's own inference."""

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes
from PIL import Image
from support import photo

from oscar_common.settings import Detector as Entry
from oscar_extract.detector import BUILTIN, load_config, load_detector
from oscar_extract.images import RefusedImage
from oscar_extract.regions import Selection, detect, pool, resize, select

USUAL = Selection(min_boxes=10, max_boxes=100, score_threshold=0.2)


@pytest.fixture(scope="module")
def detector():
    return load_detector("builtin", Entry(), "cpu")


def regions_of(detector, image, selection=USUAL):
    pixels = np.asarray(image)
    return detect(detector, [resize(detector, pixels)], [pixels.shape[:2]], selection)[0]


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


@pytest.mark.parametrize("columns", [4, 4 * 7])
@pytest.mark.parametrize(
    ("low", "high", "threshold"), [(10, 100, 0.2), (36, 36, 0.5), (1, 5, 0.0), (1, 100, 1.0), (300, 300, 0.9)]
)
def test_selection_is_the_rule(columns, low, high, threshold):
    generator = torch.Generator().manual_seed(low)
    probabilities = torch.softmax(torch.randn(200, 8, generator=generator) * 2, dim=1)
    corner = torch.rand(200, columns // 4, 2, generator=generator) * 160 - 20
    regressed = torch.cat([corner, corner + torch.rand(200, columns // 4, 2, generator=generator) * 80], dim=2).flatten(
        1
    )
    selection = Selection(min_boxes=low, max_boxes=high, score_threshold=threshold)
    boxes, scores, classes = select(probabilities, regressed, (120, 150), 0.5, selection)
    expected = slow_select(probabilities, regressed, (120, 150), 0.5, selection)
    assert classes.tolist() == [c for _, c, _ in expected]
    assert scores.tolist() == [s for s, _, _ in expected]
    np.testing.assert_allclose(boxes.numpy(), [b for _, _, b in expected], rtol=1e-6)


def test_no_proposal_gives_no_region():
    boxes, scores, classes = select(torch.empty(0, 81), torch.empty(0, 320), (10, 10), 0.5, USUAL)
    assert len(boxes) == len(scores) == len(classes) == 0


@pytest.mark.parametrize("name", ["astronaut", "coffee", "camera"])
def test_what_detectron2_itself_finds_is_found(detector, name, tmp_path):
    """Each detection above 0.5 of detectron2's own predictor is one of our regions: same box, tag and score.

    Below that, detectron2 may give one proposal several classes; a region has one.
    """
    cfg = load_config(BUILTIN / "config.yaml")
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
    pixels = resize(detector, np.asarray(image))
    batch = detector.model.preprocess_image([{"image": torch.as_tensor(pixels.astype(np.float32).transpose(2, 0, 1))}])
    maps = detector.model.backbone(batch.tensor)
    height, width = pixels.shape[:2]
    scale = torch.tensor([width / image.width, height / image.height] * 2)
    for n in range(len(found.tags)):
        alone = pool(detector.model.roi_heads, maps, [Boxes(torch.tensor(found.boxes[n : n + 1]) * scale)])
        np.testing.assert_allclose(found.features[n], alone[0].detach().numpy(), atol=2e-2, rtol=2e-2)
    assert found.features.dtype == np.float16
    assert found.features.shape == (len(found.tags), detector.record.feature_dim)


def test_batching_does_not_change_a_region(detector):
    images = [photo("coffee"), photo("coffee").transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    pixels = [resize(detector, np.asarray(i)) for i in images]
    sizes = [(i.height, i.width) for i in images]
    for together, image in zip(detect(detector, pixels, sizes, USUAL), images, strict=True):
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
        resize(detector, np.zeros((1, 30000, 3), np.uint8))
