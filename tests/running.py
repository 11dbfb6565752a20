"""Training as a user starts it, in processes of its own."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support import TRAIN, later_wins

from oscar_train.logs.log import MEASURED

# One thread: on a busy machine two that wait for each other take many times as long, and sums may round differently.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(*arguments: object, ranks: int = 1, **keywords: object) -> "subprocess.Popen[str]":
    """Start `oscar-train`, or as many of it as ranks by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [sys.executable, *torchrun, "-m", "oscar_train", *later_wins(TRAIN, *arguments)]
    return subprocess.Popen(line, text=True, stdout=-1, stderr=-1, **{"env": ENVIRONMENT, **keywords})


def finish(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    """Wait for the end, see that it is the one expected, and return what was printed on stdout and stderr."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return printed, errors


def wait(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> None:
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
