"""What the tests on a real SLURM do to its jobs and nodes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def ask(*command: str) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def queue() -> str:
    """The jobs that wait or run."""
    return ask("squeue", "--noheader", "--me", "--states=PENDING,RUNNING")


def state_of(job: str) -> str:
    """RUNNING, PENDING, ...; nothing once the job is gone from the queue."""
    done = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%T"], text=True, capture_output=True)
    return done.stdout.strip()


def node_of(job: str) -> str:
    """The node that a job runs on."""
    return ask("squeue", "--noheader", "--jobs", job, "--format", "%N").strip()


def wait_until(reached: Callable[[], object], what: str, seconds: float = 600) -> None:
    """Wait until something is reached; fail naming it if it is not."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached: {what}"
        time.sleep(0.2)


def end_time_limit_soon(job: str) -> None:
    """Shorten a job's time limit so that SLURM warns it within two minutes.

    It looks every half a minute: with less than that left it would not warn, but end the job.
    """
    elapsed = ask("squeue", "--noheader", "--jobs", job, "--format", "%M").strip()
    minutes, seconds = (int(part) for part in elapsed.split(":")[-2:])
    limit = minutes + (2 if seconds > 5 else 1)
    set_time_limit(job, limit)


def set_time_limit(job: str, minutes: int) -> None:
    """Change the time limit of a job, unless it has ended."""
    if state_of(job):
        ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def kill_node(folder: Path, node: str) -> None:
    """End everything on a node at once, as a power cut does, and have SLURM take it for down."""
    log = folder / "log" / f"slurmd.{node}.log"
    for process in map(Path, Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            if _is_of_node(process, node, log):
                os.kill(int(process.name), signal.SIGKILL)
    ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")


def signal_ranks(job: str, number: signal.Signals) -> None:
    """Send a signal to the processes of a training job that do its steps."""
    for process in map(Path, Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            is_rank = b"oscar_train" in command and b"torch.distributed.run" not in command and b"srun" not in command
            if is_rank and f"SLURM_JOB_ID={job}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), number)


def _is_of_node(process: Path, node: str, log: Path) -> bool:
    """Whether a process is a daemon of a node, or belongs to a job there."""
    if f"SLURMD_NODENAME={node}".encode() in (process / "environ").read_bytes().split(b"\0"):
        return True
    is_daemon = (process / "comm").read_text().startswith("slurm")
    return is_daemon and str(log) in [os.readlink(handle) for handle in (process / "fd").iterdir()]


def cancel_all() -> None:
    """Empty the queue."""
    ask("scancel", "--me")
    wait_until(lambda: not queue(), "an empty queue")
