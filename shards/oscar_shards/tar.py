"""The members of a tar, found at the speed of the disk: headers are parsed, contents passed over or looked at in place.

Python's tarfile makes an object of everything and takes a quarter of a millisecond for the three members of a sample.
Here its header parser (`TarInfo.frombuf`) works on a window of the file that is read once into one buffer. A tar is
untrusted: no size that it names is believed before the file is seen to be that long.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from zlib import adler32

import xxhash

BLOCK = tarfile.BLOCKSIZE
WINDOW = 4 << 20  # bytes read at once; larger than nearly every sample, small enough for a processor's cache
ADLER = 65521
HEADER_LIMIT = 64 << 10  # bytes of one extended header (a name, as a rule)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


class TarFault(ValueError):
    """A tar is not what it should be; `offset` is the byte where that shows."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


class Header(NamedTuple):
    """What a header says, extended ones not considered."""

    name: str
    size: int
    type: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: `begin` is the offset of its first header, `data` that of its content, both in bytes."""

    name: str
    begin: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """The offset after its padding, where the next header is."""
        return self.data + -(-self.size // BLOCK) * BLOCK


class Window:
    """A file, seen through one buffer that is used again and again: fresh memory costs more than reading."""

    def __init__(self, path: Path, capacity: int = WINDOW) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._handle).st_size
        self._buffer = memoryview(bytearray(min(capacity, max(self.size, BLOCK))))
        self.capacity = len(self._buffer)  # the most bytes that can be viewed at once
        self._begin = self._end = 0
        self.mark = 0  # from this byte on, what was seen is kept in sight where the window is large enough

    def __enter__(self) -> "Window":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def view(self, offset: int, count: int) -> memoryview:
        """Return `count` bytes at `offset`; they are valid until the next call.

        Raises:
            TarFault: the file ends before, or `count` is more than the capacity.
        """
        if count > self.capacity:
            raise TarFault(offset, f"{count:,} bytes in one piece; at most {self.capacity:,} are looked at")
        if offset < self._begin or offset + count > self._end:
            begin = self.mark if self.mark <= offset and offset + count <= self.mark + self.capacity else offset
            read = os.preadv(self._handle, [self._buffer], begin)
            self._begin, self._end = begin, begin + read
            if offset + count > self._end:
                raise TarFault(self._end, f"the file ends after {self._end:,} bytes, in the middle of something")
        return self._buffer[offset - self._begin : offset - self._begin + count]

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes from `begin` to `end` in pieces that fit the window."""
        while begin < end:
            count = min(end - begin, self.capacity)
            yield self.view(begin, count)
            begin += count

    def xxh3(self, *ranges: tuple[int, int]) -> int:
        """Return the XXH3-64 of the bytes of some (begin, end), one after the other."""
        if len(ranges) == 1 and ranges[0][1] - ranges[0][0] <= self.capacity:
            begin, end = ranges[0]
            return int(xxhash.xxh3_64_intdigest(self.view(begin, end - begin)))
        digest = xxhash.xxh3_64()
        for begin, end in ranges:
            for piece in self.pieces(begin, end):
                digest.update(piece)
        return int(digest.intdigest())


