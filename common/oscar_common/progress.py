"""Progress for people: a bar with rate, ETA and rejects on a terminal, a plain line now and then elsewhere."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 10.0


def duration(seconds: float) -> str:
    """Return a time for people, in the unit that fits: "40 seconds", "3.5 hours", "3.9 years"."""
    for unit, size in (("year", 365.25 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.95 * size:
            count = seconds / size
            return f"{count:.1f} {unit}s" if count < 9.95 else f"{count:,.0f} {unit}s"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def plural(count: int, name: str, names: str = "") -> str:
    """Return a count with its noun: "1 image", "1,200 images"; `names` is the plural of a noun that has another."""
    return f"{count:,} {name if count == 1 else names or f'{name}s'}"


def say_next(*words: object) -> None:
    """Say on stderr which command comes next."""
    print(f"next: {shlex.join(map(str, words))}", file=sys.stderr, flush=True)


@dataclass(kw_only=True)
class Meter:
    """Counts what is done. `done` may start above 0 on a resumed run; the rate counts this run's work alone."""

    unit: str
    total: int
    done: int = 0
    rejects: int = 0
    refusal: str = "rejected"  # what a reject is called
    began: float = field(default_factory=time.monotonic)
    _at_start: int = 0
    _printed: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None
    _task: TaskID | None = None

    def show(self, done: int, rejects: int) -> None:
        """Show that `done` are done in all, `rejects` of those of this run were refused."""
        self.done, self.rejects = done, rejects
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, text=self.text())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            print(f"{self.done:,}/{self.total:,} {self.unit}  {self.text()}", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self._at_start) / max(self.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds since this run began."""
        return time.monotonic() - self.began

    def text(self) -> str:
        """Return rate, ETA and rejects as one short phrase."""
        eta = str(timedelta(seconds=round((self.total - self.done) / self.rate))) if self.rate else "?"
        return f"{self.rate:.1f} {self.unit}/s  ETA {eta}  {self.rejects} {self.refusal}"


@contextmanager
def meter(unit: str, total: int, done: int = 0, refusal: str = "rejected") -> Iterator[Meter]:
    """Show progress towards `total` on stderr while the block runs."""
    shown = Meter(unit=unit, total=total, done=done, refusal=refusal, _at_start=done)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield shown
        return

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console) as shown._bar:
        shown._task = shown._bar.add_task(unit, total=total, completed=done, text="")
        yield shown


PHASE_SECONDS = 2.0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say on stderr how long the block took, if that was long enough to wonder; on a terminal also that it runs."""
    began = time.monotonic()
    console = Console(stderr=True)
    with console.status(f"{name} ...") if console.is_terminal else nullcontext():
        yield
    if (seconds := time.monotonic() - began) > PHASE_SECONDS:
        print(f"{name}: {seconds:,.1f} s", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Tell people of something that is wrong but does not stop the run."""
    print(f"warning: {line}\n", end="", file=sys.stderr, flush=True)  # in one piece, as threads may warn at once
