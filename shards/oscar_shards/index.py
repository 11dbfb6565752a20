"""The index of a shard: one Parquet row an image, made by reading the tar, which is the truth."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import reason
from oscar_common.files import rename, unfinished
from oscar_shards.content import CONTENT, read_content
from oscar_shards.samples import Entry, Span, entries
from oscar_shards.seal import write_sealed
from oscar_shards.tar import BLOCK, Window, members

SAMPLE_BYTES = 3 * BLOCK  # of a sample at least: three headers
MARGIN = 1 << 20  # bytes that a small index may have beyond four times its tar's
FEW = 1024  # rows that are taken from an index at once
ROWS_LIMIT = 1 << 24  # rows of an index that is read a few rows at a time
BATCH_LIMIT = 256 << 20  # bytes of a few rows: two hundred times what a thousand images have
BATCH = 4 << 20  # bytes of JSON that are parsed at once
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def _array_fields(name: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_offset", pa.int64()), (f"{name}_bytes", pa.int64()), (f"{name}_xxh3", pa.uint64())]


PLACES = pa.schema(
    [
        ("num_boxes", pa.int32()),  # K
        # The whole sample: from its first header to the next sample's
        ("sample_offset", pa.int64()),
        ("sample_bytes", pa.int64()),
        ("frame_xxh3", pa.uint64()),  # XXH3-64 of its bytes that are in no array: headers, JSON, padding
        # Where the raw arrays lie in the tar, after their .npy headers: little-endian, C order; and XXH3-64
        *_array_fields("boxes"),  # float32 [K, 4]
        *_array_fields("scales"),  # float32 [K], only where features are int8, else null
        *_array_fields("features"),  # float16 [K, P], or int8 [K, P] to be multiplied by the row's scale
    ]
)
SCHEMA = pa.schema([("key", pa.string()), *CONTENT, *PLACES])
LATER = SCHEMA.get_field_index("gt_tags")  # the column that the first indexes lacked
FIRST_SCHEMA = SCHEMA.remove(LATER)
SIZE = b"oscar.tar_bytes"  # key of the Parquet schema's metadata: the size of the tar, by which a cut is noticed


def index_path(tar: Path) -> Path:
    """Return the Parquet index that lies next to a tar."""
    return tar.with_suffix(".parquet")


def index_tar(tar: Path) -> pa.Table:
    """Read a tar from beginning to end and return its index (columns of `SCHEMA`).

    The tar may be of any writer: members of a sample in any order, extended headers, further members.

    Raises:
        ValueError: a member is missing, or no array of the contract; or (TarFault) not a whole tar.
    """
    with Window(tar) as window:
        batches = list(_batches(window))
    schema = SCHEMA.with_metadata({SIZE: str(window.size)})
    return pa.Table.from_batches(batches, SCHEMA).replace_schema_metadata(schema.metadata)


def write_index(table: pa.Table, path: Path) -> None:
    """Write an index, whole or not at all; its bytes are a function of the table alone."""
    write_unfinished_index(table, path)
    rename(path)


def write_unfinished_index(table: pa.Table, path: Path) -> None:
    """Write an index under the temporary name of `path`."""
    with unfinished(path) as file:
        write_sealed(table, file, compression="zstd", write_page_checksum=True)


def load_index(tar: Path) -> pa.Table:
    """Read the index beside a tar; it may be anybody's, so no more is read than an index of this tar can have.

    Raises:
        ValueError: there is none, or it is damaged or of another version.
    """
    path = index_path(tar)
    with _reading(path.name, tar):
        size = tar.stat().st_size
        table = read_bounded(path, size // SAMPLE_BYTES, 4 * size + MARGIN)

    if not _is_known(table.schema):
        raise ValueError(_other_version(tar))

    return _with_later(table)


def open_index(file: Path | pa.Buffer, tar: Path) -> tuple[int, Iterator[pa.RecordBatch]]:
    """Return how many bytes the tar had when its index was made (or -1), and its rows, some at a time.

    An index of any length is read in bounded memory. `file` is the index' path or its bytes; `tar` is for messages.

    Raises:
        ValueError: there is none, or it is damaged or of another version; also while the rows are read.
    """
    with _reading(index_path(tar).name, tar):
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        if not _is_known(parquet.schema_arrow):
            parquet.close()
            raise _Unfit(_other_version(tar))
        return size_said(parquet.schema_arrow), _rows_of(parquet, tar)


def _rows_of(parquet: pq.ParquetFile, tar: Path) -> Iterator[pa.RecordBatch]:
    with _reading(index_path(tar).name, tar), parquet:
        yield from map(_with_later, _bounded(parquet, ROWS_LIMIT))


def _is_known(schema: pa.Schema) -> bool:
    return any(schema.equals(known) for known in (SCHEMA, FIRST_SCHEMA))


def _other_version(tar: Path) -> str:
    return f"its index {index_path(tar).name} is of another version; run: oscar-shards index {tar}"


def _with_later(rows: Rows) -> Rows:
    """Return rows of an index with empty lists in the column that the first indexes lacked, if it does."""
    if rows.num_columns == len(SCHEMA):
        return rows
    offsets = pa.array(np.zeros(len(rows) + 1, np.int32))
    columns = [*rows.columns]
    columns.insert(LATER, pa.ListArray.from_arrays(offsets, pa.array([], pa.string()), type=SCHEMA.types[LATER]))
    return type(rows).from_arrays(columns, schema=rows.schema.insert(LATER, SCHEMA.field(LATER)))


@contextmanager
def _reading(name: str, tar: Path) -> Iterator[None]:
    """Say in one line what is wrong with an index."""
    again = f"run: oscar-shards index {tar}"
    try:
        yield
    except _Unfit:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"it has no index {Path(error.filename or name).name}; {again}") from None
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise ValueError(f"its index {name} is damaged ({reason(error)}); {again}") from None


class _Unfit(ValueError):
    """An index that is whole but not what is needed."""


def read_bounded(path: Path, rows: int, size: int) -> pa.Table:
    """Read a Parquet file of no more than so many rows and bytes: a short one may hold gigabytes of the same again.

    Raises:
        ValueError, pa.ArrowException, OSError: it is larger, or damaged.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema, metadata = file.schema_arrow, file.metadata
        num_bytes = sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
        if num_bytes > size:
            raise ValueError(f"{metadata.num_rows:,} rows and {num_bytes:,} bytes are more than there can be")

        batches = []
        for batch in _bounded(file, rows):
            size -= batch.nbytes
            if size < 0:
                raise ValueError("its contents are more than there can be")
            batches.append(batch)

    return pa.Table.from_batches(batches, schema).combine_chunks()


