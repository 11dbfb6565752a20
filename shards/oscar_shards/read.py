"""A folder of shards, opened through its indexes; arrays are read at their offsets, without parsing tars."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import UsageError
from oscar_shards.index import SCHEMA, SIZE
from oscar_shards.manifest import Manifest, read_manifest
from oscar_shards.write import index_path, rejects_path


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
        raise UsageError(f"{flag} {folder}: no such folder; give one made by oscar-extract")
    manifest = read_manifest(folder, flag)
    tars = sorted(folder.glob(f"{manifest.name}-*.tar"))
    if len(tars) != manifest.plan.num_shards:
        raise UsageError(
            f"{flag} {folder}: {len(tars)} of {manifest.plan.num_shards} shards are there; "
            "run its oscar-extract command again"
        )
    return manifest, tars


def open_folder(folder: Path, flag: str = "--shards") -> ShardFolder:
    """Open all shards of a folder.

    Raises:
        UsageError: in one line, a folder that is missing, empty, unfinished, or has a damaged shard.
    """
    manifest, tars = find_shards(folder, flag)
    tables = [_read_index(tar, flag).append_column("shard", _constant(n, tar)) for n, tar in enumerate(tars)]
    return ShardFolder(folder=folder, manifest=manifest, tars=tars, table=pa.concat_tables(tables))


def is_whole(tar: Path) -> bool:
    """Whether a shard is there as it was written: tar and index, and the tar as long as the index says."""
    try:
        said = pq.read_schema(index_path(tar)).metadata or {}
        return tar.stat().st_size == int(said.get(SIZE, -1))
    except (OSError, ValueError):
        return False


def _constant(number: int, tar: Path) -> pa.Array:
    return pa.array(np.full(pq.read_metadata(index_path(tar)).num_rows, number, np.int32))


def _read_index(tar: Path, flag: str) -> pa.Table:
    again = "delete it and run its oscar-extract command again"
    try:
        table = pq.read_table(index_path(tar))
    except FileNotFoundError:
        raise UsageError(f"{flag}: {tar} has no index {index_path(tar).name}; {again}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{flag}: {index_path(tar)} is damaged ({str(error).splitlines()[0]}); {again}") from None
    size = int((table.schema.metadata or {}).get(SIZE, -1))
    if tar.stat().st_size != size or not table.schema.equals(SCHEMA):
        raise UsageError(
            f"{flag}: {tar} has {tar.stat().st_size} bytes, its index says {size}: it is cut or changed; {again}"
        )
    return table.replace_schema_metadata()


def read_rejects(tars: list[Path]) -> pa.Table | None:
    """Return the rejects of shards (path, reason, message), or None if there are none."""
    found = [pq.read_table(p) for p in map(rejects_path, tars) if p.exists()]
    return pa.concat_tables(found) if found else None


def read_boxes(tar: Path, row: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Return the boxes of one image, float32 [K, 4], given its row of the table as a dict."""
    count = row["boxes_bytes"] // 4
    return np.fromfile(tar, "<f4", count, offset=row["boxes_offset"]).reshape(row["num_boxes"], 4)


def read_features(tar: Path, row: dict[str, Any]) -> npt.NDArray[np.float16]:
    """Return the features of one image, float16 [K, P], given its row of the table as a dict."""
    count = row["features_bytes"] // 2
    return np.fromfile(tar, "<f2", count, offset=row["features_offset"]).reshape(row["num_boxes"], -1)
