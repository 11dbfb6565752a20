"""A run: what is left of a plan is handed to workers, and progress is shown."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from time import sleep

from oscar_common.errors import Stopped
from oscar_common.progress import Meter, meter, plural
from oscar_extract.folder.prepare import prepare
from oscar_extract.folder.remaining import Remaining
from oscar_extract.folder.take import give_back_for_the_dead
from oscar_extract.messages import Done, Job, Trial
from oscar_extract.plan import Plan, planned_images, read_shard_plan
from oscar_extract.sizing import estimate
from oscar_extract.sources.remote import cache_of
from oscar_extract.summary import (
    check_missing,
    check_rejects,
    print_corpus,
    print_estimate,
    print_size,
    print_start,
    print_summary,
    warn_of_damage,
)
from oscar_extract.workers import Dask, Here, Workers, cores, given_up, gpus, local_cluster, remote_cluster
from oscar_shards.manifest import PlanRecord

POLL = 2.0  # seconds between looks at shards that others have in work
SAMPLE = 64  # images to try the detector with, at most
DRY_SECONDS = 10.0
WORTH = 100  # images for which another process is worth its start


def dry_run(job: Job, plan: Plan) -> None:
    """Print the corpus and the plan, and from a short sample what it will take; write nothing."""
    warn_of_damage(plan)
    print_corpus(plan)
    if job.settings.rate is not None:
        print_size(estimate(job, plan, job.settings.rate), job.settings.rate)
        return

    with choose_workers(job, plan, plan.record.num_images, plan.record.num_shards) as workers:
        survey = workers.survey(job, trial_of(job, plan, DRY_SECONDS))
        print_estimate(plan, survey, workers.describe(), speedup(job, workers))


def write_job(job: Job, plan: Plan) -> None:
    """Write the plan and the settings of a job, for processes that join it; the work is theirs.

    Raises:
        UsageError: `out` holds shards, or the plan, of another job, or cannot be written.
        OperationError: too much is missing.
    """
    record = plan.record
    warn_of_damage(plan)
    check_missing(job.out, plan, job.settings.max_reject_fraction)
    prepare(job, plan)
    print(f"planned {plural(record.num_images, 'image')} in {plural(record.num_shards, 'shard')}", flush=True)


def run(job: Job, plan: Plan, joins: bool = False) -> None:
    """Write all shards of the plan that are not there yet, beside whoever else works in the folder.

    joins: whether the job is another command's; then what lies in the folder at the end is not counted by each.

    Raises:
        UsageError: `out` holds shards of another detector, plan or settings, or cannot be written.
        OperationError: too much is missing or was refused, or shards were given up.
        Stopped: SIGTERM or SIGUSR1 has arrived.
    """
    out, settings, record = job.out, job.settings, plan.record
    warn_of_damage(plan)
    check_missing(out, plan, settings.max_reject_fraction)
    if settings.overwrite:
        left, todo = record.num_images, record.num_shards
    else:
        remaining = Remaining(job, record)
        left, todo = sum(map(record.images_in, remaining.left)), len(remaining.left)

    with choose_workers(job, plan, left, todo) as workers, _giving_back(job, workers):
        survey = workers.survey(job, trial_of(job, plan) if workers.tries else Trial(plan=record, roots=[], images=[]))
        prepare(job, plan, survey.manifest)
        if settings.overwrite:
            remaining = Remaining(job, record)

        remaining.sweep()
        print_start(plan, survey, out, workers.describe())

        with meter("images", record.num_images, record.num_images - left) as progress:
            done = list(follow(workers, job, record, remaining, progress))

        is_last = remaining.finish()
        time = f"{progress.seconds:,.0f} s, {progress.rate:.1f} images/s" if todo else "nothing was left to do"
        memory = max([survey.memory, *(d.memory for d in done)])
        use = f"at most {memory / 1e9:.2f} GB a process; {workers.describe()}"
        lost = workers.lost

    if remaining.given_up:
        raise given_up(remaining.given_up)

    if joins and not is_last:
        print(f"all shards are done, {len(done):,} of them by this command; {time}; {use}", flush=True)
    else:
        print_summary(out, plan, time, use, lost)

    check_rejects(out, plan, settings.max_reject_fraction)


@contextmanager
def _giving_back(job: Job, workers: Workers) -> Iterator[None]:
    """Give back what the workers of this machine have in work if a signal ends the block."""
    try:
        yield
    except Stopped:
        workers.kill()
        with suppress(OSError):
            give_back_for_the_dead(job.out)
        raise


def trial_of(job: Job, plan: Plan, seconds: float = 0.0) -> Trial:
    """Return a trial of a few images spread over the plan."""
    if len(plan.table):
        rows = list(range(0, len(plan.table), max(1, len(plan.table) // SAMPLE)))[:SAMPLE]
        images = planned_images(plan.table.take(rows))
    else:
        images = read_shard_plan(job.out, 0, cache_of(job.settings))[1][:SAMPLE]
    return Trial(plan=plan.record, roots=plan.roots, images=images, seconds=seconds, apart=not seconds)


@contextmanager
def choose_workers(job: Job, plan: Plan, images: int, shards: int) -> Iterator[Workers]:
    """Yield those who will do the work: a cluster's workers, this machine's GPUs, or processes for its cores."""
    settings = job.settings
    if settings.scheduler:
        with remote_cluster(settings.scheduler) as remote:
            yield remote
        return

    devices = gpus() if settings.device != "cpu" else []
    count = settings.workers or min(len(devices) or cores(), max(1, images // WORTH))
    if settings.workers and count > shards > 0:
        print(
            f"--workers {count}: there are {shards} shards to do, one for a process at a time; a smaller "
            "--images-per-shard makes more",
            file=sys.stderr,
        )

    count = min(count, max(shards, 1))
    if count == 1 or settings.dry_run:
        yield Here()
        return

    with local_cluster(count, devices, cores()) as local:
        yield local


def speedup(job: Job, workers: Workers) -> int:
    """Return how many times the pace of the survey all workers have: it ran on one of them, or on all cores."""
    if isinstance(workers, Dask):
        return workers.count()
    return max(1, len(gpus())) if job.settings.device != "cpu" else 1


def follow(workers: Workers, job: Job, record: PlanRecord, remaining: Remaining, progress: Meter) -> Iterator[Done]:
    """Have all shards done that are left, and yield those that `workers` did; wait for those that others have in work.

    The progress of all workers is shown together.
    """
    start, so_far, whole = progress.done, dict.fromkeys(remaining.left, (0, 0)), set[int]()
    lock, total = Lock(), [0, 0]

    def tell(number: int, images: int, rejects: int) -> None:
        with lock:  # workers are heard in another thread, and what they said may come after their work
            if number not in whole:
                before, so_far[number] = so_far[number], (images, rejects)
                total[:] = total[0] + images - before[0], total[1] + rejects - before[1]
                progress.show(start + total[0], total[1])

    waits = False
    while remaining.left:
        got_on = False
        for done in workers.extract(job, remaining.open_shards(), tell):
            if done.taken:
                tell(done.shard, done.images, done.rejects)
                whole.add(done.shard)
                remaining.left.pop(done.shard, None)
                got_on = True
                yield done

        for number in remaining.done_by_others:
            tell(number, record.images_in(number), 0)

        whole.update(remaining.done_by_others)

        if remaining.left and not got_on:
            if not waits:
                waits = True
                shards = plural(len(remaining.left), "shard")
                print(f"waiting for {shards} that others have in work", file=sys.stderr, flush=True)
            sleep(POLL)
