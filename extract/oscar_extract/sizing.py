"""What a job will take, worked out from its plan and a pace: for before there is a GPU, or a file of weights."""

from dataclasses import dataclass
from typing import Any

from oscar_extract.messages import Job
from oscar_extract.plan import Plan

OF_CONFIG = {  # the preset of a detector that comes with this package; any other is detectron2's
    "vg-r101": "bua",
    "vg-r152": "bua-r152",
    "vinvl-x152": "vinvl",
}
BOX_BYTES, TAG_BYTES = 16, 24  # of a region: its box; its tag and score
IMAGE_BYTES = 4096  # of an image: headers, JSON and padding


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job will take.

    regions, size: the fewest and the most regions of an image, and bytes of all shards.
    gpu_hours: of one GPU; none without a pace.
    """

    images: int
    shards: int
    feature_dim: int
    regions: tuple[int, int]
    size: tuple[float, float]
    gpu_hours: float


def estimate(job: Job, plan: Plan, rate: float) -> Estimate:
    """Return what a job takes at `rate` images a second; the detector's weights are not looked at.

    Raises:
        UsageError: the detector has no such config.
    """
    from oscar_extract.detector import configure, load_config  # they load torch
    from oscar_extract.steps.presets import PRESETS
    from oscar_extract.steps.selection import choose_selection

    settings, record = job.settings, plan.record
    preset = PRESETS[job.entry.preset or OF_CONFIG.get(job.entry.config, "detectron2")]
    selection = choose_selection(
        preset.selection,
        least=settings.min_boxes,
        most=settings.max_boxes,
        threshold=settings.score_threshold,
    )
    dim = feature_dim(configure(load_config(settings.detector, job.entry.config), preset, "cpu"))
    regions = (selection.min_boxes, selection.max_boxes)
    low, high = (record.num_images * image_bytes(count, dim, settings.dtype) for count in regions)

    return Estimate(
        images=record.num_images,
        shards=record.num_shards,
        feature_dim=dim,
        regions=regions,
        size=(low, high),
        gpu_hours=record.num_images / rate / 3600,
    )


def image_bytes(regions: float, dim: int, dtype: str) -> float:
    """Return how many bytes of a tar an image of so many regions takes, about."""
    return regions * (dim * (1 if dtype == "int8" else 2) + BOX_BYTES + TAG_BYTES) + IMAGE_BYTES


def feature_dim(cfg: Any) -> int:
    """Return P, the numbers of a region's feature, of a detectron2 config."""
    if "Res5" in cfg.MODEL.ROI_HEADS.NAME:
        return int(cfg.MODEL.RESNETS.RES2_OUT_CHANNELS) * 8

    head = cfg.MODEL.ROI_BOX_HEAD
    if head.NUM_FC:
        return int(head.FC_DIM)

    channels = head.CONV_DIM if head.NUM_CONV else cfg.MODEL.FPN.OUT_CHANNELS
    return int(channels) * int(head.POOLER_RESOLUTION) ** 2
