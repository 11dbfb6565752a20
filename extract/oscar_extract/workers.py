"""Who does the shards: this process, processes of this machine, or the workers of a dask cluster.

Processes are dask workers, too: dask hands out a shard at a time, replaces a worker that dies, and gives its shard to
another one.
"""

import logging
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from multiprocessing import resource_tracker
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, Protocol

from distributed import KilledWorker, WorkerPlugin, get_worker

from oscar_common.errors import OperationError, UsageError, reason
from oscar_common.memory import free_memory
from oscar_extract.messages import DeviceFailure, Done, Job, OpenShard, Survey, Trial

Tell = Callable[[int, int, int], None]  # a shard, its images done so far, and the rejects among them
TOPIC = "oscar-extract"
TELL_SECONDS = 0.5
SHARE = 0.7  # of the free memory, which processes may fill
DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
POLL = 5.0  # seconds between looks at whether there are still, or more, workers
KILL_SECONDS = 5.0  # until a process that was killed is gone
PATIENCE = 60.0  # seconds without any worker before that is said


class Workers(Protocol):
    """Processes that extract shards. `lost`: how many died with a shard in hand."""

    lost: int

    @property
    def tries(self) -> bool:
        """Whether the survey needs images to try, as the number of processes depends on it."""

    def survey(self, job: Job, trial: Trial) -> Survey:
        """Have one of them load the detector and try it."""

    def extract(self, job: Job, open_shards: Iterator[OpenShard], tell: Tell) -> Iterator[Done]:
        """Do shards and yield what became of each, in any order. The next share is asked for when somebody is free."""

    def kill(self) -> None:
        """End those that would first finish their shards, so that these can be given back."""

    def describe(self) -> str:
        """Return how many they are."""


class Here:
    """This process alone, with a thread for each core."""

    lost = 0
    tries = False

    def survey(self, job: Job, trial: Trial) -> Survey:
        """See `Workers`."""
        from oscar_extract.shard_job import survey

        return survey(replace(job, threads=cores()), trial)

    def extract(self, job: Job, open_shards: Iterator[OpenShard], tell: Tell) -> Iterator[Done]:
        """See `Workers`."""
        from oscar_extract.shard_job import extract_shard

        for open_shard in open_shards:
            yield extract_shard(replace(job, threads=cores()), open_shard, partial(tell, open_shard.shard))

    def kill(self) -> None:
        """See `Workers`. This process has been stopped by then."""

    def describe(self) -> str:
        """See `Workers`."""
        return "1 process"


def cores() -> int:
    """Return how many cores this process may use."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def gpus() -> list[str]:
    """Return the CUDA devices of this machine, by the names that CUDA_VISIBLE_DEVICES takes."""
    if not any(map(os.path.exists, DRIVERS)):
        return []  # torch, which takes seconds to load, would say the same

    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (visible.split(",") if visible else [str(n) for n in range(count)])[:count]


@dataclass(kw_only=True)
class Dask:
    """The workers of a dask cluster. `lost`: how many died with a shard in hand."""

    client: Any
    grow: Callable[[Survey], tuple[int, int]] | None = None  # brings up those that fit; how many, and the cores of each
    threads: int = 0  # that detect in each worker; 0: as many as dask gave it
    size: int = 0  # how many workers there shall be; 0: as many as there are
    lost: int = 0
    processes: Callable[[], list[int]] = list  # of this machine, which end with this one

    @property
    def tries(self) -> bool:
        """See `Workers`."""
        return self.grow is not None

    def kill(self) -> None:
        """See `Workers`."""
        import psutil

        killed = [psutil.Process(number) for number in self.processes() if psutil.pid_exists(number)]
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, timeout=KILL_SECONDS)

    def survey(self, job: Job, trial: Trial) -> Survey:
        """See `Workers`."""
        with self._listening(lambda *_: None):
            ((_, future),) = self._done(iter([(_survey_task, anywhere(job), trial)]))
            try:
                result: Survey = future.result()
            except KilledWorker:
                raise OperationError(
                    "every worker that loaded the detector and tried it died (out of memory?); see the workers' logs"
                ) from None

        if self.grow:
            self.size, self.threads = self.grow(result)

        return result

    def extract(self, job: Job, open_shards: Iterator[OpenShard], tell: Tell) -> Iterator[Done]:
        """See `Workers`. A shard that kills its workers again and again is given up; the others go on.

        Raises:
            OperationError: the cluster is gone, or, at the end, shards were given up.
        """
        job, killers = replace(anywhere(job), threads=self.threads), []
        with self._listening(tell):
            for (_, _, open_shard), future in self._done(
                (_extract_task, job, open_shard) for open_shard in open_shards
            ):
                try:
                    yield future.result()
                except KilledWorker:
                    killers.append(open_shard.shard)

        if killers:
            raise given_up(killers)

    def _done(self, calls: Iterator[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Have functions called on the workers, one at a time on each, and yield (the call, its future) when done."""
        waiting = True
        running: dict[str, tuple[Any, ...]] = {}
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        since = monotonic()

        try:
            while waiting or running:
                while waiting and len(running) < max(1, self.count()):
                    call = next(calls, None)
                    if call is None:
                        waiting = False
                        break

                    function, *arguments = call
                    # A task of the same name that still runs for a client that was killed is joined, not done twice.
                    key = f"{TOPIC}-{sha256(repr(arguments).encode()).hexdigest()}"
                    future = self.client.submit(function, *arguments, key=key, pure=False)
                    running[future.key] = call
                    future.add_done_callback(done.put)

                if not running:
                    return

                try:
                    future = done.get(timeout=POLL)
                except queue.Empty:
                    since = self._check(since)
                    continue

                if future.status == "cancelled":
                    raise OperationError("the dask scheduler dropped the work; the same command again continues")

                yield running.pop(future.key), future
        finally:
            self.client.cancel([*running])

    def _check(self, since: float) -> float:
        """Say if there are no workers, or no scheduler; return when there were some last."""
        if self.client.status != "running":
            raise OperationError("the dask scheduler is gone; the same command again continues")
        if self.client.nthreads():
            return monotonic()
        if monotonic() - since < PATIENCE:
            return since

        print("the dask scheduler has no workers; waiting for some", file=sys.stderr, flush=True)
        return monotonic()

    @contextmanager
    def _listening(self, tell: Tell) -> Iterator[None]:
        """Hear of progress from the workers, and from the scheduler of workers that died, while the block runs."""

        def worker_says(event: tuple[float, Any]) -> None:
            tell(*event[1])

        def scheduler_says(event: tuple[float, Any]) -> None:
            if isinstance(event[1], dict) and event[1].get("action") == "remove-worker":
                self.lost += bool(event[1].get("processing-tasks"))

        self.client.subscribe_topic(TOPIC, worker_says)
        self.client.subscribe_topic("all", scheduler_says)
        try:
            yield
        finally:
            if self.client.status == "running":
                self.client.unsubscribe_topic(TOPIC)
                self.client.unsubscribe_topic("all")

    def count(self) -> int:
        """Return how many workers there are, or shall be."""
        return self.size or len(self.client.nthreads())

    def describe(self) -> str:
        """See `Workers`."""
        return f"{self.count()} processes" if self.count() != 1 else "1 process"


