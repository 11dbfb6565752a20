"""Many workers of one job for the price of one: a process that has imported torch and loaded the detector forks them.

`python nursery.py FOLDER` reads a line of JSON for each worker from stdin, and answers with its process id; an empty
object asks for the exit code of a worker that has ended: [process id, code]. Each worker runs the real command, as if
it were on a machine of its own whose clock is wrong.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support import EXTRACT

from oscar_common import cli
from oscar_extract.folder import claim, naming, take, watch
from oscar_extract.folder.job_file import read_job


class Nursery:
    """Starts workers of the job in `out`; their output goes to files in `logs`."""

    def __init__(self, out: Path, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(exist_ok=True)
        line = [sys.executable, __file__, str(out)]
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(line, text=True, stdin=-1, stdout=-1, env=environment)
        self.out = out
        self.running: set[int] = set()

    def start(self, *arguments: object, beat: float = 0.2, patience: float = 2.0, skew: float = 0.0) -> int:
        """Start `oscar-extract --resume OUT` and return its process id."""
        words = ["--resume", str(self.out), "--workers", "1", *map(str, arguments)]
        logs = str(self.logs)
        pid = self._ask({"words": words, "beat": beat, "patience": patience, "skew": skew, "logs": logs})
        self.running.add(pid)
        return pid

    def wait(self) -> tuple[int, int]:
        """Wait until some worker has ended; return its process id and its exit code (or minus the signal's number)."""
        pid, code = self._ask({})
        self.running.remove(pid)
        return pid, code

    def printed(self, pid: int) -> str:
        """What a worker has printed."""
        return (self.logs / f"{pid}.txt").read_text()

    def named(self) -> list[str]:
        """The final names that workers have given, in the order in which they did."""
        return (self.logs / "names").read_text().splitlines()

    def close(self) -> None:
        """End all of them."""
        for pid in self.running:
            os.kill(pid, 9)
        self._server.kill()
        self._server.communicate()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(question), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


def main(out: Path) -> None:
    from oscar_extract.messages import Job
    from oscar_extract.shard_job import equip

    settings, entry = read_job(out)
    equip(Job(out=out, settings=settings, entry=entry))
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            answer: object = os.fork() or work(**question)
        else:
            pid, status = os.wait()
            answer = [pid, os.waitstatus_to_exitcode(status)]
        print(json.dumps(answer), flush=True)


def work(words: list[str], beat: float, patience: float, skew: float, logs: str) -> None:
    """Be a worker, on a machine of its own."""
    take.BEAT, watch.PATIENCE = beat, patience
    right = time.time
    time.time = lambda: right() + skew
    itself = dataclasses.replace(claim.this_process(), machine=f"machine of {os.getpid()}")
    for module in (take, sys.modules["oscar_extract.folder.remaining"]):
        module.this_process = lambda: itself  # type: ignore[attr-defined]
    random.seed(os.getpid())

    output = os.open(f"{logs}/{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    names = os.open(f"{logs}/names", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    move = naming.move

    def noted(source: Path, path: Path) -> None:
        move(source, path)
        os.write(names, f"{path.name}\n".encode())

    naming.move = noted
    try:
        cli.run(EXTRACT, words)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(70)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
