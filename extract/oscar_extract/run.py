"""A run: what is left of a plan is handed to workers, and people are told how it goes."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from oscar_common.errors import UsageError
from oscar_common.files import TEMPORARY, locked, replacing
from oscar_common.progress import Meter, meter
from oscar_extract.folder.job_file import job_content
from oscar_extract.plan import Plan, planned_images, read_shard_plan, write_plan
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
from oscar_extract.tasks import Done, Job, Trial, is_done
from oscar_extract.workers import Dask, Here, Workers, cores, gpus, local_cluster, remote_cluster
from oscar_shards.manifest import FILE, JOB_FILE, MISSING_FILE, Manifest, read_manifest, write_manifest
from oscar_shards.write import finish_shards, remove_shards, shard_path

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
        found = workers.survey(job, trial_of(job, plan, DRY_SECONDS))
        print_estimate(plan, found, workers.describe(), speedup(job, workers))


def run(job: Job, plan: Plan) -> None:
    """Write all shards of the plan that are not there yet.

    Raises:
        UsageError: `out` holds shards of another detector, plan or settings, or cannot be written.
        OperationError: another process works there, too much is missing or was refused, or shards were given up.
    """
    out, settings, record = job.out, job.settings, plan.record
    warn_of_damage(plan)
    check_missing(out, plan, settings.max_reject_fraction)
    tars = [shard_path(out, settings.name, n) for n in range(record.num_shards)]
    if not settings.overwrite and any(out.glob(f"{TEMPORARY}*.parquet")):
        with locked(out, "--out"):
            finish_shards(out)
    todo = [n for n, tar in enumerate(tars) if settings.overwrite or not is_done(tar, settings.retry_rejects)]
    left = sum(record.images_in(n) for n in todo)
    with choose_workers(job, plan, left, len(todo)) as workers:
        found = workers.survey(job, trial_of(job, plan) if workers.tries else Trial(plan=record, roots=[], images=[]))
        with locked(out, "--out"):
            prepare(job, found.manifest, plan)
            sweep(out, {tars[n].stem for n in {*range(len(tars))} - {*todo}})
            print_start(plan, found, out, workers.describe())
            with meter("images", record.num_images, record.num_images - left) as progress:
                done = list(follow(workers, job, todo, progress))
            time = f"{progress.seconds:,.0f} s, {progress.rate:.1f} images/s" if todo else "nothing was left to do"
            memory = max([found.memory, *(d.memory for d in done)])
            told = f"at most {memory / 1e9:.2f} GB a process; {workers.describe()}"
            refused = print_summary(out, plan, time, told, workers.lost)
    check_rejects(out, plan, refused, settings.max_reject_fraction)


def write_job(job: Job, plan: Plan) -> None:
    """Write the plan and the settings of a job, for processes that join it; the work is theirs.

    Raises:
        UsageError: `out` holds shards, or the plan, of another job.
    """
    warn_of_damage(plan)
    check_missing(job.out, plan, job.settings.max_reject_fraction)
    with locked(job.out, "--out"):
        write_plan(job.out, plan)
        write_settings(job)
    print(f"{plan.record.num_images:,} images in {plan.record.num_shards:,} shards", flush=True)


def write_settings(job: Job) -> None:
    """Write the settings of a job beside its shards."""
    with replacing(job.out / JOB_FILE) as file:
        file.write(job_content(job.settings, job.entry))


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


def follow(workers: Workers, job: Job, todo: list[int], progress: Meter) -> Iterator[Done]:
    """Have shards done, showing the progress of all of them together."""
    start, so_far, whole = progress.done, dict.fromkeys(todo, (0, 0)), set[int]()
    lock, total = Lock(), [0, 0]

    def tell(number: int, images: int, rejects: int) -> None:
        with lock:  # workers are heard in another thread, and what they said may come after their work
            if number not in whole:
                before, so_far[number] = so_far[number], (images, rejects)
                total[:] = total[0] + images - before[0], total[1] + rejects - before[1]
                progress.show(start + total[0], total[1])

    for done in workers.extract(job, todo, tell):
        tell(done.shard, done.images, done.rejects)
        whole.add(done.shard)
        yield done


def sweep(out: Path, whole: set[str]) -> None:
    """Remove what a killed worker left of shards that are whole: it had finished, but not tidied up."""
    for path in sorted(out.glob(f"{TEMPORARY}*")):  # the index first, for it says that the others are whole
        if path.name.removeprefix(TEMPORARY).partition(".")[0] in whole:
            path.unlink(missing_ok=True)


def prepare(job: Job, manifest: Manifest, plan: Plan) -> None:
    """Make the folder ready: new, continued, or (with `overwrite`) emptied of its shards."""
    out = job.out
    if job.settings.overwrite:
        remove_shards(out)
    if (out / FILE).exists():
        _check_same(out, read_manifest(out, "--out"), manifest)
    else:
        write_manifest(out, manifest)
    if len(plan.table):  # else it is the one that lies there
        write_plan(out, plan)
    write_settings(job)
    (out / MISSING_FILE).unlink(missing_ok=True)  # of a job that was refused before


def _check_same(out: Path, there: Manifest, here: Manifest) -> None:
    """Refuse to mix shards of two detectors, plans or settings, naming both sides."""

    def refuse(what: str, old: object, new: object) -> None:
        raise UsageError(
            f"--out {out}: holds shards of {what} {old}, this is {new}; give another --out, or --overwrite"
        )

    if there.name != here.name:
        refuse("name", there.name, here.name)
    if there.detector.dtype != here.detector.dtype:
        refuse("dtype", there.detector.dtype, here.detector.dtype)
    if there.detector != here.detector:
        refuse("detector", _describe(there), _describe(here))
    for name, value in here.settings.items():
        if there.settings.get(name) != value:
            refuse(name, there.settings.get(name), value)
    for name, value in asdict(here.plan).items():
        old = asdict(there.plan)[name]
        if old != value and name not in ("images", "captions"):  # the same content may lie elsewhere now
            refuse(f"plan: {name}", old, value)


def _describe(manifest: Manifest) -> str:
    detector = manifest.detector
    config = hashlib.sha256(detector.config.encode()).hexdigest()
    hashes = f"{detector.weights} {detector.weights_sha256[:12]}, config {config[:12]}, preset {detector.preset}"
    return f"{detector.name} ({hashes})"
