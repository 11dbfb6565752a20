"""One shard of an import: its rows to samples and rejects, in a process of its own."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from oscar_common.errors import OperationError
from oscar_common.sample import Regions, Sample
from oscar_shards.content import read_content
from oscar_shards.formats import sidecar
from oscar_shards.formats.fields import Ints, Refused
from oscar_shards.formats.lines import Lines
from oscar_shards.formats.rows import Rows
from oscar_shards.manifest import Layout
from oscar_shards.read import is_whole
from oscar_shards.samples import JSON_LIMIT
from oscar_shards.write import Reject, rejects_path, sample_json, unfit_numbers, write_shard


@dataclass(frozen=True, kw_only=True)
class Part:
    """A shard to write from `rows`.

    places: of each image, see `sidecar.Images`; those from 0 on are, in their order, `rows`. sidecar: that file, and
    the group of its rows. duplicates: rows whose id was there before. misfits: to be noted with the shard.
    """

    tar: Path
    rows: Rows
    places: Ints
    duplicates: frozenset[int]
    misfits: list[Reject] = field(default_factory=list)
    sidecar: tuple[Path, int] | None = None
    known_rejects: int = 0


@dataclass(frozen=True)
class Written:
    """What became of a part: how much was refused (images and texts), and the first with what was wrong."""

    rejects: int
    refused_images: int
    first: tuple[str, str]


def is_done(part: Part) -> bool:
    """Whether a shard is there and nothing of it was refused, so that it needs no second try."""
    refused = rejects_path(part.tar)
    try:
        num_rejects = pq.read_metadata(refused).num_rows if refused.exists() else 0
    except (OSError, ValueError):
        return False
    return is_whole(part.tar) and num_rejects == part.known_rejects


def write_part(job: tuple[Part, Layout]) -> Written:
    """Write a shard.

    Raises:
        OperationError: it cannot be written as it should be.
    """
    part, layout = job
    rejects: list[Reject] = []
    images = 0

    def counted() -> Iterator[Sample | Reject]:
        nonlocal images
        for item in _from_sidecar(part, layout) if part.sidecar else _from_files(part, layout):
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                images += 1
            yield item

    try:
        write_shard(part.tar, counted(), layout)
    except ValueError as error:
        raise OperationError(f"{part.tar}: {error}") from None

    new = rejects[part.known_rejects :]
    return Written(len(new), len(part.places) - images, (new[0].path, new[0].message) if new else ("", ""))


def _from_files(part: Part, layout: Layout) -> Iterator[Sample | Reject]:
    yield from part.misfits
    rows = part.rows
    with Lines(rows.paths) as lines:
        for row in range(len(part.places)):
            if row in part.duplicates:
                message = f"{rows.sources[row]} has an image {rows.ids[row]!r} before"
                yield Reject(path=rows.name(row), reason="duplicate", message=message)
                continue

            try:
                sample, refused = rows.read(row, lines)
                sample = checked(sample, layout)
            except (ValueError, OverflowError, TypeError) as error:
                yield _reject(rows.name(row), error)
                continue

            yield from refused
            yield sample


def _from_sidecar(part: Part, layout: Layout) -> Iterator[Sample | Reject]:
    """Yield samples whose arrays come from the files, and all else from images.parquet."""
    assert part.sidecar
    images, rejects = sidecar.read_group(*part.sidecar)
    yield from rejects
    row = -1

    with Lines(part.rows.paths) as lines:
        for (key, content), place in zip(images, part.places.tolist(), strict=True):
            row += place >= 0
            try:
                if place == -2:
                    raise Refused("missing", f"not in the files; delete {sidecar.FILE} to have the files alone read")
                regions = part.rows.read(row, lines)[0].regions if place >= 0 else _no_regions(layout)
                sample = checked(_sample(key, content, regions), layout)
                for message in read_content([sample_json(sample)])[1].values():  # that file could say anything
                    raise Refused("json", message)
            except (ValueError, OverflowError, TypeError) as error:
                yield _reject(key, error)
                continue

            yield sample


def _sample(key: str, content: dict[str, Any], regions: Regions) -> Sample:
    labels = {name: content[name] for name in ("tags", "scores", "attributes")}
    image_fields = {name: content[name] for name in ("image", "texts", "gt_tags")}
    return Sample(key=key, regions=dataclasses.replace(regions, **labels), **image_fields)


def _reject(path: str, error: Exception) -> Reject:
    reason = error.reason if isinstance(error, Refused) else "damaged"
    return Reject(path=path, reason=reason, message=str(error))


def checked(sample: Sample, layout: Layout) -> Sample:
    """Return a sample as it can be written; without regions it has no features of another P.

    Raises:
        Refused: it cannot be written.
    """
    regions = sample.regions
    k, width = regions.features.shape
    if k and width != layout.feature_dim:
        raise Refused("size", f"{width} features a region; in the first rows there are {layout.feature_dim}")
    if len(regions.tags) not in (0, k) or len(regions.scores) != len(regions.tags):
        raise Refused("count", f"{k} regions, {len(regions.tags)} tags and {len(regions.scores)} scores")
    if unfit := unfit_numbers(regions):
        raise Refused(*unfit)

    content = sample_json(sample)  # which fails on what is no Unicode
    if len(content) > JSON_LIMIT:
        raise Refused("too-long", f"{len(content):,} bytes of JSON; at most {JSON_LIMIT:,}")

    return sample if k else dataclasses.replace(sample, regions=_no_regions(layout))


def _no_regions(layout: Layout) -> Regions:
    features = np.zeros((0, layout.feature_dim), np.float16)
    return Regions(boxes=np.zeros((0, 4), np.float32), features=features, tags=[], scores=[])
