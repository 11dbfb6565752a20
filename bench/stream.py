"""Training batches of 64 images a second, from shards with 50 regions of 2048 float16 features, beside the peers.

    python bench/stream.py [--peers-python PATH]

Measured are this project's stream, with its texts and features alone; stock webdataset on the same tars; Oscar's own
TSV files; mosaicml-streaming (MDS) and litdata, in the order written and shuffled, with their defaults (and litdata
with a setting that suits samples this large); and `raw`, plain reading of the tars' bytes by one thread into a buffer
of a batch's size that is used again, which is the limit (`raw-threads`: a thread and a buffer for each core). What a
batch holds differs, in the peers' favour: those of this project have token ids, masks and negatives, and their bytes
were checked; theirs have strings (the results say it for each). This project and `oscar-tsv` shuffle, webdataset does
not.

Each way runs in a process of its own, bound to one core or to two. There the peers have a worker process for each, as
their users do, and this project has threads. The data lie in the page cache. An epoch goes `--times` times over the
same files, under as many names, and is timed from its first batch to its last: imports, opening and the start
of workers are left out. The first epoch warms up; then each round has one of every way, so that the machine's moods
strike all alike. That each image came once an epoch (this project: once with each of its 5 texts) is checked by count
and by checksum. All processes have glibc keep the memory that they free (MALLOC below), as fresh pages are dear on
virtual machines; what workers pass on in shared memory is fresh nevertheless.

mosaicml-streaming wants older versions of numpy and transformers than this project, so it and litdata can run in an
environment of their own: `--peers-python` is its Python (`make bench-stream` makes it, with the same torch). The
numbers go to bench/results/stream.json.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ways as bench_ways
from machine import machine
from oscar_common.errors import OperationError, UsageError
from oscar_common.sample import ImageRecord, Regions, Sample, Text
from oscar_shards.formats.export import export_shards
from oscar_shards.index import index_path
from oscar_shards.manifest import DetectorRecord, Layout, Manifest, PlanRecord, write_manifest
from oscar_shards.write import shard_path, write_shard
from served import Served
from simulated import WORDS
from ways import ABOUT, BATCH, FEATURE_DIM, LITDATA, MDS, REGIONS, SHARDS, TEXTS, TSV, WAYS, Array, Pass

RESULTS = Path(__file__).parent / "results" / "stream.json"
PER_SHARD = 500
CLASSES = [f"class {n}" for n in range(1600)]
ONCE = "once"  # the folder of the shards that the others are made of
OURS = "ours", "ours-features"
# GOMP_SPINCOUNT as oscar_common.cli sets it. LITDATA_...: it would ask the package index.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "2",
}
ENVIRONMENT = MALLOC | {"GOMP_SPINCOUNT": "10000", "LITDATA_DISABLE_VERSION_CHECK": "1"}


@click.command(help=__doc__)
@click.option("--images", default=2000, show_default=True, help=f"Images in all, in shards of {PER_SHARD}.")
@click.option("--times", default=4, show_default=True, help="How often an epoch goes over them.")
@click.option("--rounds", default=7, show_default=True, help="Rounds, of which medians are taken.")
@click.option("--ways", default=",".join(WAYS), help=f"Some of {', '.join(WAYS)}.  [default: all]")
@click.option("--cores", "most", type=click.IntRange(1, 2), default=2, show_default=True, help="One, or one and two.")
@click.option("--data", type=click.Path(path_type=Path), help="Keep the data here, and use them again.")
@click.option("--peers-python", default=sys.executable, help="Python that has MDS and litdata.  [default: this one]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    images: int, times: int, rounds: int, ways: str, most: int, data: Path | None, peers_python: str, out: Path
) -> None:
    names = chosen(ways)
    if images % PER_SHARD or images * times % BATCH:
        raise UsageError(
            f"--images {images}: allowed are multiples of {PER_SHARD} that --times {times} are batches of {BATCH}"
        )
    check_packages(names, peers_python)
    result: dict[str, Any] = {"machine": machine(), "images": images, "times": times, "rounds": rounds, "cores": {}}
    with tempfile.TemporaryDirectory() if data is None else nullcontext(data) as folder:
        prepare(Path(folder), names, images, times, peers_python)
        for cores in range(1, most + 1):
            some = [name for name in names if cores > 1 or name != "raw-threads"]
            if len(os.sched_getaffinity(0)) < cores:
                print(f"{cores} cores: left out, this process may use fewer")
                continue
            result["cores"][cores] = measure(Path(folder), some, cores, rounds, peers_python)
            show(f"{cores} core{'s' * (cores > 1)}", result["cores"][cores])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")


def chosen(ways: str) -> list[str]:
    """Return the names of the ways, raw first."""
    names = [name.strip() for name in ways.split(",")]
    if unknown := [name for name in names if name not in WAYS]:
        raise UsageError(f"--ways {unknown[0]}: allowed are {', '.join(WAYS)}")
    return list(dict.fromkeys(["raw", *names]))


def python_of(name: str, peers_python: str) -> str:
    return peers_python if WAYS[name].peer else sys.executable


def check_packages(names: list[str], peers_python: str) -> None:
    for name in names:
        for package in WAYS[name].packages:
            code = f"import importlib.metadata as m; m.version({package!r})"
            if subprocess.run([python_of(name, peers_python), "-c", code], capture_output=True).returncode:
                raise UsageError(f"--ways {name}: {package} is not installed; give --peers-python, or leave it out")


def prepare(folder: Path, names: list[str], images: int, times: int, peers_python: str) -> None:
    """Make the data of the ways that are named, unless they are there."""
    said = {"images": images * times, "files": images}
    if not (folder / ABOUT).exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"--data {folder}: neither empty nor made by this; give another folder, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).write_text(json.dumps(said))
    if bench_ways.about(folder) != said:
        raise UsageError(f"--data {folder}: has other numbers of images; give another folder, or delete it")
    makers: dict[str, Callable[[Path], None]] = {
        ONCE: lambda out: make_shards(out, images),
        SHARDS: lambda out: repeat_shards(folder / ONCE, out, times),
        TSV: lambda out: make_tsv(folder / ONCE, out, times),
        MDS: lambda out: make_of_peer(MDS, folder / ONCE, out, times, peers_python),
        LITDATA: lambda out: make_of_peer(LITDATA, folder / ONCE, out, times, peers_python),
    }
    for form in dict.fromkeys([ONCE, *(WAYS[name].data for name in names)]):
        making = folder / "making"
        shutil.rmtree(making, ignore_errors=True)  # of a run that was stopped
        if not (folder / form).exists():
            makers[form](making)
            making.rename(folder / form)


def make_shards(out: Path, images: int) -> None:
    out.mkdir()
    rng = np.random.default_rng(0)
    pool = np.maximum(rng.normal(size=(4096, FEATURE_DIM)), 0).astype(np.float16)  # half zeros, as after a ReLU
    for first in range(0, images, PER_SHARD):
        samples = (make_sample(n, pool, rng) for n in range(first, first + PER_SHARD))
        write_shard(shard_path(out, "shard", first // PER_SHARD), samples, Layout(feature_dim=FEATURE_DIM))
    write_manifest(out, make_manifest(images))


def make_sample(number: int, pool: Array, rng: np.random.Generator) -> Sample:
    corners = np.sort(rng.uniform(0, 1, (REGIONS, 2, 2)), axis=1) * [640, 480]
    captions = [" ".join(rng.choice(WORDS, 10)) for _ in range(TEXTS)]
    return Sample(
        key=f"coco-{number}",
        image=ImageRecord(
            source="coco", id=str(number), path=f"{number:012d}.jpg", width=640, height=480, sha256="ab" * 32
        ),
        regions=Regions(
            boxes=corners.reshape(REGIONS, 4).astype(np.float32),
            features=pool[rng.integers(0, len(pool), REGIONS)],
            tags=[CLASSES[c] for c in rng.integers(0, len(CLASSES), REGIONS)],
            scores=[round(float(s), 6) for s in rng.uniform(size=REGIONS)],
        ),
        texts=[Text(kind="caption", source="coco", id=f"{number}-{n}", text=t) for n, t in enumerate(captions)],
    )


def make_manifest(images: int) -> Manifest:
    detector = DetectorRecord(
        name="random",
        preset="detectron2",
        config="",
        weights="random",
        weights_sha256="0" * 64,
        classes=CLASSES,
        feature_dim=FEATURE_DIM,
    )
    plan = PlanRecord(
        images="random",
        captions=None,
        num_images=images,
        num_texts=images * TEXTS,
        images_per_shard=PER_SHARD,
        num_shards=images // PER_SHARD,
        sha256="0" * 64,
    )
    return Manifest(name="shard", detector=detector, settings={}, plan=plan)


def repeat_shards(once: Path, out: Path, times: int) -> None:
    """Put every shard there under several names: one file in the page cache, as large an epoch as is wanted."""
    out.mkdir()
    tars = sorted(once.glob("*.tar")) * times
    for number, tar in enumerate(tars):
        again = shard_path(out, "shard", number)
        os.link(tar, again)
        os.link(index_path(tar), index_path(again))
    write_manifest(out, make_manifest(len(tars) * PER_SHARD))


def make_tsv(once: Path, out: Path, times: int) -> None:
    export_shards("oscar", once, out, overwrite=False)
    for file in out.glob("*/*.lineidx"):
        file.write_text(file.read_text() * times)


def make_of_peer(form: str, once: Path, out: Path, times: int, python: str) -> None:
    command = [python, str(bench_ways.__file__), "write", form, str(once), str(out), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise OperationError(f"{form}: its files could not be written: {done.stderr[-2000:]}")


@contextmanager
def started(way: str, folder: Path, cores: int, python: str) -> Iterator[Served]:
    """Start a reader on some cores; the end of its input ends it."""
    command = [python, str(bench_ways.__file__), "serve", way, str(folder), str(cores)]
    environment, pipe = os.environ | ENVIRONMENT, subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=said, text=True) as process,
    ):
        yield Served(way=way, process=process, said=said)


def measure(folder: Path, names: list[str], cores: int, rounds: int, peers_python: str) -> dict[str, Any]:
    """Return what was seen of each way on some cores."""
    readers, versions = [], {}
    with ExitStack() as stack:
        for name in names:  # one after the other: MDS fails if two are opened at once
            readers.append(stack.enter_context(started(name, folder, cores, python_of(name, peers_python))))
            versions[name] = readers[-1].answer()
        seen: dict[str, list[Pass]] = {name: [] for name in names}
        for _ in track(range(rounds + 1), f"rounds on {cores} core(s)", transient=True):
            for reader in readers:
                seen[reader.way].append(Pass(**reader.ask("go")))
    check(seen, bench_ways.about(folder)["images"])
    rates = {name: [p.samples / p.seconds for p in passes[1:]] for name, passes in seen.items()}  # the first warms up
    return {name: summary(name, rates) | {"versions": versions[name]} for name in names}


def check(seen: dict[str, list[Pass]], images: int) -> None:
    """See that every epoch had every image as often as it should."""
    sums = {p.checksum / WAYS[name].times for name, passes in seen.items() for p in passes if p.checksum is not None}
    if len(sums) > 1:
        raise OperationError(f"checksums differ: { ({n: [p.checksum for p in ps] for n, ps in seen.items()}) }")
    for name, passes in seen.items():
        if wrong := [p.images for p in passes if p.images != images * WAYS[name].times]:
            raise OperationError(f"{name}: an epoch had {wrong[0]:,} images, not {images * WAYS[name].times:,}")


def summary(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Return samples/s, and how they compare: to raw, and this project's to them."""
    medians = {way: statistics.median(some) for way, some in rates.items()}
    median, least, most = medians[name], min(rates[name]), max(rates[name])
    ratios = {f"{way}_to_this": round(medians[way] / median, 2) for way in OURS if way in rates and way != name}
    return {
        "batch_holds": WAYS[name].holds,
        "samples_per_second": {"median": round(median), "min": round(least), "max": round(most)},
        "of_raw": round(median / medians["raw"], 4),
        **ratios,
    }


def show(title: str, found: dict[str, Any]) -> None:
    title += "; right: how many times as many samples/s this project has"
    table = Table("way", "samples/s", "least", "most", "of raw", "ours", "features", title=title)
    for name, way in found.items():
        rates = [f"{rate:,}" for rate in way["samples_per_second"].values()]
        table.add_row(name, *rates, f"{way['of_raw']:.1%}", *(str(way.get(f"{ours}_to_this", "")) for ours in OURS))
    Console().print(table)


if __name__ == "__main__":
    main()
