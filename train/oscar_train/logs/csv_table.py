"""CSV files that a run adds rows to, and that a killed run leaves longer than its newest checkpoint knows."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from oscar_common.errors import UsageError
from oscar_common.files import replacing


class Table:
    """A CSV file whose first column is the step. last: the last row's step, -1 if there is no row."""

    def __init__(self, file: int, columns: tuple[str, ...], last: int) -> None:
        self._file, self.columns, self.last = file, columns, last

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append a row, which is in the file when this returns. None is an empty cell."""
        cells = [str(step), *(_cell(values[name]) for name in self.columns[1:])]
        os.write(self._file, (",".join(cells) + "\n").encode())
        self.last = step

    def settle(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._file)


@contextmanager
def open_table(path: Path, columns: Sequence[str], step: int) -> Iterator[Table]:
    """Open a table to go on after `step`: rows of later steps, which a killed run left, are cut off.

    Args:
        path: of the file, which is made if it is absent.
        columns: all of them, "step" first.
        step: the last that rows may have.

    Raises:
        UsageError: the file is there and has other columns.
    """
    last = _cut(path, tuple(columns), step)
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        yield Table(file, tuple(columns), last)
    finally:
        os.close(file)


def _cell(value: float | None) -> str:
    """Return a number as text. 9 digits give back every float32 exactly."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def _cut(path: Path, columns: tuple[str, ...], step: int) -> int:
    """Leave the header and the whole rows up to `step`, replacing the file at once; return the last row's step."""
    header = (",".join(columns) + "\n").encode()
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not header.startswith(lines[0]):
        raise UsageError(
            f"--out: {path} is not this command's: its columns are not {','.join(columns)}; move it away, or give "
            "another --out"
        )

    kept_lines = [line for line in lines[1:] if 0 <= _step(line, len(columns)) <= step]
    with replacing(path) as file:
        file.writelines([header, *kept_lines])

    return max((_step(line, len(columns)) for line in kept_lines), default=-1)


def _step(line: bytes, columns: int) -> int:
    """Return the step of a row, -1 if the row is not whole."""
    cells = line.split(b",")
    return int(cells[0]) if line.endswith(b"\n") and len(cells) == columns and cells[0].isdigit() else -1