def given_up(shards: list[int]) -> OperationError:
    """Return the error of shards that killed one worker after the other."""
    names = ", ".join(f"{number:06d}" for number in sorted(shards))
    return OperationError(
        f"shards {names} were given up: all workers that tried them died (out of memory? see the workers' logs); the "
        "others are done, and the same command again tries these"
    )


def anywhere(job: Job) -> Job:
    """Return the job with the detector's files by paths that hold in any working folder."""
    files = {name: given for name, given in vars(job.entry).items() if given and Path(given).is_file()}
    return replace(job, entry=replace(job.entry, **{n: str(Path(given).absolute()) for n, given in files.items()}))


ONE_AT_A_TIME = Lock()  # a dask worker may have several threads, but has one detector and the memory for one shard


def _survey_task(job: Job, trial: Trial) -> Survey:
    from oscar_extract.shard_job import survey

    with _giving_way():
        return survey(replace(job, threads=job.threads or get_worker().state.nthreads), trial)


def _extract_task(job: Job, open_shard: OpenShard) -> Done:
    from oscar_extract.shard_job import extract_shard

    worker, last_report = get_worker(), 0.0

    def tell(images: int, rejects: int) -> None:
        nonlocal last_report
        if monotonic() - last_report > TELL_SECONDS:
            last_report = monotonic()
            worker.log_event(TOPIC, (open_shard.shard, images, rejects))

    with _giving_way():
        return extract_shard(replace(job, threads=job.threads or worker.state.nthreads), open_shard, tell)


@contextmanager
def _giving_way() -> Iterator[None]:
    """End this worker if its GPU fails: nothing can be done with it in this process; dask gives the task to another."""
    try:
        with ONE_AT_A_TIME:
            yield
    except DeviceFailure as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def local_cluster(count: int, devices: list[str], shared_cores: int) -> Iterator[Dask]:
    """Yield processes on this machine: one at first, and as many as memory allows, up to `count`, after the survey."""
    import dask
    from distributed import Client, LocalCluster

    environment = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}

    with dask.config.set({"distributed.nanny.pre-spawn-environ": environment}), _deaf_threads():
        cluster = LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL + 1,
        )

    with dask.config.set({"distributed.nanny.pre-spawn-environ": environment}), cluster, Client(cluster) as client:
        client.register_plugin(_Seat(devices=devices))

        def grow(found: Survey) -> tuple[int, int]:
            size = min(count, 1 + int(SHARE * free_memory() / max(found.memory, 1)))
            cluster.scale(size)
            return size, max(1, shared_cores // size)

        yield Dask(client=client, grow=grow, processes=partial(_processes_of, cluster))


def _processes_of(cluster: Any) -> list[int]:
    """Return the ids of a local cluster's processes, which are not restarted from now on."""
    for nanny in cluster.workers.values():
        nanny.auto_restart = False
    processes = [nanny.process for nanny in cluster.workers.values()]
    return [process.pid for process in processes if process is not None and process.pid is not None]


@contextmanager
def _deaf_threads() -> Iterator[None]:
    """Have threads that start in the block, and the processes that they start, not hear Ctrl-C: this one tells them."""
    resource_tracker.ensure_running()  # if it started in the block it would undo this
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def remote_cluster(address: str) -> Iterator[Dask]:
    """Yield the workers of a scheduler.

    Raises:
        UsageError: nobody answers there.
    """
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--scheduler {address}: no dask scheduler answers there: {reason(error)}") from None

    with client:
        yield Dask(client=client)


class _Seat(WorkerPlugin):
    """Gives each of this machine's workers a GPU of its own, before torch is there."""

    name = TOPIC

    def __init__(self, devices: list[str]) -> None:
        self.devices = devices

    def setup(self, worker: Any) -> None:
        """Run in the worker when it starts."""
        if self.devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices[int(worker.name) % len(self.devices)]
