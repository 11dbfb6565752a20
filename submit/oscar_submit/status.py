"""How far a pipeline is: from the folders of its output, and from squeue as long as it answers."""

import csv
import dataclasses
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oscar_common.errors import OperationError
from oscar_common.settings import Extract, Train
from oscar_extract.folder.progress import Progress, progress_of
from oscar_extract.folder.progress import as_json as progress_as_json
from oscar_submit import slurm
from oscar_submit.folder import jobs_folder, last_lines, logs_of, read_record, recorded_name, runs_in
from oscar_submit.request import Request, output
from oscar_submit.slurm import QueuedJob
from oscar_submit.submit import is_planned, last_step

STOPPED = (0, 138, 143)  # exit codes of a job that ended well, or was told to end
RECENT = 50  # shards whose pace the rest is expected to have
METRICS = "metrics.csv"
COLUMNS = ("loss", "mlm_loss", "match_loss", "samples_per_second")
FAILED_STATES = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A job that ended badly: where its log is, and what it says at the end."""

    job: str
    reason: str
    log: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Stage 1. rate: images a second, lately; eta: seconds. Either is None where it is not known."""

    progress: Progress | None
    rate: float | None
    eta: float | None
    jobs: tuple[QueuedJob, ...]
    failures: tuple[Failure, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all shards are there."""
        return self.progress is not None and self.progress.is_complete


@dataclass(frozen=True, kw_only=True)
class Training:
    """Stage 2. numbers: those of the last row of metrics.csv that are named in `COLUMNS`."""

    step: int
    steps: int
    checkpoint: int
    numbers: dict[str, float]
    eta: float | None
    jobs: tuple[QueuedJob, ...]
    failures: tuple[Failure, ...]

    @property
    def is_complete(self) -> bool:
        """Whether the last step's checkpoint is there."""
        return self.checkpoint >= self.steps


@dataclass(frozen=True, kw_only=True)
class Status:
    """A pipeline. queue: why squeue could not be asked, or nothing."""

    name: str
    time: float
    queue: str
    extraction: Extraction | None
    training: Training | None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage is None or stage.is_complete for stage in (self.extraction, self.training))

    @property
    def is_at_work(self) -> bool:
        """Whether a job waits or runs."""
        return any(stage is not None and stage.jobs for stage in (self.extraction, self.training))


def look(request: Request) -> Status:
    """Return how far a pipeline is."""
    jobs, queue = _queue(request)
    return Status(
        name=request.name,
        time=time.time(),
        queue=queue,
        extraction=_extraction(request.extract, jobs) if request.extract is not None else None,
        training=_training(request.train, jobs) if request.train is not None else None,
    )


def as_json(status: Status) -> dict[str, Any]:
    """Return a status as plain data."""
    extraction, training = status.extraction, status.training
    content: dict[str, Any] = {
        "name": status.name,
        "time": status.time,
        "complete": status.is_complete,
        "at_work": status.is_at_work,
        "queue": status.queue,
    }
    if extraction is not None:
        content["extraction"] = {
            "complete": extraction.is_complete,
            **_progress(extraction.progress),
            "rate": extraction.rate,
            "eta": extraction.eta,
            "jobs": [dataclasses.asdict(job) for job in extraction.jobs],
            "failures": [dataclasses.asdict(failure) for failure in extraction.failures],
        }

    if training is not None:
        content["training"] = {"complete": training.is_complete, **dataclasses.asdict(training)}

    return content


def _progress(progress: Progress | None) -> dict[str, Any]:
    if progress is None:
        return {"planned": False}
    content = progress_as_json(progress)
    del content["out"], content["complete"]
    return {"planned": True, **content, "done_at": list(progress.done_at)}


def _queue(request: Request) -> tuple[list[QueuedJob], str]:
    """Return the jobs that wait or run; where squeue cannot be asked, none and the reason."""
    names = []
    if request.extract is not None:
        names += [recorded_name(request, step, request.extract) for step in ("extract", "check")]

    if request.train is not None:
        names.append(recorded_name(request, "train", request.train))

    try:
        return slurm.queued(names), ""
    except OperationError as error:
        return [], error.message


