"""A folder of shards, opened through its indexes; arrays are read at their offsets, without parsing tars."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import UsageError
from oscar_common.files import no_folder
from oscar_common.sample import Attribute, ImageRecord, Regions, Sample, Text
from oscar_shards.index import index_path, index_tar, load_index, size_said
from oscar_shards.manifest import FILE, Manifest, in_order, read_manifest
from oscar_shards.quantise import dequantise
from oscar_shards.samples import Entry, array, entries
from oscar_shards.tar import Window, members
from oscar_shards.write import rejects_path

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """`table` has a row per image in shard order: the columns of `oscar_shards.index.SCHEMA`, and `shard`, which
    counts in `tars`."""

    folder: Path
    manifest: Manifest
    tars: list[Path]
    table: pa.Table


def find_shards(folder: Path, flag: str = "--shards") -> tuple[Manifest, list[Path]]:
    """Return the manifest and the tars of a folder.

    Raises:
        UsageError: it is missing, empty or unfinished.
    """
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder}: {no_folder(folder)}; give one made by oscar-extract")

    manifest = read_manifest(folder, flag)
    tars = manifest.tars(folder)
    if len(tars) != manifest.plan.num_shards:
        raise UsageError(
            f"{flag} {folder}: {len(tars)} of {manifest.plan.num_shards} shards are there; "
            "run its oscar-extract command again"
        )

    return manifest, tars


def open_folder(folder: str | Path, flag: str = "--shards") -> ShardFolder:
    """Open all shards of a folder.

    Args:
        folder: the folder.
        flag: what messages call it by.

    Raises:
        UsageError: in one line, a folder that is missing, empty, unfinished, or has a damaged shard.
    """
    folder = Path(folder)
    manifest, tars = find_shards(folder, flag)
    tables = [_read_index(tar, flag) for tar in tars]
    numbered = [t.append_column("shard", pa.array(np.full(len(t), n, np.int32))) for n, t in enumerate(tables)]
    return ShardFolder(folder=folder, manifest=manifest, tars=tars, table=pa.concat_tables(numbered))


def is_whole(tar: Path) -> bool:
    """Whether a shard is there as it was written: tar and index, and the tar as long as the index says."""
    try:
        return tar.stat().st_size == size_said(pq.read_schema(index_path(tar)))
    except (OSError, ValueError, pa.ArrowException):
        return False


def _read_index(tar: Path, flag: str) -> pa.Table:
    try:
        table = load_index(tar)
    except ValueError as error:
        raise UsageError(f"{flag}: {tar}: {error}") from None

    if tar.stat().st_size != (size := size_said(table.schema)):
        raise UsageError(
            f"{flag}: {tar} has {tar.stat().st_size} bytes, its index says {size}: it is cut or changed; "
            "delete it and run its oscar-extract command again"
        )

    return table.replace_schema_metadata()


def tars_at(path: Path, flag: str = "PATH") -> list[Path]:
    """Return a tar, or the tars of a folder, with or without a manifest.

    Raises:
        UsageError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{flag} {path}: no such file or folder; give a folder of shards, or a tar")

    manifest = None
    with suppress(UsageError):  # a manifest that is damaged does not hide the tars
        manifest = manifest_of(path)

    paths = manifest.tars(path) if manifest else in_order(path.glob("[!.]*.tar"))
    if not paths:
        raise UsageError(f"{flag} {path}: no tar in it; give a folder of shards, or a tar")

    return paths


def manifest_of(path: Path) -> Manifest | None:
    """Return the manifest of a folder, or of a tar's folder, if there is one."""
    folder = path if path.is_dir() else path.parent
    return read_manifest(folder, "PATH") if (folder / FILE).exists() else None


def read_index(tar: Path) -> pa.Table:
    """Return the index of a tar, rebuilt if there is none of this version beside it.

    Raises:
        UsageError: the tar is damaged, or not one of shards.
    """
    with suppress(ValueError):  # the tar is the truth
        if is_whole(tar):
            return load_index(tar)

    try:
        return index_tar(tar)
    except ValueError as error:
        raise UsageError(f"PATH {tar}: {error}; see: oscar-shards verify {tar}") from None


def read_samples(tar: Path) -> Iterator[Sample]:
    """Yield the samples of a tar as they were given to `write_shard`; features of int8 as float32.

    Raises:
        ValueError: a sample is not the contract's, or (TarFault) the tar is damaged.
    """
    with Window(tar) as window:
        for entry in entries(window, members(window)):
            if entry.faults:
                raise ValueError(f"{entry.key}: {entry.faults[0]}")
            yield _sample(window, entry)


def _sample(window: Window, entry: Entry) -> Sample:
    assert entry.json
    assert entry.boxes
    assert entry.features
    content = parse_content(bytes(window.view(entry.json.data, entry.json.size)), entry.key)
    boxes, features = array(window, entry.boxes).copy(), array(window, entry.features).copy()

    return Sample(
        key=entry.key,
        image=content["image"],
        regions=Regions(
            boxes=boxes,
            features=dequantise(features, array(window, entry.scales)) if entry.scales else features,
            tags=content["tags"],
            scores=content["scores"],
            attributes=content["attributes"],
        ),
        texts=content["texts"],
        gt_tags=content["gt_tags"],
    )


def parse_content(raw: bytes, key: str) -> dict[str, Any]:
    """Parse a KEY.json: what is missing is empty, as in the index, and what is not known is passed over."""
    try:
        content = json.loads(raw)
        image = {"source": "", "id": key, "path": "", "width": 0, "height": 0, "sha256": ""} | content.get("image", {})
        return {
            "image": _made(ImageRecord, image),
            "tags": list(content.get("tags") or ()),
            "scores": list(content.get("scores") or ()),
            "attributes": [[_made(Attribute, a) for a in some] for some in content.get("attributes") or ()],
            "gt_tags": list(content.get("gt_tags") or ()),
            "texts": [_made(Text, t | {n: str(t[n]) for n in ("id",) if n in t}) for t in content.get("texts") or ()],
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{key}: json: {error}") from None


def _made(form: type[T], content: dict[str, Any]) -> T:
    return form(**{f.name: content[f.name] for f in fields(form) if f.name in content})  # type: ignore[arg-type]


def read_rejects(tars: list[Path]) -> pa.Table | None:
    """Return the rejects of shards (path, reason, message), or None if there are none."""
    tables = [pq.read_table(p) for p in map(rejects_path, tars) if p.exists()]
    return pa.concat_tables(tables) if tables else None


def read_boxes(tar: Path, row: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Return the boxes of one image, float32 [K, 4], given its row of the table as a dict."""
    count = row["boxes_bytes"] // 4
    return np.fromfile(tar, "<f4", count, offset=row["boxes_offset"]).reshape(row["num_boxes"], 4)


def read_features(tar: Path, row: dict[str, Any]) -> npt.NDArray[np.floating[Any]]:
    """Return the features of one image, [K, P], given its row of the table as a dict: float16, or float32 if the shard
    holds int8, which are multiplied by their rows' scales."""
    k, size, integers = row["num_boxes"], row["features_bytes"], row["scales_offset"] is not None
    dtype = np.dtype("i1" if integers else "<f2")
    stored = np.fromfile(tar, dtype, size // dtype.itemsize, offset=row["features_offset"])
    features = stored.reshape(k, stored.size // max(k, 1))
    return dequantise(features, np.fromfile(tar, "<f4", k, offset=row["scales_offset"])) if integers else features
