"""Submitting a pipeline: only what is missing, and neither waiting nor running."""

import sys
from dataclasses import dataclass
from pathlib import Path

from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_common.progress import plural, say_next
from oscar_common.settings import Extract, Train
from oscar_extract.folder.progress import progress_of
from oscar_shards.manifest import JOB_FILE
from oscar_submit import slurm
from oscar_submit.folder import (
    add_submission,
    job_name,
    jobs_folder,
    log_folder,
    read_record,
    recorded_name,
)
from oscar_submit.request import Request, output
from oscar_submit.scripts import check_script, extract_script, train_script
from oscar_submit.slurm import QueuedJob


@dataclass(frozen=True, kw_only=True)
class Step:
    """One job of a chain. present: those of it that wait or run."""

    step: str
    name: str
    present: tuple[QueuedJob, ...]

    @property
    def job(self) -> str | None:
        """The id of the job that waits or runs."""
        return self.present[-1].job if self.present else None


def dry_run(request: Request, rate: float | None) -> None:
    """Print what a pipeline will take and the scripts that would be submitted; write nothing."""
    shards = show(request, rate)
    if request.extract is not None:
        workers = min(request.cluster.extract.workers, max(shards, 1))
        _print_script("extract.sh", extract_script(request, request.extract, workers))
        _print_script("check.sh", check_script(request, request.extract))

    if request.train is not None:
        _print_script("train.sh", train_script(request, request.train))

    print("next: the same command without --dry-run", file=sys.stderr)


def show(request: Request, rate: float | None) -> int:
    """Print what a pipeline will take, and return how many shards stage 1 has to do."""
    from oscar_submit.sizing import extract_job, measure, print_extract, print_train

    shards = 0
    if request.extract is not None:
        job = extract_job(request, request.extract)
        corpus = measure(request, request.extract)
        print_extract(request, request.extract, job, corpus, rate)
        shards = corpus.record.num_shards
        if is_planned(request.extract):
            shards -= progress_of(output(request.extract)).done

    if request.train is not None:
        print_train(request, request.train)

    return shards


def submit(request: Request, rate: float | None) -> None:
    """Submit what is missing of a pipeline.

    Raises:
        UsageError: no SLURM, a job that it refuses, data that is not there, or an output of other settings.
    """
    slurm.check_commands()
    if request.extract is not None:
        slurm.check_array(request.cluster.extract.workers, request.cluster_name)

    steps = {step: _look_up(request, step, settings) for step, settings in settings_of(request).items()}

    if request.extract is not None and not steps["extract"].present:
        plan(request, request.extract)

    show(request, rate)

    submitted: dict[str, str] = {}
    try:
        after = _submit_extract(request, request.extract, steps, submitted) if request.extract is not None else None
        if request.train is not None:
            _submit_train(request, request.train, steps["train"], after, submitted)
    except UsageError:
        slurm.cancel(submitted.values())  # a chain that lacks its end is of no use
        raise

    _record(request, submitted)
    if not submitted:
        print("nothing to submit")

    say_next("oscar-submit", "status", request.name, *[word for place in request.places for word in ("--set", place)])


def plan(request: Request, settings: Extract) -> None:
    """Write the plan of stage 1 into its folder, for the workers; one that is there and fits is kept."""
    from oscar_extract.__main__ import check
    from oscar_extract.plan import plan_of
    from oscar_extract.run import write_job
    from oscar_extract.sources.request import make_request
    from oscar_submit.sizing import extract_job

    job = extract_job(request, settings)
    corpus_request = make_request(settings, request.catalog)
    check(settings)
    write_job(job, plan_of(corpus_request, settings))


def settings_of(request: Request) -> dict[str, Extract | Train]:
    """Return the steps of a request, each with the settings of its stage."""
    steps: dict[str, Extract | Train] = {}
    if request.extract is not None:
        steps |= {"extract": request.extract, "check": request.extract}
    if request.train is not None:
        steps["train"] = request.train
    return steps


def _look_up(request: Request, step: str, settings: Extract | Train) -> Step:
    """Return what is in the queue of a step.

    Raises:
        UsageError: other settings are at work in its folder.
    """
    name = job_name(request, step, settings)
    recorded = recorded_name(request, step, settings)
    if recorded != name and (present := slurm.queued([recorded])):
        raise UsageError(
            f"{output(settings)}: job {present[0].job} works there with other settings; cancel it, wait for it, or "
            "give another out"
        )

    return Step(step=step, name=name, present=tuple(slurm.queued([name])))


