"""What lies in a tar: names, offsets and sizes of its plain files, several times as fast as tarfile says it.

Corpora come as tens of millions of members. Formats: ustar, GNU's and pax (POSIX.1-2001), and the one before them.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from tarfile import ReadError

BLOCK = 512
ZEROS = bytes(BLOCK)
WINDOW = 4096  # bytes read at once: a header, and often the small files after it
AHEAD_BYTES = 1 << 20  # a header that says a file's long name is smaller
PLAIN = b"0\0007"
WITHOUT_DATA = b"123456"  # links, devices, folders, pipes


class Window:
    """A file that is read in small steps forward."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)
        self.length = os.fstat(self.handle).st_size
        self.start, self.held = 0, b""

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def read(self, at: int, size: int) -> bytes:
        """Return `size` bytes from `at` on, fewer at the end of the file."""
        begin = at - self.start
        if begin < 0 or begin + size > len(self.held):
            self.start, self.held, begin = at, os.pread(self.handle, max(size, WINDOW), at), 0
        return self.held[begin : begin + size]


def members(file: Window) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each plain file in a tar that is there to its end; hidden ones are left out.

    Raises:
        ReadError: it ends before its end mark: it was cut off, or overwritten in the middle; or it is no tar.
    """
    at = 0
    ahead: dict[str, str] = {}  # what headers before a file's own say of it
    while (header := file.read(at, BLOCK)) != ZEROS:
        _check(header, at)
        kind, start, size = header[156], at + BLOCK, int(ahead.get("size") or _number(header[124:136]))
        if kind == ord("S"):
            raise ReadError(f"a sparse file at byte {at}; write the tar without --sparse")
        if kind in WITHOUT_DATA:
            size = 0
        if size < 0 or start + size > file.length:
            raise ReadError(f"cut off in the file at byte {at}")
        at = start + -(-size // BLOCK) * BLOCK
        if kind in b"xL":
            if size > AHEAD_BYTES:
                raise ReadError(f"a header of {size} bytes at byte {start - BLOCK}")
            ahead |= _ahead(kind, file.read(start, size))
        elif kind not in b"gK":
            name = ahead.get("path") or _name(header)
            visible = not name.endswith("/") and not os.path.basename(name).startswith(".")
            if kind in PLAIN and visible and "sparse" not in ahead:
                yield name, start, size
            ahead = {}


def _check(header: bytes, at: int) -> None:
    if len(header) < BLOCK:
        raise ReadError(f"no end mark after byte {at}")
    if header[257:262] == b"ustar":  # spares the sum, which takes longer than all else
        return
    said = _number(header[148:156])
    rest = header[:148] + header[156:]
    if said != 256 + sum(rest) and said != 256 + sum(rest) - 256 * sum(byte > 127 for byte in rest):
        raise ReadError("no tar" if at == 0 else f"no header at byte {at}")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's way to say large numbers
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _ahead(kind: int, data: bytes) -> dict[str, str]:
    """Return path, size and whether it is sparse, as far as a header says that of the file after it."""
    if kind == ord("L"):
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits[:9]) <= len(data):
            raise ReadError("a damaged pax header")
        record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        name, _, value = record.partition(b"=")
        if name.startswith(b"GNU.sparse"):
            found["sparse"] = "yes"
        elif name == b"path" or (name == b"size" and value.isdigit() and len(value) < 20):
            found[name.decode()] = value.decode("utf-8", "surrogateescape")
    return found
