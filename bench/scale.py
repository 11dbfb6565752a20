"""How long planning takes at the size of Oscar's corpus, how much memory, and how soon a half-done job goes on.

    python bench/scale.py

The rows are as many as the real ones, 4.1M images with 6.5M texts, in two forms: the published layouts of all seven
datasets with 12 bytes for each image (in img2dataset's tars for Conceptual Captions and SBU, as millions of files
take too long to make and to delete; in files for the others), and a manifest that names images which do not exist.
Every job runs in a process of its own; memory is the most that it held, the imports included. The files were made
just before, so their directories are cached. The numbers go to bench/results/scale.json.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from simulated import IMAGES_OF, OSCAR, WORDS, Sizes, make_manifest, make_published

Result = TypeVar("Result")

# What all jobs import is imported once, by the process that they are forked from.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["__main__", "oscar_extract.plan", "oscar_extract.sources.request", "oscar_extract.messages"]
)


@dataclass
class Clock:
    """Seconds, those of processors (of ended processes that the job started, too), and the most memory, by stage."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the most from here on
        start, busy = time.perf_counter(), sum(os.times()[:4])
        yield
        seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - busy
        self.stages[name] = {"seconds": round(seconds, 3), "cpu_seconds": round(busy, 2), "peak_gb": memory("VmHWM")}


def memory(name: str) -> float:
    """Return VmRSS or VmHWM, the most so far, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(x.split()[1]) for x in lines if x.startswith(f"{name}:")) * 1024 / 1e9, 3)


@click.command(help=__doc__)
@click.option("--scale", default=1.0, help="Share of Oscar's corpus.")
@click.option("--part", "parts", type=click.Choice(["published", "manifest"]), multiple=True, help="[default: both]")
@click.option("--images-per-shard", default=1000)
@click.option("--place", type=click.Path(path_type=Path), help="Where to make the files. [default: the system's place]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results"), help="Folder for the numbers.")
def main(scale: float, parts: tuple[str, ...], images_per_shard: int, place: Path | None, out: Path) -> None:
    sizes = {name: (max(4, int(i * scale)), max(4, int(t * scale))) for name, (i, t) in OSCAR.items()}
    report: dict[str, Any] = {"scale": scale, "images_per_shard": images_per_shard}
    for part in parts or ("published", "manifest"):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            report[part] = measure(part, sizes, images_per_shard, Path(folder))
            show(part, report[part])
    report |= circumstances()
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.json").write_text(json.dumps(report, indent=1) + "\n")


def measure(part: str, sizes: Sizes, images_per_shard: int, place: Path) -> dict[str, Any]:
    start = time.perf_counter()
    if part == "published":
        make_published(place / "data", sizes)
        settings: dict[str, Any] = {"dataset": [",".join(sizes)], "root": [str(place / "data")]}
    else:
        make_manifest(place / "manifest.parquet", sizes)
        settings = {"images": str(place / "manifest.parquet")}
    made = round(time.perf_counter() - start, 1)
    settings |= {"out": str(place / "shards"), "images_per_shard": images_per_shard}
    (place / "shards").mkdir()
    planned = apart(plan, settings)
    apart(fake_shards, settings, planned["shards"] // 2)
    return {
        "simulated": {"images": count_images(sizes, part), "texts": sum(t for _, t in sizes.values())},
        "seconds_to_make": made,
        "plan": planned,
        "resume": apart(resume, settings),
    }


def apart(job: Callable[..., Result], *arguments: Any) -> Result:
    """Run a job in a process of its own."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(job, *arguments).result()


