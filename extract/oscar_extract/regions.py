"""The numerics of preset `detectron2`: from pixels to the regions that are kept, on detectron2's own modules.

Resize as detectron2's DefaultPredictor does (shorter side MIN_SIZE_TEST, longer at most MAX_SIZE_TEST, Pillow bilinear
on uint8). A proposal becomes one box: the regressed box of its most likely class. Then NMS within each class at
NMS_THRESH_TEST, confidence order, and of these all with at least the score threshold, but never fewer than `min_boxes`
nor more than `max_boxes`. A region's feature is what the box head pools *in that box*: mean of res5 for C4 models,
the output of the last fully connected layer for FPN models.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import batched_nms
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor

from oscar_common.sample import Regions
from oscar_extract.detector import Detector
from oscar_extract.images import RefusedImage

FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How many regions of an image are kept."""

    min_boxes: int
    max_boxes: int
    score_threshold: float


def resize(detector: Detector, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Resize uint8 RGB [H, W, 3] to the detector's input, uint8 [h, w, 3] in its channel order.

    Raises:
        RefusedImage: so thin that a side would vanish.
    """
    size = detector.cfg.INPUT
    transform = ResizeShortestEdge([size.MIN_SIZE_TEST] * 2, size.MAX_SIZE_TEST).get_transform(pixels)
    if min(transform.new_h, transform.new_w) < 1:
        raise RefusedImage("too-thin", f"{pixels.shape[1]}x{pixels.shape[0]} pixels would be resized to a line")
    ordered = pixels[:, :, ::-1] if size.FORMAT == "BGR" else pixels
    resized: npt.NDArray[np.uint8] = transform.apply_image(ordered)
    return resized


@torch.inference_mode()
def detect(
    detector: Detector, images: list[npt.NDArray[np.uint8]], sizes: list[tuple[int, int]], selection: Selection
) -> list[Regions]:
    """Find the regions of images of one shape, uint8 [h, w, 3] each; `sizes` are their original (height, width).

    Nothing is padded beyond what one image would be, so that a batch gives what its images give alone.
    """
    model, heads = detector.model, detector.model.roi_heads
    batch = model.preprocess_image(
        [{"image": torch.as_tensor(i.astype(np.float32).transpose(2, 0, 1))} for i in images]
    )
    maps = model.backbone(batch.tensor)
    proposals, _ = model.proposal_generator(batch, maps, None)
    predictions = heads.box_predictor(pool(heads, maps, [p.proposal_boxes for p in proposals]))
    probabilities = heads.box_predictor.predict_probs(predictions, proposals)
    regressed = heads.box_predictor.predict_boxes(predictions, proposals)
    kept = [
        select(p, b, shape, heads.box_predictor.test_nms_thresh, selection)
        for p, b, shape in zip(probabilities, regressed, batch.image_sizes, strict=True)
    ]
    features = pool(heads, maps, [Boxes(boxes) for boxes, _, _ in kept]).split([len(boxes) for boxes, _, _ in kept])
    return [
        _regions(detector, boxes, scores, classes, f, shape, size)
        for (boxes, scores, classes), f, shape, size in zip(kept, features, batch.image_sizes, sizes, strict=True)
    ]


def pool(heads: Any, maps: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
    """Return the box head's feature of every box of every image in turn, float32 [sum K, P]."""
    if isinstance(heads, Res5ROIHeads):
        pooled: Tensor = heads._shared_roi_transform([maps[f] for f in heads.in_features], boxes)
        return pooled.mean(dim=[2, 3])
    features: Tensor = heads.box_head(heads.box_pooler([maps[f] for f in heads.box_in_features], boxes))
    return features


def select(
    probabilities: Tensor, regressed: Tensor, shape: tuple[int, int], nms_threshold: float, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the regions of one image.

    Args:
        probabilities: [R, C + 1] of the R proposals, background last.
        regressed: [R, 4 C], or [R, 4] if the regression is class-agnostic; xyxy, pixels of the resized image.
        shape: (height, width) of the resized image.

    Returns:
        boxes [K, 4], scores [K], classes [K], in descending order of score.
    """
    scores, classes = probabilities[:, :-1].max(dim=1)
    candidates = regressed.view(len(regressed), regressed.shape[1] // 4, 4)
    of_class = classes if candidates.shape[1] > 1 else torch.zeros_like(classes)
    boxes = Boxes(candidates[torch.arange(len(classes), device=classes.device), of_class])
    boxes.clip(shape)
    sound = boxes.nonempty() & torch.isfinite(boxes.tensor).all(dim=1) & torch.isfinite(scores)
    tensor, scores, classes = boxes.tensor[sound], scores[sound], classes[sound]
    keep = batched_nms(tensor, scores, classes, nms_threshold)
    above = int((scores[keep] >= selection.score_threshold).sum())
    keep = keep[: min(max(above, selection.min_boxes), selection.max_boxes)]
    return tensor[keep], scores[keep], classes[keep]


def _regions(
    detector: Detector,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    features: Tensor,
    shape: tuple[int, int],
    size: tuple[int, int],
) -> Regions:
    """Bring one image's regions to the original pixels and the types of a sample."""
    (h, w), (height, width) = shape, size
    original = boxes * boxes.new_tensor([width / w, height / h] * 2)
    limit = boxes.new_tensor([width, height] * 2)
    return Regions(
        boxes=original.clamp(min=0).minimum(limit).cpu().numpy(),
        features=features.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().cpu().numpy(),
        tags=[detector.record.classes[c] for c in classes.tolist()],
        scores=[round(s, 6) for s in scores.tolist()],
    )
