"""What it costs that workers share a folder: a simulation of many of them, some of which die.

    python bench/claims.py

The workers' time is simulated, and so are their shards, which are empty. All that they do in the folder is real: each
claim, sign of life, look and rename is that of oscar-extract, on this machine's disk, and counted. A worker that dies
leaves its claim, and another one takes its place after two minutes. What the operations would take on a file server is
worked out from --latency. The numbers go to bench/results/claims.json.
"""

import heapq
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pyarrow.parquet as parquet
from rich.console import Console
from rich.table import Table

from machine import machine
from oscar_common.files import move
from oscar_common.settings import Detector, Extract
from oscar_extract.folder import finish, naming
from oscar_extract.folder.claim import Process
from oscar_extract.folder.remaining import Remaining
from oscar_extract.folder.take import BEAT, Held, take
from oscar_extract.messages import Job, OpenShard
from oscar_extract.run import POLL
from oscar_shards.index import index_path
from oscar_shards.manifest import Layout, PlanRecord
from oscar_shards.write import shard_path, write_shard

REPLACED_AFTER = 120.0  # seconds until a scheduler has started another worker
PER_LISTING = 500  # names of a folder that a file server sends at once
SKEW = 300.0  # seconds by which clocks differ, at most
HOUR = 3600.0


@dataclass
class Operations:
    """What was asked of the file system, by kind; what a listing of a folder takes depends on its length."""

    counts: Counter[str] = field(default_factory=Counter)
    names: int = 0
    is_counting: bool = False

    def add(self, kind: str) -> None:
        if self.is_counting:
            self.counts[kind] += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False

    @property
    def requests(self) -> float:
        """How often a file server is asked."""
        return self.counts.total() + self.names / PER_LISTING


@dataclass(kw_only=True)
class Worker:
    """A worker, what it has in hand and since when, and when it dies."""

    process: Process
    dies_at: float
    skew: float
    remaining: Remaining | None = None
    held: Held | None = None
    open_shard: OpenShard | None = None
    since: float = 0.0


@dataclass(kw_only=True)
class Simulation:
    """Workers in a folder, and what happens next: at which second, in which order, and what."""

    job: Job
    record: PlanRecord
    shard_seconds: float
    deaths_per_hour: float
    operations: Operations
    rng: random.Random
    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=count)
    workers: int = 0
    deaths: int = 0
    worked: float = 0.0
    lost: float = 0.0
    waited: float = 0.0
    claimed_at: list[float] = field(default_factory=list)

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), event))

    def run(self) -> None:
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()

    def start(self) -> None:
        self.workers += 1
        name = f"node{self.workers}"
        worker = Worker(
            process=Process(host=name, pid=self.workers, machine=name, started=0),
            dies_at=self.now + self.rng.expovariate(self.deaths_per_hour / HOUR),
            skew=self.rng.uniform(-SKEW, SKEW),
        )
        with self.operations.counted():
            worker.remaining = Remaining(self.job, self.record, worker.process, lambda: self.now + worker.skew)
        self.later(0, lambda: self.pick(worker))

    def is_dead(self, worker: Worker) -> bool:
        """Whether a worker has died by now; then its work is lost, and another worker comes."""
        if self.now < worker.dies_at:
            return False
        if worker.remaining is not None:
            worker.remaining = None
            self.deaths += 1
            self.lost += worker.dies_at - worker.since if worker.held is not None else 0.0
            self.later(REPLACED_AFTER, self.start)
        return True

    def pick(self, worker: Worker) -> None:
        if self.is_dead(worker) or worker.remaining is None:
            return
        with self.operations.counted():
            open_shard = next(worker.remaining.open_shards(), None)
            if not worker.remaining.left:
                worker.remaining.finish()
                return
            if open_shard is None:
                self.waited += POLL
                self.later(POLL, lambda: self.pick(worker))
                return
            worker.held = take(
                self.job.out, shard_path(self.job.out, "shard", open_shard.shard), open_shard, worker.process
            )
        if worker.held is None:  # another one was faster
            self.later(0, lambda: self.pick(worker))
            return
        self.claimed_at.append(self.now)
        worker.open_shard, worker.since = open_shard, self.now
        held = worker.held
        self.later(BEAT, lambda: self.beat(worker, held))
        self.later(self.shard_seconds * self.rng.uniform(0.8, 1.2), lambda: self.finish(worker))

    def beat(self, worker: Worker, held: Held) -> None:
        if self.is_dead(worker) or worker.held is not held:
            return
        with self.operations.counted():
            held.beat()
        self.later(BEAT, lambda: self.beat(worker, held))

    def finish(self, worker: Worker) -> None:
        if self.is_dead(worker) or worker.held is None or worker.open_shard is None or worker.remaining is None:
            return
        with self.operations.counted():
            done = finish.finish_shard(worker.held, worker.open_shard, [], Layout(feature_dim=1))
        if done:
            worker.remaining.left.pop(worker.open_shard.shard)
            self.worked += self.now - worker.since
        worker.held = None
        self.pick(worker)


