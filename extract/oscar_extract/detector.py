"""A detector: a detectron2 config, its weights and a numerics preset, built and ready."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

import oscar_extract.backbone  # noqa: F401  (registers the built-in detector's backbone)
from oscar_common import settings
from oscar_common.errors import UsageError
from oscar_common.files import sha256
from oscar_extract.weights import load_weights
from oscar_shards.manifest import DetectorRecord

BUILTIN = Path(__file__).parent / "builtin"


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A model in evaluation mode on its device. `record` is what the manifest says of it."""

    model: Any  # detectron2's GeneralizedRCNN, which carries no types
    cfg: Any
    record: DetectorRecord


def load_detector(name: str, entry: settings.Detector, device: str) -> Detector:
    """Build the detector of a `detectors:` entry.

    Raises:
        UsageError: no such config or weights, or a model that is no Faster R-CNN.
    """
    builtin = entry.config == "builtin"
    config = BUILTIN / "config.yaml" if builtin else Path(entry.config)
    cfg = load_config(config)
    weights = entry.weights or (BUILTIN / "model.safetensors" if builtin else cfg.MODEL.WEIGHTS)
    if not weights or "://" in str(weights):
        raise UsageError(
            f"--detector {name}: its weights {str(weights)!r} are no local file; give one with --weights FILE"
        )
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "", device, ""
    torch.backends.cudnn.deterministic = True  # the same command ends with the same bytes
    try:
        model = build_model(cfg).eval().requires_grad_(False)
    except (KeyError, AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--detector {name}: detectron2 cannot build it: {error!r}") from None
    _check_architecture(name, model)
    classes = _classes(name, cfg, entry.classes)
    load_weights(model, Path(weights))
    cfg.MODEL.DEVICE = "cpu"  # the record is of the numbers, not of the place
    record = DetectorRecord(
        name=name,
        preset=entry.preset,
        config=cfg.dump(),
        weights=Path(weights).name,
        weights_sha256=sha256(Path(weights)),
        classes=classes,
        feature_dim=model.roi_heads.box_predictor.cls_score.in_features,
    )
    return Detector(model=model, cfg=cfg, record=record)


def load_config(path: Path) -> CfgNode:
    """Read a detectron2 config file; YAML tags that would run code are refused."""
    if not path.is_file():
        raise UsageError(f"--detector {path}: no such detectron2 config file")
    cfg = get_cfg()
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except Exception as error:  # yaml, yacs and fvcore each raise their own kinds; all mean that the file is no config
        raise UsageError(f"--detector {path}: not a detectron2 config: {str(error) or error!r}") from None
    return cfg


def _check_architecture(name: str, model: nn.Module) -> None:
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads

    heads = getattr(model, "roi_heads", None)
    if (
        not isinstance(model, GeneralizedRCNN)
        or not isinstance(heads, Res5ROIHeads | StandardROIHeads)
        or isinstance(heads, CascadeROIHeads)
    ):
        found = f"{type(model).__name__} with {type(heads).__name__}"
        raise UsageError(
            f"--detector {name}: a {found}; allowed: GeneralizedRCNN with StandardROIHeads or Res5ROIHeads"
        )


def _classes(name: str, cfg: CfgNode, file: str | None) -> list[str]:
    """Class names from a file of one a line, else those that detectron2 knows for the config's training set."""
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if file is not None:
        try:
            classes = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {file}: cannot be read as one name a line: {error}") from None
    else:
        known = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
        classes = list(getattr(known, "thing_classes", []))
    if len(classes) != count:
        where = f"--classes {file} has" if file else f"its training set {cfg.DATASETS.TRAIN} is known with"
        raise UsageError(f"--detector {name}: it has {count} classes, but {where} {len(classes)}; give --classes FILE")
    return classes
