"""The lines of TSV files that are too large to be loaded: where each begins and ends, and what its first field is."""

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from oscar_shards.formats.fields import Ints, Refused, Vocabulary

SPAN = np.dtype([("file", "<i4"), ("line", "<i8"), ("begin", "<i8"), ("end", "<i8")])  # line: counted from 1
LINE_LIMIT = 64 << 20  # bytes; 100 regions of 2,054 numbers have a million
NAME_LIMIT = 1 << 10  # bytes of a first field
BLOCK = 8 << 20
Spans = npt.NDArray[np.void]  # of the dtype SPAN


@dataclass(frozen=True, kw_only=True)
class LineRows:
    """Images that are a line of a file each: what `oscar_shards.formats.rows.Rows` asks for and is alike in all."""

    paths: list[Path]
    ids: list[str]
    sources: list[str]
    spans: Spans
    vocabulary: Vocabulary
    notes: list[str]

    @property
    def file(self) -> Ints:
        """Which of `paths` has each image."""
        return self.spans["file"].astype(np.int64)

    def name(self, row: int) -> str:
        """Return the id of an image, or FILE:LINE where it has none."""
        return self.ids[row] or f"{self.paths[int(self.spans[row]['file'])].name}:{self.spans[row]['line']}"


class Lines:
    """Files that are read line by line, at their offsets; `paths` are what the field `file` of a span counts."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._handles: dict[int, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, span: np.void) -> bytes:
        """Return a line without its end.

        Raises:
            Refused: it is too long, or the file is shorter, or its `.lineidx` passed over the end of a line.
        """
        file, size = int(span["file"]), int(span["end"] - span["begin"])
        if size > LINE_LIMIT:
            raise Refused("too-long", f"a line of {size:,} bytes; at most {LINE_LIMIT:,} are read")

        if file not in self._handles:
            self._handles[file] = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, self._handles[file])

        line = os.pread(self._handles[file], size, int(span["begin"]))
        if len(line) < size:
            raise Refused("truncated", f"the file ends at byte {span['begin'] + len(line):,}, in the middle of a line")

        line = line[: -2 if line.endswith(b"\r\n") else -1 if line.endswith(b"\n") else size]
        if b"\n" in line:
            raise Refused("lines", "several lines where the .lineidx says one; delete that file, it is of another TSV")

        return line

    def name(self, span: np.void) -> str:
        """Return FILE:LINE, for people."""
        return f"{self._paths[int(span['file'])].name}:{span['line']}"


def index_lines(path: Path, file: int) -> tuple[Spans, list[str]]:
    """Return the spans of a file's lines, and their first fields ("" if there is none); blank lines are passed over.

    The offsets are those of the `.lineidx` beside the file if these are beginnings of lines, the last one of the last
    line; else the file is read once.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as handle:
        begins = _offsets(path.with_suffix(".lineidx"), size)
        heads = None if begins is None else _heads_at(handle.fileno(), begins)
        if begins is None or heads is None or not _is_last(handle.fileno(), begins[-1], size):
            begins, heads = _scan(handle.fileno(), size)

    spans = np.zeros(len(begins), SPAN)
    spans["file"], spans["line"], spans["begin"] = file, np.arange(1, len(begins) + 1), begins
    spans["end"] = [*begins[1:], size]
    kept = np.array([not head.startswith((b"\n", b"\r\n")) for head in heads], bool)

    return spans[kept], [_name(head) for head, keep in zip(heads, kept, strict=True) if keep]


def _offsets(path: Path, size: int) -> list[int] | None:
    """Return what a `.lineidx` says, if it can be one of a file of so many bytes."""
    try:
        if path.stat().st_size > 2 * size + BLOCK:
            return None
        offsets = list(map(int, path.read_bytes().split()))
    except (OSError, ValueError):
        return None

    is_sorted = all(a < b for a, b in itertools.pairwise(offsets))
    return offsets if offsets and offsets[0] == 0 and is_sorted and offsets[-1] < size else None


def _heads_at(handle: int, begins: list[int]) -> list[bytes] | None:
    """Return the first bytes of the lines that begin at `begins`; None if one of them is no beginning."""
    heads = []
    for begin in begins:
        around = os.pread(handle, 64, begin - 1) if begin else b"\n" + os.pread(handle, 63, 0)
        if around[:1] != b"\n":
            return None

        head = around[1:]
        if b"\t" not in head and b"\n" not in head:
            head = os.pread(handle, NAME_LIMIT, begin)

        heads.append(head)

    return heads


def _is_last(handle: int, begin: int, size: int) -> bool:
    """Whether the line at `begin` ends with the file."""
    for offset in range(begin, size, BLOCK):
        newline = os.pread(handle, BLOCK, offset).find(b"\n")
        if newline >= 0:
            return offset + newline == size - 1
    return True


def _scan(handle: int, size: int) -> tuple[list[int], list[bytes]]:
    """Read a file from beginning to end and return where its lines begin, and the first bytes of each."""
    begins, heads = [], []
    for begin in _beginnings(handle, size):
        begins.append(begin)
        heads.append(os.pread(handle, NAME_LIMIT, begin))  # just read: it comes from memory
    return begins, [head[: head.find(b"\t") + 1 or None] for head in heads]


def _beginnings(handle: int, size: int) -> Iterator[int]:
    if size:
        yield 0

    for offset in range(0, size, BLOCK):
        block = os.pread(handle, BLOCK, offset)
        newline = block.find(b"\n")
        while newline >= 0:
            if offset + newline + 1 < size:
                yield offset + newline + 1
            newline = block.find(b"\n", newline + 1)


def _name(head: bytes) -> str:
    name, tab, _ = head.partition(b"\n")[0].partition(b"\t")
    try:
        return name.decode().strip() if tab else ""
    except UnicodeDecodeError:
        return ""
