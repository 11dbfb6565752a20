"""The index of a shard: one Parquet row an image, made by reading the tar, which is the truth."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

TEXT = pa.struct([(name, pa.string()) for name in ("kind", "source", "id", "text", "question", "answer")])
ATTRIBUTE = pa.struct([("id", pa.int32()), ("name", pa.string()), ("score", pa.float32())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("id", pa.string()),
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("attributes", pa.list_(pa.list_(ATTRIBUTE))),  # a list for every region
        ("texts", pa.list_(TEXT)),
        ("num_boxes", pa.int32()),
        # Where the raw array lies in the tar, after its .npy header: little-endian, C order, float32 [K, 4]
        ("boxes_offset", pa.int64()),
        ("boxes_bytes", pa.int64()),
        ("boxes_xxh3", pa.uint64()),  # XXH3-64 of these bytes
        # ... and float16 [K, P]
        ("features_offset", pa.int64()),
        ("features_bytes", pa.int64()),
        ("features_xxh3", pa.uint64()),
    ]
)
SIZE = b"oscar.tar_bytes"  # key of the Parquet schema's metadata: the size of the tar, by which a cut is noticed


def index_tar(tar: Path) -> pa.Table:
    """Read a tar from beginning to end and return its index (columns of `SCHEMA`).

    Raises:
        ValueError: a member is missing, out of order, or no array of the contract.
        tarfile.TarError: not a whole tar.
    """
    with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
        rows = list(_rows(archive, file))
    schema = SCHEMA.with_metadata({SIZE: str(tar.stat().st_size)})
    return pa.Table.from_pylist(rows, schema)


def _rows(archive: tarfile.TarFile, file: BinaryIO) -> Iterator[dict[str, Any]]:
    members = iter(archive)
    for member in members:
        key, _, extension = member.name.partition(".")
        if extension != "json":
            raise ValueError(f"{member.name}: a sample begins with KEY.json")
        file.seek(member.offset_data)
        content = json.loads(file.read(member.size))
        yield {
            "key": key,
            **content.pop("image"),
            **content,
            "num_boxes": len(content["tags"]),
            **_array(next(members, None), file, key, "boxes", "<f4"),
            **_array(next(members, None), file, key, "features", "<f2"),
        }


def _array(member: tarfile.TarInfo | None, file: BinaryIO, key: str, name: str, dtype: str) -> dict[str, int]:
    if member is None or member.name != f"{key}.{name}.npy":
        raise ValueError(f"{key}: {name}.npy must follow, not {member.name if member else 'the end'}")
    file.seek(member.offset_data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{member.name}: not a version 1.0 .npy file")
    shape, fortran, found = np.lib.format.read_array_header_1_0(file)
    offset = file.tell()
    size = member.offset_data + member.size - offset
    if fortran or found != np.dtype(dtype) or size != found.itemsize * int(np.prod(shape)):
        raise ValueError(f"{member.name}: {found} array of shape {shape} in {size} bytes is not the contract's {dtype}")
    return {
        f"{name}_offset": offset,
        f"{name}_bytes": size,
        f"{name}_xxh3": xxhash.xxh3_64_intdigest(file.read(size)),
    }
