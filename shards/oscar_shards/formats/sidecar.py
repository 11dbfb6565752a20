"""images.parquet beside an export: what the other format has no place for, so that an import gives the same shards."""

import dataclasses
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import UsageError, reason
from oscar_shards.formats.fields import Ints
from oscar_shards.formats.rows import Rows
from oscar_shards.read import parse_content
from oscar_shards.seal import leave_room, stamp
from oscar_shards.write import Reject

FILE = "images.parquet"
FORMAT = b"oscar.format"  # key of its metadata
SHARDS = b"oscar.shards"  # names of the tars, a list as JSON
# A row for each image, in the shards' order, and then for each of a shard's rejects; a group of rows is a shard
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),  # name of the tar
        ("key", pa.string()),  # null: a reject
        ("json", pa.string()),  # KEY.json; of a reject path, reason, message
        ("file", pa.string()),  # of the export, relative to this one; empty: the image has no regions and is in none
        ("id", pa.string()),  # what the image is called there
    ]
)


class SidecarWriter:
    """Writes the file, a shard after the other."""

    def __init__(self, folder: Path, format: str, tars: list[Path], stack: ExitStack) -> None:
        metadata = {FORMAT: format.encode(), SHARDS: json.dumps([tar.name for tar in tars]).encode()}
        schema = SCHEMA.with_metadata(metadata)
        self._path = folder / FILE
        self._writer = stack.enter_context(pq.ParquetWriter(folder / FILE, schema, compression="zstd"))

    def add(self, tar: Path, images: list[tuple[str, str, str, str]], rejects: list[Reject]) -> None:
        """Write a shard's images, (key, json, file, id) of each, and its rejects."""
        rows: list[tuple[str | None, ...]] = [(tar.name, *image) for image in images]
        rows += [(tar.name, None, json.dumps(dataclasses.asdict(r)), "", "") for r in rejects]
        if rows:
            columns = [list(column) for column in zip(*rows, strict=True)]
            self._writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(rows))

    def close(self) -> None:
        """Write the end of the file."""
        leave_room(self._writer)
        self._writer.close()
        stamp(self._path)


def read_files(path: Path) -> tuple[str, set[str]]:
    """Return the format of an export, and the files that its images are in, relative to it.

    Raises:
        OSError, ValueError, LookupError, pa.ArrowException: it is damaged, or not this module's.
    """
    with pq.ParquetFile(path) as file:
        format = (file.schema_arrow.metadata or {})[FORMAT].decode()
        files = {name for batch in file.iter_batches(columns=["file"]) for name in batch["file"].unique().to_pylist()}
    return format, files - {"", None}


@dataclass(frozen=True)
class Images:
    """Where the images of each shard are in an export. groups: of the file, -1 for an empty shard; rows: numbers of
    its images among the export's, -1 where an image has no regions, -2 where it is missing."""

    tars: list[str]
    groups: list[int]
    rows: list[Ints]
    rejects: list[int]


def find(source: Path) -> Path | None:
    """Return the file that goes with what is imported, if there is one."""
    path = (source if source.is_dir() else source.parent) / FILE
    return path if path.is_file() else None


def read_images(path: Path, format: str, found: Rows) -> Images:
    """Find the images of a sidecar among those of an export.

    Raises:
        UsageError: it is damaged, or of another format.
    """
    try:
        file = pq.ParquetFile(path)
        metadata = file.schema_arrow.metadata or {}
        version, tars = metadata[FORMAT].decode(), json.loads(metadata[SHARDS])
        tables = [file.read_row_group(n, ["shard", "key", "file", "id"]) for n in range(file.num_row_groups)]
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        again = "export again, or delete it to have the files alone read"
        raise UsageError(f"FROM {path}: it is damaged ({reason(error)}); {again}") from None

    if version != format:
        raise UsageError(f"FORMAT {format}: {path} is of an export in the format {version}; give that")
    if not all(isinstance(t, str) and t.endswith(".tar") and Path(t).name == t and t[0] != "." for t in tars):
        raise UsageError(f"FROM {path}: it names shards that are no files of a folder: {tars[:3]}")

    places: dict[str, dict[str, int]] = {}  # by file and id
    of_file = [places.setdefault(str(p.relative_to(path.parent)), {}) for p in found.paths]
    for row, (n, id) in enumerate(zip(found.file.tolist(), found.ids, strict=True)):
        of_file[n][id] = row

    group = {table["shard"][0].as_py(): n for n, table in enumerate(tables)}
    rows, rejects = [], []
    for tar in tars:
        table = tables[group[tar]] if tar in group else SCHEMA.empty_table()
        images = table.filter(table["key"].is_valid())
        files, ids = images["file"].to_pylist(), images["id"].to_pylist()
        rows.append(
            np.array([places.get(f, {}).get(i, -2) if f else -1 for f, i in zip(files, ids, strict=True)], np.int64)
        )
        rejects.append(len(table) - len(images))

    return Images(tars, [group.get(tar, -1) for tar in tars], rows, rejects)


def read_group(path: Path, group: int) -> tuple[list[tuple[str, dict[str, Any]]], list[Reject]]:
    """Return of a shard each image's key and KEY.json, parsed to the parts of a sample; and the shard's rejects."""
    if group < 0:
        return [], []
    table = pq.ParquetFile(path).read_row_group(group, ["key", "json"])
    pairs = list(zip(table["key"].to_pylist(), table["json"].to_pylist(), strict=True))
    images = [(key, parse_content(content.encode(), key)) for key, content in pairs if key is not None]
    return images, [Reject(**json.loads(content)) for key, content in pairs if key is None]