def _extraction(settings: Extract, jobs: list[QueuedJob]) -> Extraction:
    out = output(settings)
    progress = progress_of(out) if is_planned(settings) else None
    stage_jobs = tuple(job for job in jobs if "-extract-" in job.name or "-check-" in job.name)
    rate = _rate(progress) if progress is not None else None
    eta = (progress.images - progress.images_done) / rate if progress is not None and rate and stage_jobs else None
    is_complete = progress is not None and progress.is_complete
    failures = () if is_complete else _failures(out, stage_jobs)

    return Extraction(progress=progress, rate=rate, eta=eta, jobs=stage_jobs, failures=failures)


def _rate(progress: Progress) -> float | None:
    """Return images a second between the first and the last of the shards that were done lately."""
    times = progress.done_at[-RECENT:]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    images_per_shard = progress.images_done / progress.done
    return (len(times) - 1) * images_per_shard / (times[-1] - times[0])


def _training(settings: Train, jobs: list[QueuedJob]) -> Training:
    out = output(settings)
    stage_jobs = tuple(job for job in jobs if "-train-" in job.name)
    settings = _last_settings(settings, out)
    row = _last_row(out / METRICS)
    step = int(row.get("step", 0))
    checkpoint = last_step(out)
    rate = row.get("samples_per_second", 0.0)
    triples = (settings.steps - step) * settings.batch_size

    return Training(
        step=step,
        steps=settings.steps,
        checkpoint=checkpoint,
        numbers={name: row[name] for name in COLUMNS if name in row},
        eta=triples / rate if rate and stage_jobs else None,
        jobs=stage_jobs,
        failures=() if checkpoint >= settings.steps else _failures(out, stage_jobs),
    )


def _last_settings(settings: Train, out: Path) -> Train:
    """Return settings with the steps and the batch that were submitted last."""
    submitted = read_record(out).get("settings", {})
    values = {name: submitted[name] for name in ("steps", "batch_size") if name in submitted}
    return dataclasses.replace(settings, **values)


def _last_row(path: Path) -> dict[str, float]:
    """Return the last whole row of a table of numbers, empty if there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    row = rows[-1] if rows else {}
    return {name: float(cell) for name, cell in row.items() if cell}


def _failures(out: Path, present: tuple[QueuedJob, ...]) -> tuple[Failure, ...]:
    """Return what went wrong with jobs of the last submission that neither wait nor run."""
    record = read_record(out)
    submissions = record.get("submissions", [])
    if not submissions:
        return ()

    job_ids = list(submissions[-1]["jobs"].values())
    failures = _failures_in_logs(out, job_ids, present)

    for job in job_ids:
        is_present = any(job == other.job for other in present)
        if not is_present and not logs_of(out, [job]):
            failures += _failures_without_log(out, job)

    return tuple(failures)


def _failures_in_logs(out: Path, jobs: list[str], present: tuple[QueuedJob, ...]) -> list[Failure]:
    failures = []
    for log in logs_of(out, jobs):
        name = log.stem.partition("-")[2]
        waiting_elements = f"{name.partition('_')[0]}_["  # several of an array are one line of squeue
        is_present = any(job.id == name or job.id.startswith(waiting_elements) for job in present)
        runs = runs_in(log)
        if is_present or (runs and runs[-1].code in STOPPED):
            continue

        reason = "ended before it began" if not runs else f"ended with exit code {runs[-1].code}"
        if runs and runs[-1].code is None:
            reason = f"was killed on {runs[-1].node}, or its node failed"

        failures.append(Failure(job=name, reason=reason, log=str(log), lines=tuple(last_lines(log))))

    return failures


def _failures_without_log(out: Path, job: str) -> list[Failure]:
    """Return what the controller still knows of a job that left no log: its nodes see other files."""
    failures = []
    for end in _ended(job):
        if end.state not in FAILED_STATES and end.code != slurm.LAUNCH_FAILED:
            continue
        reason = f"{end.state.lower()}, exit code {end.code}"
        if end.code == slurm.LAUNCH_FAILED:
            reason += f": its node cannot write {jobs_folder(out)}; give an out on a disk that all nodes see"
        failures.append(Failure(job=end.job, reason=reason, log="", lines=()))

    return failures


def _ended(job: str) -> list[slurm.EndedJob]:
    with suppress(OperationError):
        return slurm.ended(job)
    return []