def members(window: Window, offset: int = 0) -> Iterator[Member]:
    """Yield the files of a tar from a header at `offset` on, folders passed over, to the zeros at its end.

    Plain, GNU and pax headers are read.

    Raises:
        TarFault: it is cut, a header is damaged, something follows its end, or a member is a link or a device, or would
            lie outside the folder that it is unpacked into.
    """
    begin = offset
    told: dict[str, str] = {}  # by an extended header, of the member that follows
    while (header := _header(window, offset)) is not None:
        data, end = offset + BLOCK, offset + BLOCK + -(-header.size // BLOCK) * BLOCK
        if end > window.size:
            raise TarFault(window.size, f"cut off: {header.name!r} should end at byte {end:,} of {window.size:,}")
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            if header.size > HEADER_LIMIT:
                raise TarFault(offset, f"an extended header of {header.size:,} bytes; at most {HEADER_LIMIT:,}")
            content = bytes(window.view(data, header.size))
            if header.type == tarfile.GNUTYPE_LONGNAME:
                told["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type != tarfile.XGLTYPE:  # a global one has nothing about a single file
                told |= _pax(content, offset)
            offset = end
            continue
        if header.type == tarfile.DIRTYPE:
            offset, told, begin = end, {}, end
            continue
        name = told.get("path", header.name)
        if header.type not in tarfile.REGULAR_TYPES:
            raise TarFault(offset, f"{name!r} is a {'link' if header.type in LINKS else 'special file'}: refused")
        size = _size(told, header.size, offset)
        member = Member(_safe(name, offset), begin, data, size)
        if member.end > window.size:
            raise TarFault(window.size, f"cut off: {name!r} should end at byte {member.end:,} of {window.size:,}")
        yield member
        offset, told, begin = member.end, {}, member.end
    if told:
        raise TarFault(offset, "an extended header without a file")
    _check_end(window, offset)


def _header(window: Window, offset: int) -> Header | None:
    """Parse the header at `offset`; None for the block of zeros that begins a tar's end."""
    if offset + BLOCK > window.size:
        raise TarFault(window.size, "cut off: the file ends without the two blocks of zeros that end a tar")
    block = window.view(offset, BLOCK).tobytes()
    if (plain := _plain(block)) is not None:
        return plain
    if not block.strip(b"\0"):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarFault(offset, f"no tar header at byte {offset:,} ({error})") from None
    if header.size < 0:
        raise TarFault(offset, f"a member of {header.size} bytes")
    return Header(header.name, header.size, header.type)


def _plain(block: bytes) -> Header | None:
    """Parse the header of a file as nearly all are; None if it is any other, for the library's thorough parser."""
    size, checksum = block[124:135], block[148:154]
    if block[156] != 0x30 or block[257:262] != b"ustar" or block[345] or not (size.isdigit() and checksum.isdigit()):
        return None
    try:
        if (_sum(block) - _sum(block[148:156]) + 8 * 0x20 - int(checksum, 8)) % ADLER:
            return None
        name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return Header(name, int(size, 8), tarfile.REGTYPE)
    except ValueError:  # 8 and 9 are digits, too
        return None


def _sum(block: bytes) -> int:
    """Return the sum of bytes modulo `ADLER`: the lower half of Adler-32 less 1, twenty times as fast as `sum`."""
    return (adler32(block) & 0xFFFF) - 1


def _pax(content: bytes, offset: int) -> dict[str, str]:
    """Return the records "length key=value\\n" of a pax header."""
    found = {}
    begin, whole = 0, len(content.rstrip(b"\0"))
    while begin < whole:
        length = content[begin : begin + 6].partition(b" ")[0]
        if not length.isdigit() or not len(length) + 3 <= int(length) <= whole - begin:
            raise TarFault(offset, "a damaged pax header")
        record = content[begin + len(length) + 1 : begin + int(length) - 1]
        key, _, value = record.partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        begin += int(length)
    return found


def _size(told: dict[str, str], size: int, offset: int) -> int:
    if "GNU.sparse.major" in told or "GNU.sparse.map" in told:
        raise TarFault(offset, "a sparse file: refused")
    said = told.get("size", str(size))
    if not (said.isascii() and said.isdigit() and len(said) < 19):
        raise TarFault(offset, f"a member of {said[:40]!r} bytes")
    return int(said)


def _safe(name: str, offset: int) -> str:
    """Return a member's name without a leading "./", as `tar -c .` writes it."""
    plain = name[2:] if name.startswith("./") else name
    if plain.startswith("/") or "\0" in plain or ".." in plain.split("/"):
        raise TarFault(offset, f"{name!r} would lie outside the folder that it is unpacked into: refused")
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise TarFault(offset, f"{name!r} is not UTF-8: refused") from None
    return plain


def _check_end(window: Window, offset: int) -> None:
    """Check that from `offset` on there are two blocks of zeros at least, and nothing else."""
    if window.size - offset < 2 * BLOCK:
        raise TarFault(window.size, "cut off: a tar ends with two blocks of zeros, here is one")
    for piece in window.pieces(offset, window.size):
        if len(bytes(piece).rstrip(b"\0")):
            raise TarFault(offset, f"something follows the end of the tar at byte {offset:,}")
