"""Text files as people write them: UTF-8, or UTF-16 with a byte-order mark; lines of any system; tables and JSON.

Nothing is guessed and nothing replaced: what is in another encoding is refused with the line to convert it by.
"""

import codecs
import csv
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from oscar_common.errors import UsageError, reason, shorten

CHUNK = 1 << 20  # bytes read at once; the first of them tell encoding and line ends
HEAD = 1 << 12  # bytes that tell UTF-16 without a mark
MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


class NotText(ValueError):
    """Bytes that are no text in UTF-8 or marked UTF-16. `encoding`: what they may be in, as iconv calls it, or ""."""

    def __init__(self, what: str, encoding: str) -> None:
        super().__init__(what)
        self.encoding = encoding


def decode(content: bytes) -> str:
    """Return a text without its byte-order mark.

    Raises:
        NotText: it is neither UTF-8 nor UTF-16 with a byte-order mark.
    """
    return "".join(filter(None, _decoded([content])))  # of a single piece, no copy


def read_text(path: Path, flag: str) -> str:
    """Read a text file, line ends as they are.

    Raises:
        OSError: it cannot be read.
        UsageError: it is neither UTF-8 nor UTF-16 with a byte-order mark.
    """
    try:
        return decode(path.read_bytes())
    except NotText as error:
        raise refusal(path, flag, error) from None


def lines(path: Path, flag: str) -> Iterator[str]:
    r"""Yield the lines of a text file without their ends: \n, \r\n, or, in a file without any \n, \r.

    Nothing else ends a line, whatever Unicode says of it: captions may hold U+2028, U+0085 or a form feed.

    Raises:
        OSError, UsageError: see `read_text`.
    """
    return (line.rstrip("\r\n") for line in _raw_lines(path, flag))


def split_lines(text: str) -> list[str]:
    """Return the lines of a text; see `lines`."""
    return [line.rstrip("\r\n") for line in _split([text])]


def json_lines(path: Path, flag: str) -> Iterator[Any]:
    """Yield what the lines of a .jsonl file hold; empty ones are left out.

    Raises:
        OSError, UsageError: see `read_text`; or a line is not JSON.
    """
    for number, line in enumerate(lines(path, flag), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UsageError(f"{flag} {path}: line {number} is not JSON: {reason(error)}") from None


def read_json(path: Path, flag: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file.

    Raises:
        OSError, UsageError: see `read_text`.
        ValueError, RecursionError: it is not JSON.
    """
    return json.loads(read_text(path, flag), object_hook=object_hook)


def table_rows(path: Path, flag: str, *, ragged: bool = False) -> Iterator[list[str]]:
    """Yield the rows of a .tsv or .csv file that are not empty; the first, a header or not, says how wide they are.

    With `ragged` each may be as wide as it likes.

    A .tsv file has a row a line and no quoting: a quotation mark is a character like any other. A .csv file is as
    RFC 4180 has it: fields in quotes may hold commas, line breaks, and quotation marks written twice.

    Raises:
        OSError, UsageError: see `read_text`; or a row is not CSV, or has more cells than the first.
    """
    width = 0
    for number, row in (_tsv_rows if path.suffix.lower() == ".tsv" else csv_rows)(path, flag):
        if not any(row):
            continue

        width = width or len(row)
        if not ragged and len(row) > width and any(row[width:]):
            mark, instead = ("tab", "write it as a space") if path.suffix.lower() == ".tsv" else ("comma", "quote it")
            raise UsageError(
                f"{flag} {path}: line {number} has {len(row)} cells, the first row {width}; if a text has a {mark} in "
                f"it, {instead}"
            )

        yield row


def csv_rows(path: Path, flag: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a file in CSV as RFC 4180 has it, each with the number of its first line.

    Raises:
        OSError, UsageError: see `read_text`; or a row is not CSV.
    """
    rows = csv.reader(_raw_lines(path, flag), strict=True)
    number = 1
    try:
        for row in rows:
            yield number, row
            number = rows.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{flag} {path}: the row at line {number} is not CSV ({error}): a field with a comma, quotation mark or "
            "line break stands in quotation marks, and each of its own is written twice"
        ) from None


def refusal(path: Path, flag: str, error: NotText) -> UsageError:
    """Return what to say of a file that is no text, and what to do about it."""
    old, new = (shlex.quote(str(name)) for name in (path, path.with_name(f"{path.stem}.utf8{path.suffix}")))
    command = f": iconv -f {error.encoding} -t utf-8 {old} > {new}" if error.encoding else ""
    return UsageError(f"{flag} {path}: {error}; convert it to UTF-8{command}")


def _tsv_rows(path: Path, flag: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines(path, flag), 1):
        yield number, line.split("\t")


def _raw_lines(path: Path, flag: str) -> Iterator[str]:
    """Yield the lines of a text file with their ends."""
    with path.open("rb") as file:
        try:
            yield from _split(_decoded(iter(partial(file.read, CHUNK), b"")))
        except NotText as error:
            raise refusal(path, flag, error) from None


def _split(texts: Iterable[str]) -> Iterator[str]:
    end = ""
    pieces: list[str] = []  # of the line that is not whole yet
    for text in texts:
        end = end or ("\r" if "\r" in text and "\n" not in text else "\n")
        first, *rest = text.split(end)
        pieces.append(first)
        if rest:
            yield "".join(pieces) + end
            yield from (line + end for line in rest[:-1])
            pieces = rest[-1:]

    if last := "".join(pieces):
        yield last


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of each chunk; the first must be as long as `HEAD`, if there is as much."""
    decoder, encoding, text, before = None, "", "", 0
    try:
        for chunk in chain(chunks, [b""]):
            if decoder is None:
                encoding, chunk = _begun(chunk)
                decoder = codecs.getincrementaldecoder(encoding)()
            before += text.count("\n") or text.count("\r")
            text = decoder.decode(chunk, final=not chunk)
            yield text
    except UnicodeDecodeError as error:
        raise _fault(error, encoding, text, before) from None


def _begun(head: bytes) -> tuple[str, bytes]:
    """Return the encoding of a text that begins so, and its first bytes without the mark."""
    mark, encoding = next(((mark, name) for mark, name in MARKS if head.startswith(mark)), (b"", "utf-8"))
    if encoding == "utf-32":
        raise NotText("it is in UTF-32", encoding)

    beginning = head[:HEAD]
    even, odd = beginning[::2].count(0), beginning[1::2].count(0)
    if not mark and max(even, odd) > len(beginning) // 4 > 2 * min(even, odd):
        guess = "utf-16le" if odd > even else "utf-16be"
        raise NotText("it seems to be in UTF-16, without the byte-order mark that would say so", guess)

    return encoding, head[len(mark) :]


def _fault(error: UnicodeDecodeError, encoding: str, last: str, before: int) -> NotText:
    """Return what is wrong with bytes that come after `before` lines, and those directly after the text `last`."""
    content = bytes(error.object)
    written = content[: error.start].decode(encoding)
    number = before + 1 + (written.count("\n") or written.count("\r"))
    tail = shorten(re.split(r"[\r\n]", last[-20:] + written)[-1][-20:])
    shown = f"byte 0x{content[error.start]:02x}" + (f" after {tail!r}" if tail else "")
    if encoding == "utf-8":
        return NotText(f"line {number} is not UTF-8 ({shown}); it may be Latin-1", "latin1")

    return NotText(f"line {number} is not the UTF-16 that its byte-order mark promises ({shown})", "")
