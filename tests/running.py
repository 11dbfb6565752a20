"""Training as a user starts it, in processes of its own."""

import csv
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import warm
from support import TRAIN, later_wins

from oscar_train.logs.log import MEASURED

ENVIRONMENT = {**os.environ, **warm.SETTLED}
Running = warm.Process | subprocess.Popen[str]


def launch(*arguments: object, **keywords: Any) -> warm.Process:
    """Start `oscar-train`."""
    return warm.Process("oscar_train", *later_wins(TRAIN, *arguments), **keywords)


def launch_ranks(*arguments: object, ranks: int) -> list[warm.Process]:
    """Start as many of `oscar-train` as ranks, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [launch(*arguments, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def launch_fresh(*arguments: object, ranks: int = 1, env: Mapping[str, str] = ENVIRONMENT) -> "subprocess.Popen[str]":
    """Start `oscar-train` in a fresh process, or in as many of them as ranks by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [sys.executable, *torchrun, "-m", "oscar_train", *later_wins(TRAIN, *arguments)]
    return subprocess.Popen(line, text=True, stdout=-1, stderr=-1, env=env)


def finish(process: Running, code: int = 0) -> tuple[str, str]:
    """Wait for the end, see that it is the one expected, and return what was printed on stdout and stderr."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return printed, errors


def wait(process: Running, reached: Callable[[], bool]) -> None:
    """Wait until something is reached; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def rows(out: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the columns that are measurements."""
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def has_row(out: Path, step: int) -> bool:
    """Whether a step is in metrics.csv."""
    path = out / "metrics.csv"
    return path.exists() and f"\n{step}," in path.read_text()
