"""Arrow tables and what readers of other people's files share, as millions of rows are too many for objects."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from csv import Error as CSVError
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError

Ints = npt.NDArray[np.int64]
CHUNK = 1 << 16

TEXTS = pa.schema(
    [
        ("image", pa.string()),
        ("kind", pa.string()),
        ("source", pa.string()),
        ("id", pa.string()),
        ("text", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)


def table(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    """Make a table from rows, a chunk of them at a time."""
    remaining = iter(rows)
    batches = []
    while chunk := list(islice(remaining, CHUNK)):
        made = [text_array(column, field.type) for column, field in zip(zip(*chunk, strict=True), schema, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(made, schema=schema))
    return pa.Table.from_batches(batches, schema)


def text_array(values: Sequence[Any], form: pa.DataType) -> pa.Array:
    """Return values as a column, half surrogate pairs as question marks."""
    try:
        return pa.array(values, form)
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair, which no UTF-8 can
        return pa.array([_whole(v) for v in values], form)


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def columns(schema: pa.Schema, length: int, **given: object) -> pa.Table:
    """Make a table of `length` rows from whole columns; a scalar fills its column, and what is not given is null."""
    arrays = []
    for column in schema:
        value = given.get(column.name)
        if isinstance(value, np.ndarray):
            value = pa.array(value)
        if not isinstance(value, pa.Array | pa.ChunkedArray):
            value = pa.repeat(text_array([value], column.type)[0], length)
        arrays.append(value.cast(column.type))

    return pa.Table.from_arrays(arrays, schema=schema)


def array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    if not isinstance(column, pa.ChunkedArray):
        return column

    combined = column.combine_chunks()
    if not isinstance(combined, pa.ChunkedArray):
        return combined
    if combined.num_chunks > 1:
        raise OverflowError("more than 2 GiB of text in one column; plan fewer datasets at once")

    return combined.chunk(0)


def strings(values: Sequence[Any]) -> pa.Array:
    """Return a column of text."""
    return text_array(values, pa.string())


def find(wanted: pa.Array, names: pa.Array) -> Ints:
    """Return for each wanted name the first row of `names` that equals it, or -1; int64 [len(wanted)]."""
    rows = pc.index_in(wanted, value_set=names, skip_nulls=True).fill_null(-1)
    positions: Ints = rows.to_numpy(zero_copy_only=False).astype(np.int64)
    return positions


def once(names: pa.Array) -> pa.Array:
    """Return the names with null for each that occurs more than once: nobody can say which one is meant."""
    counts = pc.value_counts(names)
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return pc.if_else(pc.is_in(names, value_set=several), None, names)


def last(paths: pa.Array) -> pa.Array:
    """Return the last part of each path."""
    return pc.replace_substring_regex(paths, r"(?s)^.*/", "")


def stems(paths: pa.Array) -> pa.Array:
    """Return the last part of each path without its extension."""
    return without_extension(last(paths))


def without_extension(paths: pa.Array) -> pa.Array:
    """Return each path without the extension of its last part."""
    return pc.replace_substring_regex(paths, r"([^/])\.[^./]*$", r"\1")


def numbers(names: pa.Array) -> pa.Array:
    """Return 139 for 000000000139.jpg, COCO_val2014_000000000139.jpg and 139; null for what is no number."""
    pattern = r"^(?:COCO_\w+_)?0*(?P<number>\d+)(?:\.[A-Za-z]\w*)?$"
    return pc.struct_field(pc.extract_regex(last(names), pattern), "number")


def in_line(text: str) -> str:
    """Return what somebody else wrote as part of a one-line message."""
    return " ".join(text[:300].split())


@contextmanager
def reading(path: Path, flag: str) -> Iterator[None]:
    """Turn whatever a file of another form provokes into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{flag} {path}: {in_line(str(error.strerror or error))}") from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        CSVError,
        pa.ArrowException,
    ) as error:
        cause = in_line(f"{type(error).__name__}: {error}")
        raise UsageError(f"{flag} {path}: cannot be read as {path.suffix or 'what it should be'}: {cause}") from None