def _bounded(file: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows, a few at a time."""
    if file.metadata.num_rows > rows:
        raise ValueError(f"{file.metadata.num_rows:,} rows are more than there can be")

    for batch in file.iter_batches(FEW):
        if batch.nbytes > BATCH_LIMIT:
            raise ValueError("its contents are more than there can be")
        batch.validate(full=True)
        yield batch


def size_said(schema: pa.Schema) -> int:
    """Return how many bytes the tar had when its index was made, or -1."""
    stored = (schema.metadata or {}).get(SIZE, b"")
    return int(stored) if stored.isdigit() else -1


def _batches(window: Window) -> Iterator[pa.RecordBatch]:
    for rows in in_batches(_rows(window)):
        batch, faults = make_batch(rows)
        for key, message in faults:
            raise ValueError(f"{key}: {message}")
        yield batch


def _rows(window: Window) -> Iterator["Row"]:
    for entry in entries(window, members(window)):
        if entry.faults:
            raise ValueError(f"{entry.key}: {entry.faults[0]}")
        yield read_row(window, entry)


class Row(NamedTuple):
    """A row of the index whose JSON is still to be parsed. `places` are its values of `PLACES`."""

    key: str
    json: bytes
    places: tuple[int | None, ...]


def read_row(window: Window, entry: Entry) -> Row:
    """Read all bytes of an image that has no faults."""
    assert entry.json
    json = bytes(window.view(entry.json.data, entry.json.size))

    def xxh3(span: Span) -> int:
        return window.xxh3((span.begin, span.end))

    return Row(entry.key, json, places(entry, window.xxh3(*entry.frame()), xxh3))


def places(entry: Entry, frame: int | None, xxh3: Callable[[Span], int | None]) -> tuple[int | None, ...]:
    """Return the values of `PLACES` of an image that has no faults."""
    assert entry.boxes
    arrays = ((s.begin, s.size, xxh3(s)) if s else (None,) * 3 for s in (entry.boxes, entry.scales, entry.features))
    return (entry.boxes.shape[0], entry.begin, entry.end - entry.begin, frame, *(v for a in arrays for v in a))


def in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Gather rows until their JSON is worth parsing; an empty batch if there are no rows."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.json)
        if size >= BATCH:
            yield batch
            batch, size = [], 0

    yield batch


def columns(rows: Iterable[tuple[int | None, ...]]) -> list[pa.Array]:
    """Return values of `PLACES` by column."""
    turned = list(zip(*rows, strict=True)) or [()] * len(PLACES)
    return [pa.array(column, form) for column, form in zip(turned, PLACES.types, strict=True)]


def make_batch(rows: list[Row]) -> tuple[pa.RecordBatch, list[tuple[str, str]]]:
    """Return rows as columns of `SCHEMA`, and (key, fault) of those whose JSON is not the contract's: left out."""
    content, wrong = read_content([row.json for row in rows])
    good = [row for number, row in enumerate(rows) if number not in wrong]
    keys = pa.array([row.key for row in good], pa.string())
    batch = pa.RecordBatch.from_arrays([keys, *content.columns, *columns(row.places for row in good)], schema=SCHEMA)
    return batch, [(rows[number].key, message) for number, message in wrong.items()]
