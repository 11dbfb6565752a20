"""A run under way: what its steps need, and what is done with what they come to."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from oscar_common.errors import OperationError
from oscar_common.progress import duration, warn
from oscar_common.settings import Train
from oscar_train.checkpoints import checkpoint
from oscar_train.data.stream import Stream
from oscar_train.logs.log import Log, Row, is_pace
from oscar_train.logs.throughput import Meter
from oscar_train.model.flops import Work, matrix_ceiling
from oscar_train.tasks.task import Evaluation
from oscar_train.training.schedule import rate
from oscar_train.training.step import Report, Result, TrainState

LONG_RUN, WEEK = 600.0, 7 * 86400.0  # seconds from which on a run is told, or warned of, how long it takes
NOTHING = 20  # steps without any image after which a run ends


@dataclass(frozen=True)
class Run:
    """A run under way.

    identity: what a rerun must have in common with it. about: what an evaluation of its checkpoints must know.
    evaluation: what is asked while training. log: of the first rank only.
    """

    settings: Train
    out: Path
    identity: dict[str, object]
    about: dict[str, object]
    stream: Stream
    train_state: TrainState
    evaluation: Evaluation | None
    log: Log | None

    def say(self, line: str) -> None:
        """Print one line for people, once for all ranks."""
        if self.log is not None:
            self.log.say(line)


class Reports:
    """The steps that are under way, and what is done with what they come to."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._coming: deque[tuple[int, Report, Work]] = deque()
        self._nothing = 0  # steps without any image, the last ones
        self._meter = _meter(run.train_state)
        self._forecast = Forecast(run)

    def add(self, step: int, report: Report, work: Work) -> None:
        """Note that a step is under way, and what there was to do for this rank."""
        self._coming.append((step, report, work))

    def rested(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._meter.rested()

    def read(self, left: int = 0) -> bool:
        """Wait for all steps but the last `left`, warn of and log them; return whether a rank was told to stop.

        Raises:
            OperationError: too many steps were skipped or without any image.
        """
        run, stopped = self._run, False
        while len(self._coming) > left:
            step, report, work = self._coming.popleft()
            result = report.read()
            stopped |= result.stopped > 0
            self._check(step, result)
            if result.fault:
                _skip(run, step, result, report)

            self._meter.add(work, report.waited, report.ended)
            self._forecast.add(step, report.ended)
            if run.log is not None and (step % run.settings.log_every == 0 or step == run.settings.steps):
                run.log.add(_row(run, step, result, self._meter.measured()))

        return stopped

    def _check(self, step: int, result: Result) -> None:
        self._nothing = 0 if result.triples else self._nothing + 1
        if self._nothing == NOTHING:
            raise OperationError(
                f"step {step}: no image of {NOTHING} steps could be read, all were skipped; are the --shards there?"
            )


class Forecast:
    """Says of a long run, once, how long it will take and how much room its checkpoints do."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: tuple[int, float] | None = None
        self._is_over = run.log is None

    def add(self, step: int, ended: float) -> None:
        """Note when a step was over; as soon as there is a pace, say what is to come."""
        if self._is_over:
            return
        if self._first is None:
            self._first = step, ended
            return

        steps, seconds = step - self._first[0], ended - self._first[1]
        if is_pace(steps, seconds):
            self._is_over = True
            self._say(step, (self._run.settings.steps - step) * seconds / steps)

    def _say(self, step: int, left: float) -> None:
        settings, buffer = self._run.settings, checkpoint.buffer(self._run.train_state.model)
        if left < LONG_RUN:
            return

        self._run.say(
            f"at this pace the {settings.steps - step:,} steps left take about {duration(left)}; a checkpoint takes "
            f"{buffer / 1e9:.1f} GB, and --keep {settings.keep} keeps as many"
        )
        if left > WEEK:
            warn(
                f"--steps {settings.steps}, --batch-size {settings.batch_size}: about {duration(left)} on this "
                "machine; try fewer steps, a smaller batch or --init, --precision bf16, or more GPUs"
            )


def _skip(run: Run, step: int, result: Result, report: Report) -> None:
    """Count a step that was skipped, and name the images whose scores are no numbers, or all of them."""
    ranks, size = run.train_state.ranks, len(report.finite)
    odd = torch.zeros(run.settings.batch_size, dtype=torch.int32, device=ranks.device)
    odd[ranks.rank * size : (ranks.rank + 1) * size] = ~report.finite
    suspects = ranks.total(odd).bool().tolist()
    keys = run.stream.keys(step - 1)
    chosen = [key for key, suspect in zip(keys, suspects, strict=True) if suspect] if any(suspects) else keys
    fault = run.train_state.guard.reason(result.loss, result.norm, result.usual)
    run.train_state.guard.skip(step, fault, list(dict.fromkeys(chosen)), warns=ranks.first)


def _row(run: Run, step: int, result: Result, measured: dict[str, float]) -> Row:
    return Row(
        step=step,
        epoch=run.stream.epoch(step - 1),
        loss=result.loss,
        mlm_loss=result.mlm_loss,
        match_loss=result.match_loss,
        mlm_accuracy=result.mlm_accuracy,
        match_accuracy=result.match_accuracy,
        lr=rate(run.settings, step),
        grad_norm=result.norm,
        skipped=run.settings.batch_size - result.triples // run.train_state.task.shape.labels,
        skipped_steps=run.train_state.guard.skipped,
        **measured,
    )


def _meter(train_state: TrainState) -> Meter:
    """Return what measures the pace. All ranks look for the ceiling at once, as on a CPU they share it."""
    ceiling = matrix_ceiling(train_state.ranks.device, train_state.settings.precision)
    return Meter(train_state.model.config, train_state.ranks.device, ceiling, train_state.ranks.size)
