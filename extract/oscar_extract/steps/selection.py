"""From a batch of classified proposals to the regions that are kept: the rules of the reference extractors.

All images of a batch are treated together, padded to the same number of proposals, and so are all classes. The results
are padded as well, to `max_boxes`; how many of them count is a tensor, so that a GPU need not be waited for here.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from detectron2.structures import Instances
from torch import Tensor

from oscar_extract.steps.nms import intersection_over_union, nms_by_class, pad, strict
from oscar_extract.steps.resize import Target

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # IoU thresholds of the LXMERT port, until enough boxes survive
HALVINGS = 10


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How many regions of an image are kept: all of at least the threshold, but min to max of them."""

    min_boxes: int
    max_boxes: int
    score_threshold: float


def choose_selection(preset: Selection, *, least: int | None, most: int | None, threshold: float | None) -> Selection:
    """Return how many regions are kept: what the preset keeps, but for what is given."""
    return Selection(
        **asdict(preset)
        | {
            "min_boxes": min(preset.min_boxes, most or preset.max_boxes) if least is None else least,
            "max_boxes": max(preset.max_boxes, least or 0) if most is None else most,
            "score_threshold": preset.score_threshold if threshold is None else threshold,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The proposals of a batch and what the box head says of them. The last class is the background.

    boxes: [B, R, 4], xyxy, pixels of the input. valid: bool [B, R]. features: [B, R, P]. logits: [B, R, C + 1].
    deltas: [B, R, 4 C], or [B, R, 4] if the regression is class-agnostic.
    """

    boxes: Tensor
    valid: Tensor
    features: Tensor
    logits: Tensor
    deltas: Tensor
    targets: list[Target]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The regions kept of each image: of M columns the first `number` [B], in the extractor's order.

    index: [B, M], which proposal. boxes: [B, M, 4], xyxy, pixels of the input. scores, classes: [B, M].
    """

    index: Tensor
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    number: Tensor


def select_caffe(predictor: Any, candidates: Candidates, selection: Selection) -> Kept:
    """Keep proposals as bottom-up attention does (`tools/generate_tsv.py`, `get_detections_from_im`).

    The boxes are the proposals, not regressed. NMS runs in each class at 0.3 on boxes of the original image's pixels; a
    box's confidence is its best score that survives. If min to max boxes reach the threshold, they come in the
    RPN's order; otherwise the best come, in order of confidence. The class is the best, whether NMS spared it or not.
    """
    probabilities = candidates.logits.softmax(dim=-1)[..., :-1]
    scale = candidates.boxes.new_tensor([t.scale_x for t in candidates.targets])
    overlaps = intersection_over_union(candidates.boxes / scale[:, None, None], plus=1) >= predictor.test_nms_thresh
    best, _ = _best_surviving(overlaps, probabilities, candidates.valid)
    reach = best >= selection.score_threshold
    number = reach.sum(dim=1)
    between = (number >= selection.min_boxes) & (number <= selection.max_boxes)
    order = torch.where(between[:, None], _true_first(reach), best.argsort(dim=1, descending=True, stable=True))
    scores, classes = probabilities.max(dim=-1)

    return _keep(order, candidates.boxes, scores, classes, _clamped(number, candidates.valid, selection), selection)


def select_vinvl(predictor: Any, candidates: Candidates, selection: Selection) -> Kept:
    """Keep proposals as VinVL's extraction does (NMS_FILTER 1, `filter_results_peter`; IGNORE_BOX_REGRESSION).

    NMS runs in each class; a box's score and class are the best that survive. Always in order of score.
    """
    probabilities = candidates.logits.softmax(dim=-1)[..., :-1]
    overlaps = intersection_over_union(candidates.boxes, plus=0) > strict(predictor.test_nms_thresh)
    best, classes = _best_surviving(overlaps, probabilities, candidates.valid)
    order = best.argsort(dim=1, descending=True, stable=True)
    number = _clamped((best >= selection.score_threshold).sum(dim=1), best > 0, selection)
    return _keep(order, candidates.boxes, best, classes, number, selection)


def select_lxmert(predictor: Any, candidates: Candidates, selection: Selection) -> Kept:
    """Keep regressed boxes as the LXMERT port does (`detectron2_mscoco_proposal_maxnms.py`).

    One box a proposal, of its best class, and one NMS for all classes, at a threshold that rises until `min_boxes`
    survive. There is no score threshold. Boxes that clipping leaves empty are dropped after that.
    """
    scores, classes = candidates.logits.softmax(dim=-1)[..., :-1].max(dim=-1)
    boxes = _clip(_of_class(_regress(predictor, candidates), classes), candidates.targets)
    overlaps = (
        intersection_over_union(boxes, plus=0)[:, None] > boxes.new_tensor([*map(strict, THRESHOLDS)])[:, None, None]
    )
    tried = scores[:, None].expand(-1, len(THRESHOLDS), -1)
    valid = candidates.valid[:, None].expand_as(tried)
    alone = [t.flatten(0, 1) for t in (overlaps, tried, valid)]
    survives = nms_by_class(alone[0], alone[1][:, None], alone[2])[:, 0].unflatten(0, (-1, len(THRESHOLDS)))
    enough = survives.sum(dim=2).clamp(max=selection.max_boxes) >= selection.min_boxes
    enough[:, -1] = True  # the last result is taken, however few
    first = enough.int().argmax(dim=1)
    is_kept = survives[torch.arange(len(first), device=first.device), first]
    order = scores.masked_fill(~is_kept, -1).argsort(dim=1, descending=True, stable=True)[:, : selection.max_boxes]
    is_valid = is_kept.gather(1, order) & ((boxes[..., 2:] > boxes[..., :2]).all(dim=-1)).gather(1, order)
    order = order.gather(1, _true_first(is_valid))

    return _keep(order, boxes, scores, classes, is_valid.sum(dim=1), selection)


def select_detectron2(predictor: Any, candidates: Candidates, selection: Selection) -> Kept:
    """Keep one regressed box a proposal, that of its best class, after NMS within each class, in order of score."""
    logits = candidates.logits.flatten(0, 1)
    (probabilities,) = predictor.predict_probs((logits, None), [logits])
    scores, classes = probabilities.view(candidates.logits.shape)[..., :-1].max(dim=-1)
    boxes = _clip(_of_class(_regress(predictor, candidates), classes), candidates.targets)
    sound = (
        candidates.valid
        & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        & boxes.isfinite().all(dim=-1)
        & scores.isfinite()
    )
    orders = []

    for b, s, c, is_valid in zip(boxes, scores, classes, sound, strict=True):
        rows = is_valid.nonzero()[:, 0]
        orders.append(rows[batched_nms(b[rows], s[rows], c[rows], predictor.test_nms_thresh)])

    order, survives = pad(orders)
    number = _clamped(
        ((scores.gather(1, order) >= selection.score_threshold) & survives).sum(dim=1), survives, selection
    )
    return _keep(order, boxes, scores, classes, number, selection)


def select_bua_d2(predictor: Any, candidates: Candidates, selection: Selection) -> Kept:
    """Keep what detectron2's own inference finds, as MILVLG's `extract_d2features.py` does: a proposal may come twice.

    Every class of a proposal above the threshold is a region of its own, with its regressed box.
    """
    boxes, probabilities = _regress(predictor, candidates).flatten(2), candidates.logits.softmax(dim=-1)
    results = [
        _infer(predictor, b[is_valid], p[is_valid], target, selection)
        for b, p, is_valid, target in zip(boxes, probabilities, candidates.valid, candidates.targets, strict=True)
    ]
    index, is_valid = pad([i for i, _ in results])
    fields = ("scores", "pred_classes")
    scores, classes = (pad([r.get(f) for _, r in results])[0] for f in fields)
    kept_boxes, _ = pad([r.pred_boxes.tensor for _, r in results])

    return Kept(index=index, boxes=kept_boxes, scores=scores, classes=classes, number=is_valid.sum(dim=1))


def _infer(
    predictor: Any, boxes: Tensor, probabilities: Tensor, target: Target, selection: Selection
) -> tuple[Tensor, Instances]:
    """Run detectron2's inference on one image; if fewer than `min_boxes` come, with half the threshold, and so on."""
    shape, threshold = (target.height, target.width), selection.score_threshold
    for _ in range(HALVINGS):
        instances, index = fast_rcnn_inference_single_image(
            boxes, probabilities, shape, threshold, predictor.test_nms_thresh, selection.max_boxes
        )
        sound = instances.pred_boxes.nonempty()
        if int(sound.sum()) >= selection.min_boxes:
            break

        threshold /= 2

    return index[sound], instances[sound]


def _best_surviving(overlaps: Tensor, probabilities: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return each box's best probability in a class where NMS spares it, and that class: both [B, R]."""
    by_class = probabilities.transpose(1, 2).contiguous()
    spared = nms_by_class(overlaps, by_class, valid)
    scores, classes = by_class.masked_fill_(~spared, 0).max(dim=1)
    return scores.masked_fill(~valid, -1), classes


def _clamped(number: Tensor, there: Tensor, selection: Selection) -> Tensor:
    """Bring the numbers of regions [B] between min and max, but not over how many there are."""
    return number.clamp(selection.min_boxes, selection.max_boxes).minimum(there.sum(dim=1))


def _true_first(flags: Tensor) -> Tensor:
    """Return the order of columns that brings the true ones to the front and leaves both kinds in their order."""
    return flags.int().argsort(dim=1, descending=True, stable=True)


def _regress(predictor: Any, candidates: Candidates) -> Tensor:
    """Return the regressed boxes, [B, R, C or 1, 4], not clipped."""
    deltas, boxes = candidates.deltas.flatten(0, 1), candidates.boxes.flatten(0, 1)
    return predictor.box2box_transform.apply_deltas(deltas, boxes).view(*candidates.boxes.shape[:2], -1, 4)  # type: ignore


def _of_class(boxes: Tensor, classes: Tensor) -> Tensor:
    """Pick each proposal's box of its class: [B, R, C or 1, 4] to [B, R, 4]."""
    if boxes.shape[2] == 1:
        return boxes[:, :, 0]
    return boxes.gather(2, classes[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]


def _clip(boxes: Tensor, targets: list[Target]) -> Tensor:
    """Clip [B, R, 4] to the images as detectron2 does: x to 0 .. width, y to 0 .. height."""
    limit = boxes.new_tensor([[t.width, t.height] * 2 for t in targets])
    return boxes.clamp(min=0).minimum(limit[:, None])


def _keep(
    order: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    number: Tensor,
    selection: Selection,
) -> Kept:
    """Take the first columns of `order` [B, R] from every field."""
    index = order[:, : selection.max_boxes]
    return Kept(
        index=index,
        boxes=boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        scores=scores.gather(1, index),
        classes=classes.gather(1, index),
        number=number,
    )