def _submit_extract(
    request: Request, settings: Extract, steps: dict[str, Step], submitted: dict[str, str]
) -> str | None:
    """Submit workers and their check, as far as they are needed; return the job that training must wait for."""
    out = output(settings)
    progress = progress_of(out)
    extract, check = steps["extract"], steps["check"]

    if extract.present:
        print(f"extraction: {_state(extract)}")
    elif progress.is_complete:
        print(f"extraction: all {plural(progress.shards, 'shard')} are done")
    else:
        shards = progress.shards - progress.done
        workers = min(request.cluster.extract.workers, shards)
        _withdraw(check, steps.get("train"))
        script = _write_script(out, "extract.sh", extract_script(request, settings, workers))
        submitted["extract"] = slurm.submit(script, request.cluster_name)
        print(f"extraction: job {submitted['extract']}, {plural(workers, 'worker')} for {plural(shards, 'shard')}")

    if "extract" not in submitted:
        if check.present:
            print(f"check: {_state(check)}")
            return check.job
        if progress.is_complete and read_record(out).get("counts", {}).get("complete"):
            return None

    workers_job = submitted.get("extract") or extract.job
    script = _write_script(out, "check.sh", check_script(request, settings))
    after = f"afterany:{workers_job}" if workers_job else None
    submitted["check"] = slurm.submit(script, request.cluster_name, after)
    print(f"check: job {submitted['check']}" + (f", after job {workers_job}" if workers_job else ""))

    return submitted["check"]


def _submit_train(request: Request, settings: Train, train: Step, after: str | None, submitted: dict[str, str]) -> None:
    """Submit the training unless it is there or done."""
    out = output(settings)
    is_withdrawn = "extract" in submitted
    if train.present and not is_withdrawn:
        print(f"training: {_state(train)}")
        return
    if (step := last_step(out)) >= settings.steps:
        print(f"training: all {settings.steps:,} steps are done")
        return

    if request.extract is None:
        _check_shards(settings)

    script = _write_script(out, "train.sh", train_script(request, settings))
    submitted["train"] = slurm.submit(script, request.cluster_name, f"afterok:{after}" if after else None)
    begins = f"from step {step:,} to {settings.steps:,}" if step > 0 else f"{settings.steps:,} steps"
    print(f"training: job {submitted['train']}, {begins}" + (f", after job {after}" if after else ""))


def is_planned(settings: Extract) -> bool:
    """Whether the plan of stage 1 lies in its folder."""
    return (output(settings) / JOB_FILE).exists()


def last_step(out: Path) -> int:
    """Return the step of the newest checkpoint of a run, 0 if there is none."""
    from oscar_train.arguments import checkpoints, step_of

    newest = next(iter(checkpoints(out)), None)
    return step_of(newest) if newest is not None else 0


def _check_shards(settings: Train) -> None:
    from oscar_shards.read import find_shards

    for place in settings.shards:
        if "://" not in place:
            find_shards(Path(place), "train.shards")


def _withdraw(*steps: Step | None) -> None:
    """Take jobs out of the queue that wait for workers that have gone; others take their place."""
    for step in steps:
        if step is not None:
            slurm.cancel(job.id for job in step.present if job.is_waiting)


def _write_script(out: Path, name: str, text: str) -> Path:
    log_folder(out).mkdir(parents=True, exist_ok=True)
    path = jobs_folder(out) / name
    with replacing(path) as file:
        file.write(text.encode())
    return path


def _record(request: Request, submitted: dict[str, str]) -> None:
    """Note the jobs beside the output of each stage."""
    if request.extract is not None:
        jobs = {step: job for step, job in submitted.items() if step != "train"}
        if jobs:
            add_submission(request, request.extract, jobs)
    if request.train is not None and "train" in submitted:
        add_submission(request, request.train, {"train": submitted["train"]})


def _state(step: Step) -> str:
    """Return what is in the queue of a step, as part of a line."""
    running = sum(not job.is_waiting for job in step.present)
    state = f"{running} running" if running else "waiting"
    return f"job {step.job} is in the queue ({state}); nothing to submit"


def _print_script(name: str, text: str) -> None:
    print(f"\n--- {name}\n{text}", end="")
