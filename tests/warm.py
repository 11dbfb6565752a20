"""Processes that begin with torch loaded, which takes a fresh one most of ten seconds.

They are forked from a server that has imported what the commands import, and has done nothing else. Each is a child of
the process that asks for it, with arguments, environment, working directory and output of its own: it is killed, hears
signals and ends as if `python -m MODULE` had started it.
"""

import atexit
import ctypes
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NoReturn

PRELOADED = (
    "oscar_train.training.loop",
    "oscar_train.evaluation.evaluate",
    "oscar_extract.shard_job",
    "oscar_extract.run",
)
READ_BY_IMPORTS = ("CUDA_", "GOMP_", "HF_", "LD_", "OMP_", "PYTHONPATH", "TORCH_", "TRITON_")
PR_SET_CHILD_SUBREAPER = 36

# One thread: on a busy machine two that wait for each other take many times as long, and sums may round differently.
SETTLED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Process:
    """What a test needs of `subprocess.Popen`; its output is kept in memory, so nobody has to read it meanwhile.

    Args:
        module: what to run, as `python -m` does; or `-c`, and the first of the arguments is code.
        arguments: those of the command line.
        env: changes to the environment.
        limits: the most that the process may take, by `resource.RLIMIT_...`.
        new_session: whether it leads a group of processes of its own.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        env: Mapping[str, str] = MappingProxyType({}),
        limits: Mapping[int, int] = MappingProxyType({}),
        new_session: bool = False,
    ) -> None:
        self.args = [module, *map(str, arguments)]
        self.returncode: int | None = None
        self._outputs = [os.memfd_create("stdout"), os.memfd_create("stderr")]
        self._printed = ["", ""]
        self.pid = _server().fork(
            {
                "words": self.args,
                "env": {**os.environ, **SETTLED, **env},
                "cwd": os.getcwd(),
                "limits": [*limits.items()],
                "new_session": new_session,
            },
            self._outputs,
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self._printed = [self.printed(output) for output in range(2)]
                while self._outputs:
                    os.close(self._outputs.pop())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, and return what was printed on stdout and stderr."""
        self.wait(timeout)
        return self.printed(0), self.printed(1)

    def printed(self, output: int = 0) -> str:
        """Return what was printed until now, on stdout (0) or stderr (1)."""
        if not self._outputs:
            return self._printed[output]
        descriptor = self._outputs[output]
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that others are forked from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = {**os.environ, **SETTLED}
        line = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            line, env=self._environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        atexit.register(self._close)

    def _close(self) -> None:
        self._channel.close()
        self._process.wait()

    def fork(self, request: dict[str, Any], outputs: list[int]) -> int:
        """Start a process as a child of this one; return its id."""
        differing = {name for name, _ in request["env"].items() ^ self._environment.items()}
        late = [name for name in differing if name.startswith(READ_BY_IMPORTS)]
        assert not late, f"{late} would count for nothing after the imports; start a fresh process"

        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(PR_SET_CHILD_SUBREAPER, 1)  # a process whose parent has ended becomes a child of this one
            socket.send_fds(self._channel, [json.dumps(request).encode()], outputs)
            pid = int(self._channel.recv(100))
            assert self._channel.recv(100) == b"its parent has ended"
            prctl(PR_SET_CHILD_SUBREAPER, 0)
        return pid


@cache
def _server() -> Server:
    return Server()


def serve(channel: socket.socket) -> None:
    """Import, and fork a process for each request, until nobody can ask any more."""
    from oscar_common.cli import SPIN
    from oscar_train.arguments import FEW_SHAPES

    os.environ |= {**SPIN, **FEW_SHAPES}
    for module in PRELOADED:
        import_module(module)
    gc.collect()
    gc.freeze()
    while True:
        request, outputs, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not request:
            return
        parent = os.fork()
        if parent == 0:
            pid = os.fork()
            if pid == 0:
                channel.close()
                become(outputs, **json.loads(request))
            channel.send(str(pid).encode())
            os._exit(0)
        os.waitpid(parent, 0)
        channel.send(b"its parent has ended")
        for output in outputs:
            os.close(output)


def become(
    outputs: list[int],
    words: list[str],
    env: dict[str, str],
    cwd: str,
    limits: list[tuple[int, int]],
    new_session: bool,
) -> NoReturn:
    """Go on as `python -m` or `python -c` would."""
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
    for kind, most in limits:
        resource.setrlimit(kind, (most, most))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)

    sys.path[0] = cwd
    sys.argv = words
    if words[0] == "-c":
        exec(words.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
