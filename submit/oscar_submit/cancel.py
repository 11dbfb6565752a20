"""Cancelling a pipeline: its jobs end cleanly, and what they have done stays."""

from oscar_common.progress import plural
from oscar_extract.folder.progress import progress_of
from oscar_submit import slurm
from oscar_submit.folder import recorded_name
from oscar_submit.request import Request, output
from oscar_submit.submit import is_planned, last_step, settings_of


def cancel(request: Request) -> None:
    """End the jobs of a pipeline cleanly: those that wait first, so that none of them begins."""
    slurm.check_commands()
    names = [recorded_name(request, step, settings) for step, settings in settings_of(request).items()]
    jobs = slurm.queued(names)
    waiting, running = [job.id for job in jobs if job.is_waiting], [job.id for job in jobs if not job.is_waiting]

    slurm.cancel(waiting)
    slurm.tell_to_end(running)
    if waiting:
        print(f"out of the queue: {', '.join(waiting)}")

    if running:
        print(
            f"asked to save and stop: {', '.join(running)}; `oscar-submit status {request.name}` shows what they save"
        )

    if not jobs:
        print("no job of this pipeline waits or runs")

    _print_what_stays(request)


def _print_what_stays(request: Request) -> None:
    if request.extract is not None and is_planned(request.extract):
        progress = progress_of(output(request.extract))
        print(f"stays: {progress.done:,} of {plural(progress.shards, 'shard')} in {request.extract.out}")
    if request.train is not None:
        print(f"stays: the checkpoint of step {last_step(output(request.train)):,} in {request.train.out}")
    print(f"`oscar-submit {request.name}` goes on from there")
