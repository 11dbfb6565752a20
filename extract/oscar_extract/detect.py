"""From a batch of images to their regions, in the steps of the detector's preset.

All images of a batch have one shape at the detector's input, so nothing is padded, and a batch gives what its images
give alone. Between the pixels going in and the kept regions coming out, everything stays on the detector's device.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes, ImageList
from torch import Tensor

from oscar_common.sample import Attribute, Regions
from oscar_extract.detector import Detector
from oscar_extract.images import RefusedImage, decode, read_bytes
from oscar_extract.steps.nms import pad
from oscar_extract.steps.proposals import Proposals
from oscar_extract.steps.resize import Target, normalize, shrink, target_of
from oscar_extract.steps.selection import Candidates, Kept, Selection, choose_selection

CHUNK = {"cpu": 30, "cuda": 300}  # regions that go through res5 at once: bounds the memory, and divides 300 proposals


@dataclass(frozen=True, kw_only=True)
class Input:
    """One image on its way into the detector: uint8 RGB pixels, resized where that is done on uint8.

    `height` and `width` are the original image's.
    """

    pixels: npt.NDArray[np.uint8]
    target: Target
    height: int
    width: int


def make_input(detector: Detector, pixels: npt.NDArray[np.uint8]) -> Input:
    """Make decoded pixels, uint8 RGB [H, W, 3], ready for a batch.

    Raises:
        RefusedImage: so thin that a side would vanish.
    """
    height, width = pixels.shape[:2]
    target = target_of(detector.preset.resize, detector.cfg, height, width)
    return Input(pixels=shrink(detector.preset.resize, pixels, target), target=target, height=height, width=width)


def detect_regions(
    detector: Detector,
    image: str | Path | npt.NDArray[np.uint8],
    *,
    min_boxes: int | None = None,
    max_boxes: int | None = None,
    score_threshold: float | None = None,
) -> Regions:
    """Find the regions of one image, as `oscar-extract` does.

    Args:
        detector: made by `open_detector`.
        image: a file of any format that oscar-extract reads, or decoded pixels, uint8 RGB [H, W, 3].
        min_boxes, max_boxes: how many regions are kept; None is what the detector's preset keeps.
        score_threshold: between the two, regions of at least this score are kept; None is the preset's.

    Returns:
        boxes float32 [K, 4] (xyxy, pixels of the upright image), features float16 [K, P], K tags and scores, and
        attributes if the detector has them.

    Raises:
        RefusedImage: the file cannot be read or decoded, the image is too thin, or the network's numbers are not
            finite.
        ValueError: the pixels have another shape or type, or `min_boxes` is more than `max_boxes`.
    """
    if min_boxes is not None and max_boxes is not None and min_boxes > max_boxes:
        raise ValueError(f"min_boxes {min_boxes} is more than max_boxes {max_boxes}")

    pixels = image if isinstance(image, np.ndarray) else decode(read_bytes(image))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; give uint8 RGB [H, W, 3]")

    selection = choose_selection(detector.preset.selection, least=min_boxes, most=max_boxes, threshold=score_threshold)

    regions = detect(detector, [make_input(detector, pixels)], selection)[0]
    if isinstance(regions, RefusedImage):
        raise regions

    return regions


@torch.inference_mode()
def detect(detector: Detector, inputs: list[Input], selection: Selection) -> list[Regions | RefusedImage]:
    """Find the regions of images whose targets have one shape; an image is refused if its numbers are not finite."""
    model, preset, targets = detector.model, detector.preset, [i.target for i in inputs]
    images = load_batch(detector, inputs)
    maps = feature_maps(detector, images)
    proposals = preset.propose(model, images, maps, targets)
    candidates = classify(detector, maps, proposals, targets)
    selected = preset.select(model.roi_heads.box_predictor, candidates, selection)

    return collect(detector, inputs, maps, candidates, selected)


def load_batch(detector: Detector, inputs: list[Input]) -> ImageList:
    """Bring images of one shape to the device, float32 [B, 3, h, w], padded, if at all, as each alone would be."""
    model, rule = detector.model, detector.preset.resize
    images = [normalize(rule, detector.cfg, i.pixels, i.target, model.device) for i in inputs]
    batch = ImageList.from_tensors(images, model.backbone.size_divisibility)
    batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
    return batch


def autocast(detector: Detector) -> AbstractContextManager[Any]:
    """Return the context in which backbone and box head run in the detector's precision.

    They are all but a few hundredths of the work; the RPN, the classifiers and all that is done with boxes are float32.
    """
    if detector.precision != "bf16":
        return nullcontext()
    return torch.autocast(detector.model.device.type, torch.bfloat16)


def feature_maps(detector: Detector, images: ImageList) -> dict[str, Tensor]:
    """Return the backbone's maps, float32 in any precision: detectron2 rounds boxes to the type of the map to pool."""
    with autocast(detector):
        return {name: m.float() for name, m in detector.model.backbone(images.tensor).items()}


def classify(detector: Detector, maps: dict[str, Tensor], proposals: Proposals, targets: list[Target]) -> Candidates:
    """Pool and classify all proposals of a batch."""
    shape = proposals.valid.shape
    features = pool(detector, maps, list(proposals.boxes))
    logits, deltas = detector.model.roi_heads.box_predictor(features)
    return Candidates(
        boxes=proposals.boxes,
        valid=proposals.valid,
        features=features.view(*shape, features.shape[1]),
        logits=logits.view(*shape, logits.shape[1]),
        deltas=deltas.view(*shape, deltas.shape[1]),
        targets=targets,
    )


