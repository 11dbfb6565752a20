"""What is logged of a run: metrics.csv and evaluation.csv, the same numbers on boards, and lines for people."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from oscar_common.progress import duration, warn
from oscar_train.logs.csv_table import Table, open_table
from oscar_train.logs.trackers import Boards, open_boards

FILE, EVALUATION = "metrics.csv", "evaluation.csv"
MEASURED = ("samples_per_second", "tokens_per_second", "of_ceiling", "memory_gb", "data_wait")
RECENT = 20  # rows whose pace the rest is expected to have
FEW, FEW_SECONDS = 10, 30.0  # steps, or seconds of fewer, that tell a pace
LONG = 100 * 3600  # seconds from which on a time is said in days
PAGE = 40  # rows under a title


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step. All but the columns `MEASURED` are functions of the run's settings and shards.

    Losses before the update; epoch (from 0) is that of the step's first triple; grad_norm before it is clipped;
    skipped: triples that are in no loss because their image could not be read; skipped_steps: of the run so far.

    Measured, over the steps since the last row: triples, and tokens of text and regions, a second; of_ceiling: the
    model's floating-point operations a second, as a share of those of large matrix products here; data_wait: share of
    the time in which nothing but the stream was worked on. memory_gb (1e9 bytes): of a GPU the most that was allocated
    so far, on a CPU what the process has.
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
    tokens_per_second: float
    of_ceiling: float
    memory_gb: float
    data_wait: float


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
LOSSES = {name: name for name in ("mlm_loss", "match_loss", "mlm_accuracy", "match_accuracy")}
TITLES = {"mlm_loss": "mlm", "match_loss": "match"}  # of columns in the terminal; those of accuracies are all one


class Log:
    """Writes rows to files and boards, and prints them.

    A row is in its file when `add` or `add_evaluation` returns; `settle` sees it to the disk.

    shown: which of the columns `LOSSES` there are, and what they are called.
    """

    def __init__(
        self,
        rows: Table,
        evaluations: Table | None,
        boards: Boards,
        total: int,
        shown: Mapping[str, str] = MappingProxyType(LOSSES),
    ) -> None:
        self._rows, self._evaluations, self._boards, self._total = rows, evaluations, boards, total
        self._shown = shown
        self._console = Console(soft_wrap=True, highlight=False)
        self._marks: deque[tuple[float, int]] = deque(maxlen=RECENT + 1)
        self._printed = 0

    @property
    def evaluated(self) -> int:
        """The last step that has an evaluation, -1 if there is none."""
        return -1 if self._evaluations is None else self._evaluations.last

    def say(self, line: str) -> None:
        """Print one line for people."""
        self._console.print(line, markup=False)

    def add(self, row: Row) -> None:
        """Log one row."""
        values = {name: getattr(row, column) for column, name in _columns(self._shown).items()}
        del values["step"]
        self._rows.add(row.step, values)
        self._boards.show(values, row.step)
        self._print(row)

    def add_evaluation(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Log what an evaluation after a step came to, and print `line`. NaN means that there was nothing to measure.

        `values` has the names that the log was opened for.
        """
        assert self._evaluations is not None
        finite = {name: value for name, value in values.items() if not math.isnan(value)}
        self._evaluations.add(step, {**dict.fromkeys(values), **finite})
        self._boards.show({f"eval/{name}": value for name, value in finite.items()}, step)
        self.say(line)

    def settle(self) -> None:
        """Wait until all rows are on the disk."""
        self._rows.settle()
        if self._evaluations is not None:
            self._evaluations.settle()
        self._boards.flush()

    def _print(self, row: Row) -> None:
        self._marks.append((time.monotonic(), row.step))
        if self._printed % PAGE == 0:
            self._console.print(_title(self._total, self._shown), style="bold")
        self._printed += 1
        self.say(f"{_line(row, self._total, self._shown)}  {self._left(row.step)}")

    def _left(self, step: int) -> str:
        """Return the time to the end at the recent pace, or a dash until there is one."""
        (began, first), (now, last) = self._marks[0], self._marks[-1]
        if not is_pace(last - first, now - began):
            return "-"
        seconds_left = (now - began) / (last - first) * (self._total - step)
        return str(timedelta(seconds=round(seconds_left))) if seconds_left < LONG else duration(seconds_left)


def is_pace(steps: int, seconds: float) -> bool:
    """Whether so many steps, in so many seconds, tell how fast the others will be."""
    return steps >= FEW or (steps > 0 and seconds >= FEW_SECONDS)


def _columns(shown: Mapping[str, str]) -> dict[str, str]:
    """Return what the columns of a row are called, of those that there are."""
    return {column: shown.get(column, column) for column in COLUMNS if column not in LOSSES or column in shown}


def _title(total: int, shown: Mapping[str, str]) -> str:
    losses = "".join(f" {TITLES.get(column, 'acc.'):>{7 if column in TITLES else 5}}" for column in _ordered(shown))
    return f"{'':{len(_step(total, total))}} {'loss':>7}{losses} {'lr':>8} {'samples/s':>9} {'memory':>8} wait  ETA"


def _line(row: Row, total: int, shown: Mapping[str, str]) -> str:
    losses = "".join(
        f" {getattr(row, column):>7.4f}" if column in TITLES else f" {getattr(row, column):>5.1%}"
        for column in _ordered(shown)
    )
    return (
        f"{_step(row.step, total)} {row.loss:>7.4f}{losses} {row.lr:>8.2e} {row.samples_per_second:>9.1f} "
        f"{row.memory_gb:>5.2f} GB {row.data_wait:>4.0%}"
    )


def _ordered(shown: Mapping[str, str]) -> list[str]:
    """Return the columns in the order of the terminal: each loss before its accuracy."""
    return [column for column in ("mlm_loss", "mlm_accuracy", "match_loss", "match_accuracy") if column in shown]


def _step(step: int, total: int) -> str:
    return f"step {step:>{len(str(total))}}/{total}"


@contextmanager
def open_log(
    out: Path,
    step: int,
    total: int,
    every: int,
    *,
    shown: Mapping[str, str] = MappingProxyType(LOSSES),
    evaluation: Sequence[str] = (),
    wandb: str | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Log]:
    """Open the logs of a run that goes on after `step`; rows of later steps, which a killed run left, are cut off.

    Rows of earlier steps that are missing, because somebody changed the file, are lost: that is only said.

    Args:
        out: the run folder.
        step: the last that is done.
        total: how many there are to be.
        every: steps between rows.
        shown: see `Log`.
        evaluation: names of what an evaluation finds; none if there is no evaluation.
        wandb: project at Weights & Biases.
        config: what it shows as the run's settings.

    Raises:
        UsageError: metrics.csv or evaluation.csv is there but is not this command's, or Weights & Biases refuses.
    """
    question_sets = open_table(out / EVALUATION, ("step", *evaluation), step) if evaluation else nullcontext()
    with open_table(out / FILE, tuple(_columns(shown).values()), step) as rows, question_sets as evaluations:
        if step - max(rows.last, 0) >= every:
            warn(f"{out / FILE} ends at step {max(rows.last, 0)}; the rows from there to step {step} are lost")
        with open_boards(out, step, wandb, config) as boards:
            yield Log(rows, evaluations, boards, total, shown)
