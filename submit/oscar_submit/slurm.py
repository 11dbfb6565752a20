"""What is asked of SLURM: sbatch, squeue, scancel and scontrol, each as a function. `sacct` is never needed."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from oscar_common.errors import OperationError, UsageError, shorten

SECONDS = 60  # to wait for an answer
FORMAT = "%i|%F|%j|%T|%M|%N|%r"
HELD = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
LAUNCH_FAILED = "0:53"  # the exit code of a job whose log could not be opened

# What sbatch says, in its own words, and the key of the cluster to change.
REFUSALS = (
    (r"partition", "partition"),
    (r"account", "account"),
    (r"time limit", "time"),
    (r"gres|generic resource", "extract.gpus and train.gpus"),
    (r"node configuration|memory|cpu count|node count", "extract and train: gpus, cpus, memory, nodes"),
    (r"job array", "extract.workers"),
    (r"limit", "extract.workers and time"),
    (r"qos|option", "options"),
)


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A line of squeue: a job, an element of an array, or those elements of one that wait.

    id: like 12, 12_0 or 12_[1-3]. job: like 12. used: the time that it has run. reason: why it waits.
    """

    id: str
    job: str
    name: str
    state: str
    used: str
    nodes: str
    reason: str

    @property
    def is_waiting(self) -> bool:
        """Whether it is not running."""
        return self.state in HELD


@dataclass(frozen=True, kw_only=True)
class EndedJob:
    """A job that has ended, as long as the controller remembers it. code: like 1:0, its exit code and a signal."""

    job: str
    state: str
    code: str
    reason: str


def check_commands() -> None:
    """Refuse to go on where there is no SLURM.

    Raises:
        UsageError: in one line.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch: not on the PATH, so this is no machine of a SLURM cluster; submit from its login node, load its "
            "module, or give --dry-run to see the scripts"
        )


def check_array(workers: int, cluster: str) -> None:
    """Refuse more workers than an array of this cluster may have elements.

    Raises:
        UsageError: in one line.
    """
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"))
    if match is not None and workers > (elements := int(match[1]) - 1):
        raise UsageError(
            f"clusters.{cluster}.extract.workers {workers}: arrays of this cluster have at most {elements:,} elements; "
            f"give --workers {elements}, as each takes as many shards as it can"
        )


def submit(script: Path, cluster: str, dependency: str | None = None) -> str:
    """Submit a script and return the id of its job.

    Args:
        script: the file.
        cluster: its name in pipelines.yaml, for messages.
        dependency: like afterok:12; a job whose dependency can never be met goes from the queue.

    Raises:
        UsageError: SLURM refuses the job, in its own words.
    """
    after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    done = _run("sbatch", "--parsable", *after, str(script))
    if done.returncode == 0:
        return done.stdout.strip().partition(";")[0]

    words = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if "error" in line)
    words = words or done.stderr
    key = next((key for pattern, key in REFUSALS if re.search(pattern, words, re.IGNORECASE)), "")
    hint = f"; change clusters.{cluster}: {key}, in pipelines.yaml or with --set cluster.KEY=VALUE" if key else ""
    raise UsageError(f"sbatch refused {script}: {shorten(words)}{hint}")


def queued(names: Iterable[str]) -> list[QueuedJob]:
    """Return the jobs of this user that have one of these names and wait or run.

    Raises:
        OperationError: the controller does not answer.
    """
    text = _ask("squeue", "--noheader", "--me", "--name", ",".join(names), "--format", FORMAT)
    jobs = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != len(FORMAT.split("|")):
            continue
        job_id, job, name, state, used, nodes, reason = fields
        jobs.append(QueuedJob(id=job_id, job=job, name=name, state=state, used=used, nodes=nodes, reason=reason))

    return jobs


def ended(job: str) -> list[EndedJob]:
    """Return how a job, or each element of an array, ended; nothing once the controller has forgotten it."""
    done = _run("scontrol", "--oneliner", "show", "job", job)
    jobs = []
    for line in done.stdout.splitlines():
        fields = dict(re.findall(r"(JobId|JobState|ExitCode|Reason)=(\S+)", line))
        if {"JobId", "JobState", "ExitCode"} <= fields.keys():
            jobs.append(
                EndedJob(
                    job=fields["JobId"],
                    state=fields["JobState"],
                    code=fields["ExitCode"],
                    reason=fields.get("Reason", "None"),
                )
            )

    return jobs


def cancel(jobs: Iterable[str]) -> None:
    """Take jobs out of the queue; running ones are sent TERM, and killed some time after."""
    for job in jobs:
        _run("scancel", job)


def tell_to_end(jobs: Iterable[str]) -> None:
    """Send USR2 to the scripts of running jobs, which end their commands and give these the time that they need."""
    for job in jobs:
        _run("scancel", "--batch", "--signal=USR2", job)


def _ask(*command: str) -> str:
    done = _run(*command)
    if done.returncode != 0:
        raise OperationError(f"{command[0]}: {shorten(done.stderr.strip() or 'no answer')}")
    return done.stdout


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, text=True, capture_output=True, timeout=SECONDS)
    except FileNotFoundError:
        raise OperationError(f"{command[0]}: not on the PATH; this is no machine of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise OperationError(f"{command[0]}: no answer for {SECONDS} seconds; is the controller up?") from None