def pool(detector: Detector, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
    """Return the box head's feature of every box of every image in turn, float32 [sum K, P].

    That is the mean of res5 for C4 models, and the output of the last fully connected layer for FPN models.
    """
    heads = detector.model.roi_heads
    size = CHUNK.get(boxes[0].device.type, min(CHUNK.values()))
    with autocast(detector):
        if not isinstance(heads, Res5ROIHeads):
            pooled = heads.box_pooler([maps[f] for f in heads.box_in_features], [Boxes(b) for b in boxes])
            return torch.cat([heads.box_head(part).float() for part in pooled.split(size * 8)])
        levels = [maps[f].contiguous() for f in heads.in_features]  # once: the pooler would do it for each chunk
        return torch.cat([_res5(heads, heads.pooler(levels, chunk), size) for chunk in _chunks(boxes, size)])


def _res5(heads: Any, pooled: Tensor, size: int) -> Tensor:
    """Return the mean of res5 of up to `size` pooled regions, [N, P], computed as if there were that many.

    ROIPool gives two proposals now and then the same cells. Their scores must be the same to the last bit, as the first
    of them wins; a convolution of another batch size may round differently.
    """
    missing = size - len(pooled)
    filled = torch.nn.functional.pad(pooled, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else pooled
    features: Tensor = heads.res5(filled).mean(dim=[2, 3], dtype=torch.float32)[: len(pooled)]
    return features


def _chunks(boxes: list[Tensor], size: int) -> list[list[Boxes]]:
    """Cut the boxes of a batch into lists of at most `size` in all, each with an entry, if an empty one, per image."""
    image = torch.cat([torch.full((len(b),), n) for n, b in enumerate(boxes)])
    everything = torch.cat(boxes)
    chunks = []

    for start in range(0, max(len(everything), 1), size):
        numbers = torch.bincount(image[start : start + size], minlength=len(boxes)).tolist()
        chunks.append([Boxes(b) for b in everything[start : start + size].split(numbers)])

    return chunks


def collect(
    detector: Detector, inputs: list[Input], maps: dict[str, Tensor], candidates: Candidates, selected: Kept
) -> list[Regions | RefusedImage]:
    """Bring a batch's kept regions to the host, to the original pixels and to the types of a sample.

    A feature too large for float16 becomes infinite.
    """
    head = getattr(detector.model.roi_heads, "attribute_head", None)
    described = detector.preset.describe(head, candidates, selected) if head else None
    features = _features(detector, maps, candidates, selected).half().cpu()
    numbers = selected.number.tolist()
    sound = finite_images(detector, maps, candidates, proposes=all(numbers)).tolist()
    boxes, scores, classes = selected.boxes.cpu(), selected.scores.cpu(), selected.classes.cpu()
    attributes = [t.cpu() for t in described] if described else None

    return [
        Regions(
            boxes=_original(boxes[i, :number], item),
            features=features[i, :number].numpy(),
            tags=[detector.record.classes[c] for c in classes[i, :number].tolist()],
            scores=[round(s, 6) for s in scores[i, :number].tolist()],
            attributes=_attributes(detector, *(t[i, :number] for t in attributes)) if attributes else [],
        )
        if sound[i]
        else RefusedImage("not-finite", "the network computes numbers that are not finite")
        for i, (item, number) in enumerate(zip(inputs, numbers, strict=True))
    ]


def finite_images(detector: Detector, maps: dict[str, Tensor], candidates: Candidates, proposes: bool) -> Tensor:
    """Return for which images all that the network computes is finite, bool [B].

    Selection passes over what is not, so that it would look as if nothing was there. The RPN's outputs are not at hand:
    they are computed again if it does not propose a region of every image.
    """
    rpn = detector.model.proposal_generator
    heads = [] if proposes else [t for of_head in rpn.rpn_head([maps[f] for f in rpn.in_features]) for t in of_head]
    whole = [t.isfinite().flatten(1).all(dim=1) for t in (*maps.values(), *heads)]
    rows = [
        t.isfinite().all(dim=2) | ~candidates.valid for t in (candidates.features, candidates.logits, candidates.deltas)
    ]
    return torch.stack([*whole, *(t.all(dim=1) for t in rows)]).all(dim=0)


def _features(detector: Detector, maps: dict[str, Tensor], candidates: Candidates, selected: Kept) -> Tensor:
    """Return the features of the kept regions, [B, M, P]; those beyond an image's number say nothing."""
    if detector.preset.pool_again:
        numbers = selected.number.tolist()
        rows = pool(detector, maps, [boxes[:n] for boxes, n in zip(selected.boxes, numbers, strict=True)])
        return pad(list(rows.split(numbers)))[0]
    images = torch.arange(len(selected.index), device=selected.index.device)[:, None]
    return candidates.features[images, selected.index]


def _original(boxes: Tensor, item: Input) -> npt.NDArray[np.float32]:
    scale = boxes.new_tensor([item.target.scale_x, item.target.scale_y] * 2)
    limit = boxes.new_tensor([item.width, item.height] * 2)
    original: npt.NDArray[np.float32] = (boxes / scale).clamp(min=0).minimum(limit).numpy()
    return original


def _attributes(detector: Detector, indices: Tensor, probabilities: Tensor) -> list[list[Attribute]]:
    names = detector.record.attributes
    return [
        [Attribute(id=i, name=names[i], score=round(p, 6)) for i, p in zip(row, scores, strict=True) if p != 0]
        for row, scores in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]
