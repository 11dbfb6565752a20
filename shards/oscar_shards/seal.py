"""A checksum that covers every byte of a file: the XXH3-128 of all its bytes except the seal's own.

In a Parquet file, the seal is an entry in the footer's metadata, which other readers ignore. In manifest.json, it is
the last key, and the file must be exactly what `json.dumps` makes of its content.

If a folder's manifest has a seal, all its files do. Older versions wrote none; `verify` says which files that leaves
uncovered.
"""

import json
import re
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_128, xxh3_128_hexdigest

NAME = "oscar.seal"
BLANK = b"0" * 32  # what is hashed in the seal's place
PIECE = 1 << 20  # bytes that are hashed at once
PARQUET = b"PAR1"  # how a file ends
FRAME = b"\x18\x20"  # in a Parquet footer, between a key and a value of 32 bytes
BROKEN = "its seal does not fit its bytes: they were changed or damaged"


def write_sealed(table: pa.Table, file: BinaryIO, *, row_group_size: int | None = None, **options: Any) -> None:
    """Write a table as a Parquet file with a seal; the bytes are a function of the table and the options alone."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=row_group_size)
        leave_room(writer)

    content = memoryview(sink.getvalue())
    begin, _ = _find(bytes(content[len(content) - _footer(content[-8:]) :]), len(content))
    file.write(content[:begin])
    file.write(xxh3_128_hexdigest(content).encode())
    file.write(content[begin + len(BLANK) :])


def leave_room(writer: pq.ParquetWriter) -> None:
    """Leave room for a seal in a file that is written piece by piece; `stamp` puts it there when the file is closed."""
    writer.add_key_value_metadata({NAME: BLANK})


def stamp(path: Path) -> None:
    """Put the seal into a file that has room for it."""
    with path.open("r+b") as file:
        begin, digest = _digest(file)
        file.seek(begin)
        file.write(digest.encode())


def broken(path: Path) -> bool | None:
    """Tell whether a Parquet file is not what its seal says; None if it has none.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.seek(0, 2) < len(PARQUET) or _last(file, len(PARQUET)) != PARQUET:
            return True

        try:
            begin, digest = _digest(file)
        except LookupError:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:  # one of the two is left of a damaged one
                return True if re.search(re.escape(NAME).encode() + b"|" + FRAME + rb"[0-9a-f]{32}", content) else None

        file.seek(begin)
        return file.read(len(BLANK)) != digest.encode()


def _digest(file: BinaryIO) -> tuple[int, str]:
    """Return where the seal is, and what it must be.

    Raises:
        LookupError: there is none.
    """
    size = file.seek(0, 2)
    begin, end = _find(_last(file, _footer(_last(file, 8))), size)

    content = xxh3_128()

    for piece in _pieces(file, 0, begin):
        content.update(piece)

    content.update(BLANK)
    for piece in _pieces(file, end, size):
        content.update(piece)

    return begin, content.hexdigest()


def _last(file: BinaryIO, count: int) -> bytes:
    """Return the last bytes of a file, at most `count`."""
    size = file.seek(0, 2)
    file.seek(max(0, size - count))
    return file.read(count)


def _pieces(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    for at in range(begin, end, PIECE):
        yield file.read(min(PIECE, end - at))


def _footer(end: bytes | memoryview) -> int:
    """Return how many bytes a Parquet file's footer has, of its last eight bytes."""
    return int.from_bytes(end[:4], "little") + 8


def _find(footer: bytes, size: int) -> tuple[int, int]:
    """Return where in a file of `size` bytes the seal begins and ends.

    Raises:
        LookupError: there is none.
    """
    at = footer.rfind(NAME.encode() + FRAME)
    if at < 0:
        raise LookupError(NAME)
    begin = size - len(footer) + at + len(NAME) + len(FRAME)
    return begin, begin + len(BLANK)


def sealed_json(content: dict[str, Any]) -> bytes:
    """Return a file's content with its seal as the last key."""
    plain = {name: value for name, value in content.items() if name != "seal"}
    return _as_json({**plain, "seal": xxh3_128_hexdigest(_as_json(plain))})


def broken_json(raw: bytes) -> bool | None:
    """Tell whether a JSON file is not what its seal says; None if it has none."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return True

    if not isinstance(content, dict) or content.get("seal") is None:
        return None

    return sealed_json(content) != raw


def _as_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