def count_images(sizes: Sizes, part: str) -> int:
    own = sum(images for name, (images, _) in sizes.items() if name not in IMAGES_OF)
    vg = sizes["gqa"][0]
    return own + vg - (vg // 2 if part == "published" else 0)  # half of Visual Genome's images are COCO's


def plan(given: dict[str, Any]) -> dict[str, Any]:
    """Do what `plan_of` and `run` do for a new job, stage by stage."""
    from oscar_common.settings import Catalog, Extract
    from oscar_extract.plan import inputs_digest, make_plan, write_plan
    from oscar_extract.sources import corpus
    from oscar_extract.sources.inventory import take_inventory
    from oscar_extract.sources.request import make_request
    from oscar_shards.manifest import PLAN_FILE

    clock, baseline = Clock(), memory("VmRSS")
    settings = Extract(**given)
    choices = settings.images_per_shard, settings.limit, settings.shuffle_seed
    request = make_request(settings, Catalog())
    looked = timed(corpus, "twins")
    with clock.stage("listing files"):
        listing = corpus.find_files(request)
    with clock.stage("hash of the inputs"):
        inputs = inputs_digest(request, listing, *choices)
    with clock.stage("looking into tars"):
        inventory = take_inventory(listing)
    with clock.stage("reading and joining, duplicates included"):
        found = corpus.read_corpus(request, inventory)
    with clock.stage("making the plan"):
        made = make_plan(found, request, inputs, *choices)
    with clock.stage("writing the plan"):
        write_plan(Path(given["out"]), made)
    record, plan_file = made.record, Path(given["out"]) / PLAN_FILE
    return summary(clock, baseline) | {
        "duplicates": {"seconds": round(looked[0], 3), "files_per_second": round(record.num_images / looked[0])},
        "images": record.num_images,
        "texts": record.num_texts,
        "shards": record.num_shards,
        "left_out": len(made.left_out),
        "plan_bytes": plan_file.stat().st_size,
    }


def timed(module: Any, name: str) -> list[float]:
    """Have a module's function note the seconds that it takes in the list returned."""
    seconds: list[float] = []
    work = getattr(module, name)

    def clocked(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(module, name, clocked)
    return seconds


def resume(given: dict[str, Any]) -> dict[str, Any]:
    """Do what `plan_of` and `run` do for a job of which half of the shards are there."""
    from oscar_common.settings import Catalog, Extract
    from oscar_extract.messages import is_done
    from oscar_extract.plan import plan_of, read_shard_plan
    from oscar_extract.sources.remote import cache_of
    from oscar_extract.sources.request import make_request
    from oscar_shards.stats import count as count_all
    from oscar_shards.write import shard_path

    settings, out = Extract(**given), Path(given["out"])
    clock, baseline = Clock(), memory("VmRSS")
    with clock.stage("listing files, taking the saved plan"):
        planned = plan_of(make_request(settings, Catalog()), settings)
    with clock.stage("which shards are left"):
        tars = [shard_path(out, settings.name, n) for n in range(planned.record.num_shards)]
        todo = [n for n, tar in enumerate(tars) if not is_done(tar, settings.retry_rejects)]
    with clock.stage("first shard of the plan"):
        _, images = read_shard_plan(out, todo[0], cache_of(settings))
    with clock.stage("counting what is done"):
        stats = count_all([tar for n, tar in enumerate(tars) if n not in set(todo)])
    return summary(clock, baseline) | {
        "plan_was_taken": not len(planned.table),
        "shards": len(tars),
        "shards_left": len(todo),
        "images_of_first_left": len(images),
        "images_counted": stats.images,
    }


def summary(clock: Clock, baseline: float) -> dict[str, Any]:
    return {
        "seconds": round(sum(s["seconds"] for s in clock.stages.values()), 3),
        "cpu_seconds": round(sum(s["cpu_seconds"] for s in clock.stages.values()), 2),
        "peak_gb": max(s["peak_gb"] for s in clock.stages.values()),
        "imports_gb": baseline,
        "stages": clock.stages,
    }


def fake_shards(given: dict[str, Any], number: int) -> None:
    """Make the first shards of a job, one small shard under all their names."""
    from oscar_common.sample import ImageRecord, Regions, Sample, Text
    from oscar_common.settings import Extract
    from oscar_shards.index import index_path
    from oscar_shards.manifest import Layout
    from oscar_shards.write import shard_path, write_shard

    settings = Extract(**given)
    regions = Regions(
        boxes=np.zeros((36, 4), np.float32),
        features=np.zeros((36, 1), np.float16),
        tags=[WORDS[n % len(WORDS)] for n in range(36)],
        scores=[0.5] * 36,
    )
    texts = [Text(kind="caption", source="coco", id=str(n), text=" ".join(WORDS[:10])) for n in range(2)]
    samples = (
        Sample(
            key=f"{n:06}",
            image=ImageRecord(source="bench", id=str(n), path=f"{n}.jpg", width=640, height=480, sha256="0" * 64),
            regions=regions,
            texts=texts,
        )
        for n in range(settings.images_per_shard)
    )
    first, *others = (shard_path(Path(given["out"]), settings.name, n) for n in range(number))
    write_shard(first, samples, Layout(feature_dim=1))
    for tar in others:
        os.link(first, tar)
        os.link(index_path(first), index_path(tar))


def circumstances() -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[2], 1),  # of the last 15 minutes: what else the machine did
        "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__},
    }


def show(part: str, report: dict[str, Any]) -> None:
    found, resumed = report["plan"], report["resume"]
    title = f"{part}: {found['images']:,} images, {found['texts']:,} texts, {found['shards']:,} shards"
    table = Table("", "seconds", "of processors", "peak GB", title=title, title_justify="left")
    for name, job in (("planning", found), ("resuming", resumed)):
        for stage, said in job["stages"].items():
            table.add_row(stage, *cells(said))
        table.add_section()
        table.add_row(f"{name} in all", *cells(job))
        table.add_row("  of that, the imports", "", "", f"{job['imports_gb']:.2f}")
        table.add_section()
    console, same = Console(), found["duplicates"]
    console.print(table)
    console.print(
        f"duplicates: {same['seconds']:,.1f} s, {same['files_per_second']:,} files/s; plan: {found['plan_bytes']:,} "
        f"bytes; {resumed['shards_left']:,} shards left; making the files took {report['seconds_to_make']:,.0f} s"
    )


def cells(said: dict[str, float]) -> list[str]:
    return [f"{said[name]:,.2f}" for name in ("seconds", "cpu_seconds", "peak_gb")]


if __name__ == "__main__":
    main()
