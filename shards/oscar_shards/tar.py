"""The members of a tar, found at the speed of the disk: headers are parsed, contents passed over or looked at in place.

Python's tarfile makes an object of everything and takes a quarter of a millisecond for the three members of a sample.
Here its header parser (`TarInfo.frombuf`) works on a window of the file that is read once into one buffer. A tar is
untrusted: no size that it names is believed before the file is seen to be that long.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from zlib import adler32

import xxhash

BLOCK = tarfile.BLOCKSIZE
WINDOW = 4 << 20  # bytes read at once; larger than nearly every sample, small enough for a processor's cache
ADLER = 65521
HEADER_LIMIT = 1 << 20  # bytes of one extended header: a name as a rule, but macOS puts icons there
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# These have no content, whatever size they say
WITHOUT_DATA = frozenset({*LINKS, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE})
SILENT = frozenset({tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE})  # extended headers that say nothing of a single file
EXTENDED = SILENT | {tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}


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


class Member(NamedTuple):
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

    def content(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, also where these are more than the window has."""
        if end - begin <= self.capacity:
            return bytes(self.view(begin, end - begin))
        return b"".join(map(bytes, self.pieces(begin, end)))

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


def members(window: Window, offset: int = 0, foreign: bool = False) -> Iterator[Member]:
    """Yield the files of a tar from a header at `offset` on, folders passed over, to the zeros at its end.

    Plain, GNU and pax headers are read, and every header's checksum is checked. The name and size in an extended header
    have none in any format.

    foreign: the tar may hold anything that `tar` writes, and nobody unpacks it: links and devices are passed over too,
    names come as they are written, and one block of zeros ends it.

    Raises:
        TarFault: it is cut, a header is damaged, something follows its end, or a file is sparse; unless `foreign` also
            if a member is a link or a device, or would lie outside the folder that the tar is unpacked into.
    """
    begin = offset
    extended: dict[str, str] = {}  # by an extended header, of the member that follows
    while (header := _header(window, offset)) is not None:
        if header.type in EXTENDED:
            extended |= _told(window, header, offset)
            offset += BLOCK + -(-header.size // BLOCK) * BLOCK
            continue

        name = extended.get("path") or header.name
        if not foreign:
            name = _allowed(name, header.type, offset)

        size = 0 if header.type in WITHOUT_DATA else _size(extended, header, offset)
        member = Member(name, begin, offset + BLOCK, size)
        if member.end > window.size:
            raise TarFault(window.size, f"cut off: {name!r} should end at byte {member.end:,} of {window.size:,}")

        if header.type in tarfile.REGULAR_TYPES:
            yield member

        offset, extended, begin = member.end, {}, member.end

    if extended:
        raise TarFault(offset, "an extended header without a file")

    _check_end(window, offset, BLOCK if foreign else 2 * BLOCK)


def _told(window: Window, header: Header, offset: int) -> dict[str, str]:
    """Return what the extended header at `offset` says of the member that follows."""
    if header.type in SILENT:
        return {}
    if header.size > HEADER_LIMIT:
        raise TarFault(offset, f"an extended header of {header.size:,} bytes; at most {HEADER_LIMIT:,}")

    begin = offset + BLOCK
    content = window.content(begin, begin + header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}

    return _pax(content, offset)


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

    return Header(_name(block), header.size, header.type)


def _plain(block: bytes) -> Header | None:
    """Parse a header as nearly all are; None if it is any other, for the library's thorough parser."""
    size, checksum = block[124:135], block[148:154]
    if block[257:262] != b"ustar" or not block[156] or not (size.isdigit() and checksum.isdigit()):
        return None

    try:
        if (_sum(block) - _sum(block[148:156]) + 8 * 0x20 - int(checksum, 8)) % ADLER:
            return None
        return Header(_name(block), int(size, 8), block[156:157])
    except ValueError:  # 8 and 9 are digits, too
        return None


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":  # GNU's headers have times there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _sum(block: bytes) -> int:
    """Return the sum of bytes modulo `ADLER`: the lower half of Adler-32 less 1, twenty times as fast as `sum`."""
    return (adler32(block) & 0xFFFF) - 1


def _pax(content: bytes, offset: int) -> dict[str, str]:
    """Return the records "length key=value\\n" of a pax header."""
    records = {}
    begin, whole = 0, len(content.rstrip(b"\0"))
    while begin < whole:
        length = content[begin : begin + 8].partition(b" ")[0]
        if not length.isdigit() or not len(length) + 3 <= int(length) <= whole - begin:
            raise TarFault(offset, "a damaged pax header")

        record = content[begin + len(length) + 1 : begin + int(length)]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise TarFault(offset, "a damaged pax header")

        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        begin += int(length)

    return records


def _size(told: dict[str, str], header: Header, offset: int) -> int:
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in told):
        raise TarFault(offset, "a sparse file; write the tar without --sparse")
    if "size" not in told:
        return header.size

    size = told["size"]
    if not (size.isascii() and size.isdigit() and len(size) < 19):
        raise TarFault(offset, f"a member of {size[:40]!r} bytes")

    return int(size)


def _allowed(name: str, kind: bytes, offset: int) -> str:
    """Return a member's name without a leading "./", as `tar -c .` writes it."""
    if kind == tarfile.DIRTYPE:
        return name
    if kind not in tarfile.REGULAR_TYPES:
        raise TarFault(offset, f"{name!r} is a {'link' if kind in LINKS else 'special file'}: refused")

    plain = name[2:] if name.startswith("./") else name
    if plain.startswith("/") or "\0" in plain or ".." in plain.split("/"):
        raise TarFault(offset, f"{name!r} would lie outside the folder that it is unpacked into: refused")

    try:
        plain.encode()
    except UnicodeEncodeError:
        raise TarFault(offset, f"{name!r} is not UTF-8: refused") from None

    return plain


def _check_end(window: Window, offset: int, least: int) -> None:
    """Check that from `offset` on there are zeros, `least` of them, and nothing else."""
    if window.size - offset < least:
        raise TarFault(window.size, "cut off: a tar ends with two blocks of zeros, here is one")
    for piece in window.pieces(offset, window.size):
        if len(bytes(piece).rstrip(b"\0")):
            raise TarFault(offset, f"something follows the end of the tar at byte {offset:,}")
