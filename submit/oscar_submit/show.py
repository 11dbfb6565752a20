"""A status as people see it: lines on a terminal, or a page with the curve of shards over time."""

import html
from datetime import datetime
from pathlib import Path

from oscar_common.errors import shorten
from oscar_common.files import replacing
from oscar_common.progress import duration, plural
from oscar_submit.slurm import QueuedJob
from oscar_submit.status import Extraction, Failure, Status, Training

MARK = b"<!-- oscar-submit status -->"
NAMED = 20  # shards in work, or failures, that are named one by one
WIDTH, HEIGHT = 640, 240  # of the curve, in pixels
STYLE = (
    "body{font:16px sans-serif;max-width:50em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap}"
    "svg{width:100%;height:auto}polyline{fill:none;stroke:#2a6;stroke-width:2}text{font-size:12px;fill:#555}"
)


def lines_of(status: Status) -> list[str]:
    """Return a status as lines of text."""
    lines = [f"{status.name}: {_state(status)}"]
    if status.queue:
        lines.append(f"the queue is not known: {status.queue}")

    if status.extraction is not None:
        lines += _extraction_lines(status.extraction)

    if status.training is not None:
        lines += _training_lines(status.training)

    return lines


def _state(status: Status) -> str:
    if status.is_complete:
        return "complete"
    if status.is_at_work:
        return "at work"
    return f"not complete, and no job waits or runs; `oscar-submit {status.name}` goes on"


def _extraction_lines(extraction: Extraction) -> list[str]:
    progress = extraction.progress
    if progress is None:
        return ["extraction: not planned yet", *_job_lines(extraction.jobs), *_failure_lines(extraction.failures)]

    lines = [
        f"extraction: {progress.done:,} of {plural(progress.shards, 'shard')} done, {len(progress.in_work):,} in work, "
        f"{progress.left:,} left; {progress.images_done:,} of {plural(progress.images, 'image')}"
    ]
    if extraction.rate is not None:
        eta = f", about {duration(extraction.eta)} left" if extraction.eta else ""
        lines.append(f"  {extraction.rate:,.1f} images/s lately{eta}")

    for shard in progress.in_work[:NAMED]:
        since = datetime.fromtimestamp(shard.since).astimezone().isoformat(" ", "seconds")
        lines.append(f"  shard {shard.shard:06d} at {shard.host} since {since}")

    if progress.rejects:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(progress.rejects.items()))
        lines.append(f"  rejects: {reasons}")

    return [*lines, *_job_lines(extraction.jobs), *_failure_lines(extraction.failures)]


def _training_lines(training: Training) -> list[str]:
    numbers = "".join(f", {name} {value:.4g}" for name, value in training.numbers.items())
    eta = f", about {duration(training.eta)} left" if training.eta else ""
    lines = [
        f"training: step {training.step:,} of {training.steps:,}{numbers}{eta}",
        f"  newest checkpoint: step {training.checkpoint:,}",
    ]
    return [*lines, *_job_lines(training.jobs), *_failure_lines(training.failures)]


def _job_lines(jobs: tuple[QueuedJob, ...]) -> list[str]:
    lines = []
    for job in jobs[:NAMED]:
        place = f"on {job.nodes} for {job.used}" if not job.is_waiting else f"waits: {job.reason}"
        lines.append(f"  job {job.id} ({job.name}) {job.state.lower()}, {place}")
    return lines


def _failure_lines(failures: tuple[Failure, ...]) -> list[str]:
    lines = []
    for failure in failures[:NAMED]:
        lines.append(f"  job {failure.job} {failure.reason}" + (f"; {failure.log} ends:" if failure.lines else ""))
        lines += [f"    {shorten(line)}" for line in failure.lines]

    if failures[NAMED:]:
        lines.append(f"  and {len(failures) - NAMED:,} more")

    return lines


def write_page(status: Status, path: Path) -> None:
    """Write a status as one page that needs no other file."""
    text = html.escape("\n".join(lines_of(status)))
    when = datetime.fromtimestamp(status.time).astimezone().isoformat(" ", "seconds")
    title = html.escape(f"{status.name}, {when}")
    curve = _curve(status.extraction) if status.extraction is not None else ""
    page = (
        f"<!doctype html>\n{MARK.decode()}\n<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n"
        f"<h1>{title}</h1>\n{curve}\n<pre>{text}</pre>\n"
    )

    with replacing(path) as file:
        file.write(page.encode())


def _curve(extraction: Extraction) -> str:
    """Return the shards done over time as SVG."""
    progress = extraction.progress
    if progress is None or not progress.done_at:
        return ""

    start, end = progress.done_at[0], progress.done_at[-1]
    span = max(end - start, 1.0)

    points = []

    for number, moment in enumerate(progress.done_at, start=1):
        x = 40 + (WIDTH - 50) * (moment - start) / span
        y = HEIGHT - 30 - (HEIGHT - 50) * number / progress.shards
        points.append(f"{x:.1f},{y:.1f}")

    ends = [datetime.fromtimestamp(moment).strftime("%d %b %H:%M:%S") for moment in (start, end)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="shards done over time">'
        f'<polyline points="{" ".join(points)}"/>'
        f'<text x="40" y="{HEIGHT - 10}">{ends[0]}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 10}" text-anchor="end">{ends[1]}</text>'
        f'<text x="0" y="22">{progress.shards:,}</text><text x="0" y="{HEIGHT - 30}">0</text></svg>'
    )
