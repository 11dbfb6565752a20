"""The samples of a tar: which members are one image's, where their arrays lie, and what is wrong with them."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oscar_shards.tar import Member, TarFault, Window

JSON = "json"
BOXES, SCALES, FEATURES = "boxes.npy", "scales.npy", "features.npy"
USUAL = {JSON, BOXES, SCALES, FEATURES}
JSON_LIMIT = 4 << 20  # bytes of one image's JSON: a thousand regions with ten attributes each have less than one
NPY_LIMIT = 4 << 10  # bytes of an .npy header; the usual one has 128
PICKLED = re.compile(r"(^|\.)(pkl|pickle|pyd|pth|pt)$")  # what stock webdataset hands to pickle


class Span(NamedTuple):
    """An array in a tar: the offset and size of its raw bytes (after the .npy header), its shape and dtype."""

    begin: int
    size: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.begin + self.size


@dataclass
class Entry:
    """One image of a tar. `begin` and `end` are the bytes of all its headers, members and padding.

    faults: what is wrong with it, in plain words; then some of the others may be missing.
    """

    key: str
    begin: int
    end: int
    json: Member | None = None
    boxes: Span | None = None
    scales: Span | None = None  # only where features are int8
    features: Span | None = None
    faults: list[str] = field(default_factory=list)

    def frame(self) -> list[tuple[int, int]]:
        """Return the (begin, end) of all its bytes that belong to no array: headers, JSON, padding."""
        inner = sorted(s for s in (self.boxes, self.scales, self.features) if s)
        edges = [self.begin, *(edge for s in inner for edge in (s.begin, s.end)), self.end]
        return list(zip(edges[::2], edges[1::2], strict=True))


def entries(window: Window, tar_members: Iterator[Member]) -> Iterator[Entry]:
    """Group the members of a tar by key, as webdataset does: the name up to the first dot of its last part.

    Raises:
        TarFault: see `oscar_shards.tar.members`.
    """
    group: list[Member] = []
    last = ""
    try:
        for member in tar_members:
            key = _key(member)
            if group and key != last:
                yield _entry(window, last, group)
                group.clear()

            if not group:
                window.mark = member.begin

            group.append(member)
            last = key
    except TarFault:
        if len(group) >= len((JSON, BOXES, FEATURES)):  # what is damaged is the next one
            yield _entry(window, last, group)
        raise

    if group:
        yield _entry(window, last, group)


def _key(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _entry(window: Window, key: str, group: list[Member]) -> Entry:
    entry = Entry(key, group[0].begin, group[-1].end)
    by_extension = {m.name[len(key) + 1 :]: m for m in group}
    if len(by_extension) < len(group):
        entry.faults.append("a member occurs twice: two images under one key")

    if not by_extension.keys() <= USUAL:
        entry.faults.extend(f"{m.name}: a pickle is refused" for e, m in by_extension.items() if PICKLED.search(e))

    entry.json = by_extension.get(JSON)
    if entry.json is not None and entry.json.size > JSON_LIMIT:
        entry.faults.append(f"{JSON} of {entry.json.size:,} bytes; at most {JSON_LIMIT:,}")
        entry.json = None

    for extension in (BOXES, SCALES, FEATURES):
        if extension in by_extension:
            try:
                setattr(entry, extension.partition(".")[0], _span(window, by_extension[extension]))
            except ValueError as error:
                entry.faults.append(f"{extension}: {error}")

    entry.faults.extend(_missing(entry, by_extension))
    if not entry.faults:
        entry.faults.extend(_contradictions(entry))

    return entry


def _missing(entry: Entry, by_extension: dict[str, Member]) -> Iterator[str]:
    for extension in (JSON, BOXES, FEATURES):
        if extension not in by_extension:
            dotted = [m.name for e, m in by_extension.items() if e.endswith(f".{extension}")]
            why = f"; {dotted[0]} belongs to it because a key ends at the first dot" if dotted else ""
            yield f"no {extension}{why}"


def _contradictions(entry: Entry) -> Iterator[str]:
    """Say what is not the contract's: boxes float32 [K, 4], features float16 [K, P] or int8 with scales float32 [K]."""
    assert entry.boxes
    assert entry.features
    k = entry.boxes.shape[0] if entry.boxes.shape else -1
    if entry.boxes.dtype != "<f4" or entry.boxes.shape != (k, 4):
        yield f"{BOXES} is {entry.boxes.dtype} {list(entry.boxes.shape)}, not <f4 [K, 4]"

    if entry.features.dtype not in ("<f2", "|i1") or len(entry.features.shape) != 2 or entry.features.shape[0] != k:
        yield f"{FEATURES} is {entry.features.dtype} {list(entry.features.shape)}, not <f2 or |i1 [{k}, P]"
    elif (entry.features.dtype == "|i1") != (entry.scales is not None):
        yield f"{FEATURES} is {entry.features.dtype} {'without' if entry.scales is None else 'with'} {SCALES}"

    if entry.scales is not None and (entry.scales.dtype != "<f4" or entry.scales.shape != (k,)):
        yield f"{SCALES} is {entry.scales.dtype} {list(entry.scales.shape)}, not <f4 [{k}]"


def _span(window: Window, member: Member) -> Span:
    """Read an .npy header, and see that the array has just the bytes that are there.

    Raises:
        ValueError: it is none, or an array of Python objects, or in Fortran order, or of another size.
    """
    start = bytes(window.view(member.data, min(member.size, 12)))
    if start[:6] != b"\x93NUMPY" or len(start) < 12 or start[6] not in (1, 2):
        raise ValueError("no .npy file of version 1 or 2")

    width = 2 if start[6] == 1 else 4
    length = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    if length > min(member.size, NPY_LIMIT):
        raise ValueError(f"an .npy header of {length:,} bytes; at most {NPY_LIMIT:,}")

    shape, dtype = parse_npy_header(bytes(window.view(member.data, length)))
    size = prod(shape) * np.dtype(dtype).itemsize
    if size != member.size - length:
        raise ValueError(f"{dtype} {list(shape)} has {size:,} bytes, not {member.size - length:,}")

    return Span(member.data + length, size, shape, dtype)


@lru_cache(maxsize=4096)
def parse_npy_header(header: bytes) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of an .npy header; there are few different ones, and parsing one takes long.

    Raises:
        ValueError: it is damaged, or an array of Python objects, or in Fortran order.
    """
    start = 10 if header[6] == 1 else 12
    try:
        header_fields = ast.literal_eval(header[start:].decode("latin1").strip())
        shape, fortran, dtype = (
            header_fields["shape"],
            header_fields["fortran_order"],
            np.dtype(str(header_fields["descr"])),
        )
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError) as error:
        raise ValueError(f"a damaged .npy header ({type(error).__name__})") from None

    if dtype.hasobject or dtype.names or dtype.subdtype:
        raise ValueError(f"an array of {dtype} is refused; allowed are plain numbers")
    if not isinstance(shape, tuple) or any(type(n) is not int or not 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"a shape of {str(shape)[:80]}")
    if fortran and len(shape) > 1 and min(shape) > 1:
        raise ValueError("in Fortran order; the contract has C order")

    return shape, dtype.str


def array(window: Window, span: Span) -> npt.NDArray[Any]:
    """Return an array of a tar, in place if it fits the window: valid until that moves.

    Raises:
        TarFault: it is cut.
    """
    fits = span.size <= window.capacity
    content = window.view(span.begin, span.size) if fits else window.content(span.begin, span.end)
    return np.frombuffer(content, span.dtype).reshape(span.shape)
