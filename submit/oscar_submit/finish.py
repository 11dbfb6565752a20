"""The end of a stage, run by its last job: `python -m oscar_submit.finish extract OUT`, or `train OUT`.

It completes the record beside the output with counts, nodes and times, and fails if shards are missing or damaged.
"""

import dataclasses
from pathlib import Path

import click

from oscar_common import cli
from oscar_common.errors import OperationError
from oscar_common.progress import plural
from oscar_extract.folder.job_file import read_job
from oscar_extract.folder.progress import Progress, check_complete, print_progress, progress_of
from oscar_extract.plan import planned_record
from oscar_submit.folder import job_ids, logs_of, now, read_record, runs_in, write_record
from oscar_submit.submit import last_step

STAGES = ("extract", "train")


@click.command(cls=cli.Command, help="Complete the record of a stage beside its output.")
@click.argument("stage", type=click.Choice(STAGES))
@click.argument("out", type=cli.PATH)
def command(stage: str, out: Path) -> None:
    """Complete the record of a stage."""
    if stage == "extract":
        finish_extract(out)
    else:
        finish_train(out)


def finish_extract(out: Path) -> None:
    """Count and verify shards.

    Raises:
        OperationError: shards are missing or damaged, or too many images were refused.
    """
    progress = progress_of(out)
    print_progress(progress)
    faults = _faults(out, progress)
    counts = {
        "complete": progress.is_complete and not faults,
        "shards": progress.shards,
        "shards_done": progress.done,
        "images": progress.images,
        "images_done": progress.images_done,
        "rejects": dict(progress.rejects),
        "bytes": progress.bytes_done,
        "faults": faults,
    }
    complete_record(out, counts)

    check_complete(progress)
    if faults:
        raise OperationError(f"{out}: {plural(faults, 'fault')} in the shards; `oscar-shards verify {out}` names them")

    _check_rejects(out, progress)


def finish_train(out: Path) -> None:
    """Note how far the training is."""
    complete_record(out, {"step": last_step(out)})


def complete_record(out: Path, counts: dict[str, object]) -> None:
    """Add counts, and where and when each job ran, to the record of an output."""
    record = read_record(out)
    runs = [run for log in logs_of(out, job_ids(record)) for run in runs_in(log)]
    jobs = [dataclasses.asdict(run) for run in runs]
    write_record(out, {**record, "counted": now(), "counts": counts, "runs": jobs})


def _faults(out: Path, progress: Progress) -> int:
    """Return how many faults headers and sizes show; every byte was summed when it was written."""
    from oscar_shards.verify import verify

    return verify([out], quick=True, workers=1) if progress.is_complete else 0


def _check_rejects(out: Path, progress: Progress) -> None:
    settings, _ = read_job(out)
    record = planned_record(out)
    total = record.num_images + record.num_duplicates + record.num_missing
    gone = sum(progress.rejects.values()) + record.num_missing
    if gone > settings.max_reject_fraction * total:
        raise OperationError(
            f"{out}: {gone:,} of {total:,} images are missing or were refused, more than extract.max_reject_fraction "
            f"{settings.max_reject_fraction}; see {out}/*.rejects.parquet"
        )


def main() -> None:
    """Run the command."""
    cli.run(command, continues=True)


if __name__ == "__main__":
    main()
