"""The names of a detector's classes and attributes: from a file, or what detectron2 knows of the training set."""

import json
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from oscar_common.errors import UsageError


def read_names(flag: str, file: Path, key: str = "") -> list[str]:
    """Read names from a text file of one a line, or from `key` of a VinVL label map (.json: name to index from 1).

    A line of synonyms "stop sign,stopsign" gives the first, in lower case, as the reference extractors do it.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            indices: dict[str, int] = json.loads(text)[key]
            lines = sorted(indices, key=lambda name: indices[name])
        else:
            lines = [line for line in text.splitlines() if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"{flag} {file}: no such file; give one name a line") from None
    except KeyError:
        raise UsageError(f"{flag} {file}: it has no {key!r}; give VinVL's label map or one name a line") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag} {file}: cannot be read as one name a line or a label map: {error}") from None
    return [line.split(",")[0].strip().lower() for line in lines]


def known_names(cfg: Any) -> list[str]:
    """Return the class names that detectron2 knows for the config's training set, or none."""
    known = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    return list(getattr(known, "thing_classes", []))
