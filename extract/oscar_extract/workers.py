"""Who does the shards: this process, processes of this machine, or the workers of a dask cluster.

Processes are dask workers, too: dask hands out a shard at a time, replaces a worker that dies, and gives its shard to
another one.
"""

import logging
import os
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from distributed import WorkerPlugin

from oscar_common.errors import OperationError, UsageError
from oscar_extract.job import DeviceFailure, Done, Job, Survey, extract_shard, survey
from oscar_extract.plan import PlannedImage
from oscar_shards.manifest import PlanRecord

Tell = Callable[[int, int, int], None]  # a shard, its images done so far, and the rejects among them
TOPIC = "oscar-extract"
TELL_SECONDS = 0.5
SHARE = 0.7  # of the free memory, which processes may fill
PATIENCE = 60.0  # seconds without any worker before that is said


class Workers(Protocol):
    """Processes that extract shards. `lost`: how many died with a shard in hand."""

    lost: int

    def survey(
        self, job: Job, plan: PlanRecord, roots: list[Path], sample: list[PlannedImage], seconds: float
    ) -> Survey:
        """Have one of them load the detector and try it."""

    def extract(self, job: Job, shards: list[int], tell: Tell) -> Iterator[Done]:
        """Do shards and yield what became of each, in any order."""

    def describe(self) -> str:
        """Return how many they are."""


class Here:
    """This process alone, with a thread for each core."""

    lost = 0

    def survey(
        self, job: Job, plan: PlanRecord, roots: list[Path], sample: list[PlannedImage], seconds: float
    ) -> Survey:
        """See `Workers`."""
        return survey(replace(job, threads=cores()), plan, roots, sample, seconds)

    def extract(self, job: Job, shards: list[int], tell: Tell) -> Iterator[Done]:
        """See `Workers`."""
        for number in shards:
            yield extract_shard(replace(job, threads=cores()), number, partial(tell, number))

    def describe(self) -> str:
        """See `Workers`."""
        return "1 process"


def cores() -> int:
    """Return how many cores this process may use."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def gpus() -> list[str]:
    """Return the CUDA devices of this machine, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (visible.split(",") if visible else [str(n) for n in range(count)])[:count]


def free_memory() -> int:
    """Return the bytes of memory that are free on this machine, within what this process is allowed."""
    import psutil
    from distributed.system import MEMORY_LIMIT

    memory = psutil.virtual_memory()
    return int(min(memory.available, MEMORY_LIMIT))


