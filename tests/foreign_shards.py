"""Tars as other people write them: the members of a sample as raw bytes, in any order, by any tool."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def content(number: int, k: int, **changed: Any) -> dict[str, Any]:
    """What a KEY.json says of image `number` with k regions; `changed` replaces entries."""
    image = {"source": "theirs", "id": str(number), "path": f"{number}.jpg", "width": 640, "height": 480, "sha256": ""}
    texts = [{"kind": "caption", "source": "theirs", "id": "0", "text": f"Photo {number}, größer."}]
    said = {"image": image, "tags": ["cat"] * k, "scores": [0.5] * k, "attributes": [], "texts": texts}
    return said | changed


def sample(number: int, k: int = 3, p: int = 8, **changed: Any) -> dict[str, bytes]:
    """The members of one image, by their names. `changed`: entries of the JSON, or whole members ("boxes.npy")."""
    rng = np.random.default_rng(number)
    boxes = np.tile(np.float32([10, 20, 110, 220]), (k, 1))
    members = {
        "json": json.dumps(content(number, k, **{n: v for n, v in changed.items() if "npy" not in n})).encode(),
        "boxes.npy": npy(boxes),
        "features.npy": npy(rng.normal(size=(k, p)).astype(np.float16)),
    }
    members |= {n: v for n, v in changed.items() if "npy" in n}
    return {f"image-{number:03d}.{extension}": data for extension, data in members.items()}


def write_tar(path: Path, members: dict[str, bytes], **info: Any) -> Path:
    """Write a tar with Python's tarfile; `info` are attributes of every member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for attribute, value in info.items():
                setattr(member, attribute, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def joined(*samples: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for each in samples for name, data in each.items()}
