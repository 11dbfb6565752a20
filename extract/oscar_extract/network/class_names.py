"""The class names that detectron2 knows."""

from typing import Any

from detectron2.data import MetadataCatalog


def known_names(cfg: Any) -> list[str]:
    """Return the class names that detectron2 knows for the config's training set, or none."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    return list(getattr(metadata, "thing_classes", []))