@dataclass(kw_only=True)
class Dask:
    """The workers of a dask cluster. `lost`: how many died with a shard in hand."""

    client: Any
    grow: Callable[[Survey], int] | None = None  # brings up the workers that fit, and returns the cores of each
    threads: int = 0  # that detect in each worker; 0: as many as dask gave it
    lost: int = 0
    failed: dict[int, str] = field(default_factory=dict)

    def survey(
        self, job: Job, plan: PlanRecord, roots: list[Path], sample: list[PlannedImage], seconds: float
    ) -> Survey:
        """See `Workers`."""
        future = self.client.submit(survey, job, plan, roots, sample, seconds, pure=False, resources={TOPIC: 1})
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future.add_done_callback(done.put)
        found: Survey = self._next(done).result()
        if self.grow:
            self.threads = self.grow(found)
        return found

    def extract(self, job: Job, shards: list[int], tell: Tell) -> Iterator[Done]:
        """See `Workers`. A shard that kills its workers again and again is given up; the others go on.

        Raises:
            OperationError: the cluster is gone, or, at the end, shards were given up.
        """
        from distributed import KilledWorker

        run = sha256(repr(job).encode()).hexdigest()[:12]
        self._listen(tell)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        numbers = {}
        for number in shards:
            key = (
                f"{TOPIC}-{run}-{number:06d}"  # a task of the same name that still runs for an earlier client is joined
            )
            future = self.client.submit(
                _extract_task, replace(job, threads=self.threads), number, key=key, pure=False, resources={TOPIC: 1}
            )
            numbers[future] = number
            future.add_done_callback(done.put)
        try:
            for _ in range(len(shards)):
                future = self._next(done)
                try:
                    yield future.result()
                except KilledWorker as error:
                    self.failed[numbers[future]] = str(error)
        finally:
            self.client.cancel(list(numbers))
            self.client.unsubscribe_topic(TOPIC)
            self.client.unsubscribe_topic("all")
        if self.failed:
            names = ", ".join(f"{n:06d}" for n in sorted(self.failed))
            raise OperationError(
                f"shards {names} were given up: each of their workers died (out of memory? see the workers' logs); the "
                "others are done, and the same command again tries these"
            )

    def _listen(self, tell: Tell) -> None:
        def worker_says(event: tuple[float, Any]) -> None:
            tell(*event[1])

        def scheduler_says(event: tuple[float, Any]) -> None:
            if isinstance(event[1], dict) and event[1].get("action") == "remove-worker":
                self.lost += bool(event[1].get("processing-tasks"))

        self.client.subscribe_topic(TOPIC, worker_says)
        self.client.subscribe_topic("all", scheduler_says)

    def _next(self, done: "queue.SimpleQueue[Any]") -> Any:
        """Return the next future that is done, saying so if there are no workers to do any."""
        since = monotonic()
        while True:
            try:
                future = done.get(timeout=5)
            except queue.Empty:
                if self.client.status != "running":
                    raise OperationError("the dask scheduler is gone; the same command again continues") from None
                if self.count():
                    since = monotonic()
                elif monotonic() - since > PATIENCE:
                    print("the dask scheduler has no workers; waiting for some", file=sys.stderr, flush=True)
                    since = monotonic()
                continue
            if future.status == "cancelled":
                raise OperationError("the dask scheduler dropped the work; the same command again continues")
            return future

    def count(self) -> int:
        """Return how many workers there are now."""
        return len(self.client.scheduler_info(n_workers=-1)["workers"])

    def describe(self) -> str:
        """See `Workers`."""
        return f"{self.count()} processes" if self.count() != 1 else "1 process"


def _extract_task(job: Job, number: int) -> Done:
    from distributed import get_worker

    worker, told = get_worker(), 0.0

    def tell(images: int, rejects: int) -> None:
        nonlocal told
        if monotonic() - told > TELL_SECONDS:
            told = monotonic()
            worker.log_event(TOPIC, (number, images, rejects))

    try:
        return extract_shard(replace(job, threads=job.threads or worker.state.nthreads), number, tell)
    except DeviceFailure as error:
        print(f"error: {error}; this worker ends", file=sys.stderr, flush=True)
        os._exit(1)  # nothing can be done with the GPU in this process; dask gives the shard to another


@contextmanager
def local_cluster(count: int, devices: list[str], shared_cores: int) -> Iterator[Dask]:
    """Yield processes on this machine: one at first, and as many as memory allows, up to `count`, after the survey."""
    import dask
    from distributed import Client, LocalCluster

    environment = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": environment}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            memory_limit=0,
            silence_logs=logging.CRITICAL + 1,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_Seat(devices=devices))

        def grow(found: Survey) -> int:
            fit = 1 + int(SHARE * free_memory() / max(found.memory, 1))
            cluster.scale(min(count, fit))
            return max(1, shared_cores // min(count, fit))

        yield Dask(client=client, grow=grow)


@contextmanager
def remote_cluster(address: str) -> Iterator[Dask]:
    """Yield the workers of a scheduler.

    Raises:
        UsageError: nobody answers there.
    """
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)
    try:
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--scheduler {address}: no dask scheduler answers there: {error or type(error).__name__}"
        ) from None
    with client:
        client.register_plugin(_Seat(devices=[]))
        yield Dask(client=client)


class _Seat(WorkerPlugin):
    """Lets a worker do one shard at a time, and gives each of this machine's workers a GPU of its own."""

    name = TOPIC
    idempotent = True

    def __init__(self, devices: list[str]) -> None:
        self.devices = devices

    async def setup(self, worker: Any) -> None:
        """Run in the worker when it starts, before any task, and so before torch is there."""
        if self.devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices[int(worker.name) % len(self.devices)]
        await worker.set_resources(**{TOPIC: 1})
