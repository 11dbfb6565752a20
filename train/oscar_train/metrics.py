"""What is logged of a run: metrics.csv, TensorBoard, and lines for people."""

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_train.sources import warn

FILE = "metrics.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step. All but `samples_per_second` are functions of the run's settings and shards.

    Losses before the update; epoch (from 0) is that of the step's first triple; grad_norm before it is clipped;
    skipped: triples that are in no loss because their image could not be read; skipped_steps: of the run so far.
    """

    step: int
    epoch: int
    loss: float
    mlm_loss: float
    match_loss: float
    mlm_accuracy: float
    match_accuracy: float
    lr: float
    grad_norm: float
    skipped: int
    skipped_steps: int
    samples_per_second: float


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
_TITLE = "     step     loss      MLM   acc.    match   acc.        lr  samples/s  ETA"
_HEADER = (",".join(COLUMNS) + "\n").encode()


class Log:
    """Writes rows to three places. A row is in the file when `add` returns; `settle` sees it to the disk."""

    def __init__(self, file: int, board: SummaryWriter, total: int, done: int) -> None:
        self._file, self._board, self._total = file, board, total
        self._console = Console(soft_wrap=True, highlight=False)
        self._began, self._done = time.monotonic(), done
        self._titled = not self._console.is_terminal

    def say(self, line: str) -> None:
        """Print one line for people."""
        self._console.print(line, markup=False)

    def add(self, row: Row) -> None:
        """Log one row."""
        values = dataclasses.asdict(row)
        # 9 digits give back every float32 exactly
        line = ",".join(str(v) if isinstance(v, int) else f"{v:.9g}" for v in values.values()) + "\n"
        os.write(self._file, line.encode())
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, row.step)
        self._print(row)

    def settle(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._file)
        self._board.flush()

    def _print(self, row: Row) -> None:
        pace = (time.monotonic() - self._began) / max(row.step - self._done, 1)
        eta = timedelta(seconds=round(pace * (self._total - row.step)))
        if not self._console.is_terminal:
            self.say(
                f"step {row.step}/{self._total}  loss {row.loss:.4f}  mlm {row.mlm_loss:.4f} ({row.mlm_accuracy:.1%})  "
                f"match {row.match_loss:.4f} ({row.match_accuracy:.1%})  lr {row.lr:.2e}  "
                f"{row.samples_per_second:.1f} samples/s  ETA {eta}"
            )
            return
        if not self._titled:
            self._console.print(_TITLE, style="bold")
            self._titled = True
        self.say(
            f"{row.step:>9} {row.loss:>8.4f} {row.mlm_loss:>8.4f} {row.mlm_accuracy:>6.1%} {row.match_loss:>8.4f} "
            f"{row.match_accuracy:>6.1%} {row.lr:>9.2e} {row.samples_per_second:>10.1f}  {eta}"
        )


@contextmanager
def open_log(out: Path, step: int, total: int, every: int) -> Iterator[Log]:
    """Open the logs of a run that goes on after `step`; rows of later steps, which a killed run left, are cut off.

    Rows of earlier steps that are missing, because somebody changed the file, are lost: that is only said.

    Raises:
        UsageError: metrics.csv is there but is not this command's.
    """
    last = _cut(out / FILE, step)
    if step - last >= every:
        warn(f"{out / FILE} ends at step {last}; the rows from there to step {step} are lost")
    file = os.open(out / FILE, os.O_WRONLY | os.O_APPEND)
    board = SummaryWriter(out / "tensorboard", purge_step=step + 1)
    try:
        yield Log(file, board, total, step)
    finally:
        os.close(file)
        board.close()


def _cut(path: Path, step: int) -> int:
    """Leave the header and the whole rows up to `step`, replacing the file at once; return the last row's step."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not _HEADER.startswith(lines[0]):
        raise UsageError(f"--out: {path} is not a file of oscar-train's; give another --out")
    kept = [line for line in lines[1:] if 0 < _step(line) <= step]
    with replacing(path) as file:
        file.writelines([_HEADER, *kept])
    return max(map(_step, kept), default=0)


def _step(line: bytes) -> int:
    """Return the step of a row, 0 if the row is not whole."""
    cells = line.split(b",")
    return int(cells[0]) if line.endswith(b"\n") and len(cells) == len(COLUMNS) and cells[0].isdigit() else 0
