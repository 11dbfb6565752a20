"""The sample: one image, its regions and its texts, as stage 1 writes it and stage 2 reads it."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

KEY_BYTES = 80  # a member name is KEY + ".features.npy" and must fit the 100 bytes of a plain tar header


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text of an image: a caption (`text`), or a question with its answer."""

    kind: str  # "caption" or "qa"
    source: str
    id: str
    text: str | None = None
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An attribute of a region: its index in the detector's vocabulary, its name and its probability."""

    id: int
    name: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """Where a sample comes from. `width` and `height` are pixels after the EXIF orientation is applied."""

    source: str
    id: str
    path: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Regions:
    """What a detector found in one image, in detector order.

    boxes: float32 [K, 4], xyxy, pixels of the original image. features: float16 [K, P]; float32 if they come from
    elsewhere. tags, scores: K class names and their probabilities; none at all where no class is known. attributes: a
    list for each region, the likeliest first; none at all if the detector has no such head.
    """

    boxes: npt.NDArray[np.float32]
    features: npt.NDArray[np.floating[Any]]
    tags: list[str]
    scores: list[float]
    attributes: list[list[Attribute]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a shard. gt_tags: what people say is in it, if anybody does; they belong to no region."""

    key: str
    image: ImageRecord
    regions: Regions
    texts: list[Text]
    gt_tags: list[str] = field(default_factory=list)


def make_key(image_id: str) -> str:
    """Turn a dataset's id into a shard key: `[A-Za-z0-9_-]` stays, every other byte of its UTF-8 becomes `%XX`.

    The map is one-to-one: two ids never share a key. Ids whose key would not fit a tar header keep their first
    characters and end in `%_` and a hash, which no other id's key contains.
    """
    key = re.sub(
        rb"[^A-Za-z0-9_-]", lambda m: b"%%%02X" % m[0][0], image_id.encode("utf-8", "surrogateescape")
    ).decode()
    if len(key) <= KEY_BYTES:
        return key
    return f"{key[: KEY_BYTES - 34]}%_{hashlib.sha256(key.encode()).hexdigest()[:32]}"