@click.command(help=__doc__)
@click.option("--shards", default=4100)
@click.option("--workers", default=64)
@click.option("--deaths", default=0.05, help="Share of the workers that die in an hour.")
@click.option("--shard-seconds", default=100.0, help="What a shard takes: 1,000 images at 10 a second.")
@click.option("--latency", default=0.001, help="Seconds that a file server takes for an operation.")
@click.option(
    "--place", type=click.Path(path_type=Path), help="Where to make the folder. [default: the system's place]"
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results"), help="Folder for the numbers.")
def main(
    shards: int, workers: int, deaths: float, shard_seconds: float, latency: float, place: Path | None, out: Path
) -> None:
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(dir=place) as folder,
        watched_operations() as operations,
        simulated_shards(Path(folder), operations) as names,
    ):
        shared = Path(folder) / "out"
        shared.mkdir()
        simulation = Simulation(
            job=Job(out=shared, settings=Extract(out=str(shared)), entry=Detector()),
            record=planned(shards),
            shard_seconds=shard_seconds,
            deaths_per_hour=deaths,
            operations=operations,
            rng=random.Random(0),
        )
        for _ in range(workers):
            simulation.start()
        simulation.run()
        left = Remaining(simulation.job, simulation.record)
        files = Counter(path.suffix for path in shared.iterdir())

    report = summary(simulation, workers, latency)
    report |= {"shards_left": len(left.left), "named_twice": sum(n > 1 for n in names.values()), "files": dict(files)}
    report |= {"seconds_to_simulate": round(time.perf_counter() - began, 1), "machine": machine()}
    show(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "claims.json").write_text(json.dumps(report, indent=1) + "\n")


def planned(shards: int) -> PlanRecord:
    return PlanRecord(
        images="simulated",
        captions=None,
        num_images=shards,
        num_texts=0,
        images_per_shard=1,
        num_shards=shards,
        sha256="0",
    )


@contextmanager
def watched_operations() -> Iterator[Operations]:
    """Count what Python asks of the file system while the block runs."""
    operations = Operations()
    kinds = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in kinds:
            operations.add(event.removeprefix("os."))

    listdir = os.listdir

    def counted_listdir(path: Any) -> list[str]:
        names: list[str] = listdir(path)
        operations.add("list")
        operations.names += len(names) if operations.is_counting else 0
        return names

    def also(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            operations.add(kind)
            return function(*arguments, **options)

        return counted

    sys.addaudithook(note)
    with (
        patch.object(os, "stat", also("stat", os.stat)),
        patch.object(os, "fsync", also("fsync", os.fsync)),
        patch.object(os, "listdir", counted_listdir),
        patch.object(parquet, "read_schema", also("open", parquet.read_schema)),
    ):
        yield operations


@contextmanager
def simulated_shards(folder: Path, operations: Operations) -> Iterator[Counter[str]]:
    """Have an empty shard copied where one is to be written; yield how often each final name was given, so far."""
    empty = folder / "empty.tar"
    write_shard(empty, [], Layout(feature_dim=1))
    names = Counter[str]()

    def copy(tar: Path, *_: object) -> None:
        counting, operations.is_counting = operations.is_counting, False
        shutil.copyfile(empty, tar)
        shutil.copyfile(index_path(empty), index_path(tar))
        operations.is_counting = counting

    def noted(source: Path, path: Path) -> None:
        move(source, path)
        names[path.name] += 1

    with patch.object(finish, "write_shard", copy), patch.object(naming, "move", noted):
        yield names


def summary(simulation: Simulation, workers: int, latency: float) -> dict[str, Any]:
    shards, operations, hours = simulation.record.num_shards, simulation.operations, simulation.now / HOUR
    paid = simulation.now * workers
    busiest = max(Counter(int(at) for at in simulation.claimed_at).values())
    return {
        "shards": shards,
        "workers": workers,
        "shard_seconds": simulation.shard_seconds,
        "hours": round(hours, 2),
        "deaths": simulation.deaths,
        "claims": len(simulation.claimed_at),
        "claims_per_second": round(len(simulation.claimed_at) / simulation.now, 2),
        "claims_in_the_busiest_second": busiest,
        "operations_per_shard": round(operations.counts.total() / shards, 1),
        "operations_per_shard_by_kind": {k: round(n / shards, 1) for k, n in operations.counts.most_common()},
        "names_listed_per_shard": round(operations.names / shards),
        "requests_per_second": round(operations.requests / simulation.now, 1),
        "latency_seconds": latency,
        "overhead": round(operations.requests * latency / paid, 5),
        "lost_to_deaths": round(simulation.lost / paid, 5),
        "waiting_for_others": round(simulation.waited / paid, 5),
        "working": round(simulation.worked / paid, 5),
    }


def show(report: dict[str, Any]) -> None:
    table = Table("", "", title="claims", title_justify="left", show_header=False)
    for name, value in report.items():
        table.add_row(name.replace("_", " "), str(value))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
