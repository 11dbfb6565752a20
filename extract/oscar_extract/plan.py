"""The plan: which image goes into which shard, with which texts. Everything after it is a function of the plan."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from oscar_common.errors import UsageError
from oscar_common.sample import Text, make_key
from oscar_extract.captions import read_texts
from oscar_extract.sources import list_images
from oscar_shards.manifest import PlanRecord


@dataclass(frozen=True, kw_only=True)
class PlannedImage:
    """An image to extract. `path` is relative to the plan's folder."""

    key: str
    id: str
    path: str
    texts: list[Text]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All images of a job in order. Shard i holds the images from i * images_per_shard on."""

    folder: Path
    source: str
    images: list[PlannedImage]
    unmatched_texts: int
    record: PlanRecord

    def shard(self, number: int) -> Sequence[PlannedImage]:
        """Return the images of one shard."""
        size = self.record.images_per_shard
        return self.images[number * size : (number + 1) * size]


def make_plan(folder: Path, captions: str | None, source: str | None, images_per_shard: int) -> Plan:
    """List the images, join their texts, and fix the order.

    Raises:
        UsageError: no images, unreadable captions, or captions of other images.
    """
    sources = list_images(folder)
    texts = read_texts(captions, folder, sources) if captions else None
    images = [
        PlannedImage(key=make_key(s.id), id=s.id, path=s.path, texts=texts.by_id.get(s.id, []) if texts else [])
        for s in sources
    ]
    if len({i.key for i in images}) < len(images):
        raise UsageError(f"--images {folder}: two file names come to one shard key; rename one")
    source = source or folder.resolve().name
    record = PlanRecord(
        images=str(folder),
        captions=captions,
        num_images=len(images),
        num_texts=sum(len(i.texts) for i in images),
        images_per_shard=images_per_shard,
        num_shards=-(-len(images) // images_per_shard),
        sha256=_fingerprint(source, images),
    )
    unmatched = texts.unmatched if texts else 0
    return Plan(folder=folder, source=source, images=images, unmatched_texts=unmatched, record=record)


def _fingerprint(source: str, images: list[PlannedImage]) -> str:
    digest = hashlib.sha256(source.encode())
    for image in images:
        digest.update(json.dumps(asdict(image), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
