"""The files that all processes of a job share: plan, settings, manifest. Any process may be the first to write them."""

import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import TEMPORARY, check_writable, move, remove
from oscar_extract.folder.claim import FOLDER, GIVEN_BACK, PREPARED, claim_numbers, this_process
from oscar_extract.folder.job_file import check_same_job, job_content
from oscar_extract.folder.watch import PATIENCE, Watch
from oscar_extract.messages import Job
from oscar_extract.plan import Plan, planned_record, write_plan
from oscar_shards.manifest import (
    FILE,
    JOB_FILE,
    LEFT_OUT_FILE,
    MISSING_FILE,
    PLAN_FILE,
    Manifest,
    PlanRecord,
    read_manifest,
    write_manifest,
)
from oscar_shards.write import remove_shards

POLL = 2.0  # seconds between two looks at whether others are at work
SETTLED = ("images", "captions")  # of a plan: the same content may lie elsewhere now


def prepare(job: Job, plan: Plan, manifest: Manifest | None = None) -> None:
    """Make a job's folder ready: new, continued, or (with `overwrite`) emptied of its shards.

    Without a manifest, which takes a detector to make, the first process that has one writes it.

    Raises:
        UsageError: the folder holds shards, or the plan, of another job, or cannot be written.
        OperationError: shards are to be overwritten, and a process works on them.
    """
    out = job.out
    check_writable(out, f"--out {out}", "--out")
    out.mkdir(parents=True, exist_ok=True)
    if job.settings.overwrite:
        _check_nobody_works(out)
        _remove_all(out, job.settings.name)
    elif (out / FILE).exists():
        _check_same(out, read_manifest(out, "--out"), job, plan, manifest)
    else:
        _check_same_plan(job, plan)

    with _private_folder(out) as place:
        if manifest is not None and not (out / FILE).exists():
            write_manifest(place, manifest)
            _name_first(place / FILE, out / FILE)
            _check_same(out, read_manifest(out, "--out"), job, plan, manifest)  # another process may have been faster

        if len(plan.table):  # else it is the one that lies there
            write_plan(place, plan)
            _replace(place, out, LEFT_OUT_FILE)
            _replace(place, out, PLAN_FILE)

        content = job_content(job.settings, job.entry)
        if not _holds(out / JOB_FILE, content):
            (place / JOB_FILE).write_bytes(content)
            _replace(place, out, JOB_FILE)

    (out / MISSING_FILE).unlink(missing_ok=True)  # of a job that was refused before


@contextmanager
def _private_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside the shards that no other process has; it is gone after the block."""
    place = out / f"{PREPARED}{secrets.token_hex(8)}"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _name_first(source: Path, path: Path) -> None:
    """Give a file its final name, unless another process has done so."""
    try:
        with suppress(FileExistsError):
            os.link(source, path)
    except OSError:  # a file system without hard links
        move(source, path)


def _replace(place: Path, out: Path, name: str) -> None:
    """Move a file to its final place; if there is none, the one that lies there is of an earlier plan."""
    if (place / name).exists():
        move(place / name, out / name)
    else:
        (out / name).unlink(missing_ok=True)


def _holds(path: Path, content: bytes) -> bool:
    with suppress(OSError):
        return path.read_bytes() == content
    return False


def _check_nobody_works(out: Path) -> None:
    """Wait until it is known that the owners of all claims are dead.

    Raises:
        OperationError: one of them lives.
    """
    watch, first = Watch(out, this_process()), dict[int, int]()
    is_reported = False
    while True:
        waiting = False
        for shard, number in claim_numbers(out).items():
            standing = watch.look(shard, number)
            claim = standing.claim
            if claim is None or claim.state == GIVEN_BACK or standing.is_dead:
                continue
            if claim.beat != first.setdefault(shard, claim.beat):
                owner = f"process {claim.owner.pid} at {claim.owner.host}"
                raise OperationError(f"{out}: {owner} is working there; end it, or give another --out")

            waiting = True

        if not waiting:
            return

        if not is_reported:
            is_reported = True
            print(f"watching for {PATIENCE:.0f} s whether others still work in {out}", file=sys.stderr, flush=True)

        time.sleep(POLL)


def _remove_all(out: Path, name: str) -> None:
    """Remove the shards of a folder, and what processes that were killed have left."""
    remove(out / FOLDER)
    for leftover in out.glob(f"{TEMPORARY}{name}-*"):
        remove(leftover)
    remove_shards(out)
    (out / PLAN_FILE).unlink(missing_ok=True)
    (out / JOB_FILE).unlink(missing_ok=True)


def _check_same(out: Path, stored: Manifest, job: Job, plan: Plan, here: Manifest | None) -> None:
    """Refuse to mix shards of two detectors, plans or settings, naming both sides."""
    if stored.name != job.settings.name:
        _refuse(out, "name", stored.name, job.settings.name)

    if here is None:
        check_same_job(out, job.settings, job.entry)
    else:
        _check_same_numbers(out, stored, here)

    _check_same_record(out, "shards", stored.plan, plan.record)


def _check_same_numbers(out: Path, stored: Manifest, here: Manifest) -> None:
    if stored.detector.dtype != here.detector.dtype:
        _refuse(out, "dtype", stored.detector.dtype, here.detector.dtype)

    if stored.detector != here.detector:
        _refuse(out, "detector", _describe(stored), _describe(here))

    for name, value in here.settings.items():
        if stored.settings.get(name) != value:
            _refuse(out, name, stored.settings.get(name), value)


def _check_same_plan(job: Job, plan: Plan) -> None:
    """Refuse to change a plan that others may already work on, before there is a manifest."""
    check_same_job(job.out, job.settings, job.entry)
    if (job.out / JOB_FILE).exists() and (job.out / PLAN_FILE).exists():
        _check_same_record(job.out, "the plan", planned_record(job.out), plan.record)


def _check_same_record(out: Path, what: str, stored: PlanRecord, here: PlanRecord) -> None:
    before = asdict(stored)
    for name, value in asdict(here).items():
        if before[name] != value and name not in SETTLED:
            _refuse(out, f"plan: {name}", before[name], value, what)


def _refuse(out: Path, what: str, old: object, new: object, held: str = "shards") -> None:
    raise UsageError(f"--out {out}: holds {held} of {what} {old}, this is {new}; give another --out, or --overwrite")


def _describe(manifest: Manifest) -> str:
    detector = manifest.detector
    config = hashlib.sha256(detector.config.encode()).hexdigest()
    hashes = f"{detector.weights} {detector.weights_sha256[:12]}, config {config[:12]}, preset {detector.preset}"
    return f"{detector.name} ({hashes})"
