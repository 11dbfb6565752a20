"""How fast shards are verified and indexed, beside plain reading of the same bytes in the same run, on one core.

    python bench/store.py

Shards are made as oscar-extract writes them: 50 regions of 2048 features (half of them zero, as after a ReLU), a tag, a
score and an attribute each, and five captions. They lie in the page cache, so that what is measured is the processor's
work, not the disk's. Every round measures everything once, so that the machine's moods strike all alike; shown are
medians. The peers are Python's tarfile (names of members only) and stock webdataset with `.decode()`. The numbers go to
bench/results/store.json.
"""

import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import webdataset
import xxhash
from rich.console import Console
from rich.table import Table

from oscar_common.sample import Attribute, ImageRecord, Regions, Sample, Text
from oscar_shards.index import index_path, index_tar, write_index
from oscar_shards.manifest import Layout
from oscar_shards.read import read_samples
from oscar_shards.verify import check
from oscar_shards.write import shard_path, write_shard

RESULTS = Path(__file__).parent / "results" / "store.json"
BUFFER = 4 << 20  # bytes read at once, as `oscar_shards.tar` does
CAPTION = "A man riding a wave on top of a surfboard."


@click.command()
@click.option("--images", default=2000, show_default=True, help="Images in all, in shards of 1000.")
@click.option("--rounds", default=7, show_default=True, help="Rounds, of which medians are taken.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(images: int, rounds: int, out: Path) -> None:
    """Make shards, measure, and write the numbers."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    cases = {
        "50 x 2048 float16": (50, Layout(feature_dim=2048)),
        "50 x 2048 int8": (50, Layout(feature_dim=2048, dtype="int8")),
        "36 x 2048 float16": (36, Layout(feature_dim=2048)),
    }
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: measure(list(make_shards(Path(folder) / str(n), images, k, layout)), rounds)
            for n, (name, (k, layout)) in enumerate(cases.items())
        }
    result = {"machine": machine(), "rounds": rounds, "images": images, "cases": found}
    out.write_text(json.dumps(result, indent=1) + "\n")
    for name, case in found.items():
        show(name, case)
    print(f"written: {out}")


def make_shards(folder: Path, images: int, k: int, layout: Layout) -> Iterator[Path]:
    """Write shards of 1000 images and yield them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pool = np.maximum(rng.normal(size=(4096, layout.feature_dim)), 0).astype(np.float16)
    for number in range(-(-images // 1000)):
        tar = shard_path(folder, "shard", number)
        count = min(1000, images - 1000 * number)
        write_shard(tar, (make_sample(1000 * number + n, k, pool, rng) for n in range(count)), layout)
        yield tar


def make_sample(number: int, k: int, pool: np.ndarray, rng: np.random.Generator) -> Sample:
    """Return an image with k regions, whose features are rows of `pool`."""
    corners = np.sort(rng.uniform(0, 1, (k, 2, 2)), axis=1) * [640, 480]
    return Sample(
        key=f"coco%2F{number}",
        image=ImageRecord(
            source="coco", id=str(number), path=f"train2014/{number:012d}.jpg", width=640, height=480, sha256="ab" * 32
        ),
        regions=Regions(
            boxes=corners.reshape(k, 4).astype(np.float32),
            features=pool[rng.integers(0, len(pool), k)],
            tags=[f"class {c}" for c in rng.integers(0, 1600, k)],
            scores=[round(float(s), 6) for s in rng.uniform(size=k)],
            attributes=[[Attribute(id=int(a), name=f"attribute {a}", score=0.5)] for a in rng.integers(0, 400, k)],
        ),
        texts=[Text(kind="caption", source="coco", id=f"{number}-{n}", text=CAPTION) for n in range(5)],
    )


def measure(tars: list[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Return GB/s (median of the rounds) of each way to go through the tars, and its share of plain reading."""
    size = sum(tar.stat().st_size for tar in tars)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):  # the first warms up
        for name, way in WAYS.items():
            began = time.perf_counter()
            for tar in tars:
                way(tar)
            seconds[name].append(time.perf_counter() - began)
    rates = {name: size / statistics.median(times[1:]) / 1e9 for name, times in seconds.items()}
    return {
        name: {"gb_per_second": round(rate, 3), "of_plain_reading": round(rate / rates["plain reading"], 3)}
        for name, rate in rates.items()
    }


def read_plainly(tar: Path) -> None:
    buffer = bytearray(BUFFER)
    with tar.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_and_hash(tar: Path) -> None:
    buffer = memoryview(bytearray(BUFFER))
    with tar.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            xxhash.xxh3_64_intdigest(buffer[:count])


def verify(tar: Path) -> None:
    assert not check(tar, quick=False).faults


def verify_quickly(tar: Path) -> None:
    assert not check(tar, quick=True).faults


def index(tar: Path) -> None:
    write_index(index_tar(tar), index_path(tar))


def read_all_samples(tar: Path) -> None:
    assert sum(1 for _ in read_samples(tar))


def list_by_tarfile(tar: Path) -> None:
    with tarfile.open(tar, "r:") as archive:
        assert archive.getnames()


def decode_by_webdataset(tar: Path) -> None:
    assert sum(1 for _ in webdataset.WebDataset(str(tar), shardshuffle=False).decode())


WAYS: dict[str, Callable[[Path], None]] = {
    "plain reading": read_plainly,
    "reading and XXH3": read_and_hash,
    "verify": verify,
    "index": index,
    "verify --quick (of the file's size)": verify_quickly,
    "read_samples (Python objects)": read_all_samples,
    "tarfile, names of members": list_by_tarfile,
    "stock webdataset, decode()": decode_by_webdataset,
}


def machine() -> dict[str, str | float]:
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "?:?")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores_used": 1,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "webdataset": str(webdataset.__version__),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def show(name: str, case: dict[str, dict[str, float]]) -> None:
    table = Table("way", "GB/s", "of plain reading", title=name)
    for way, numbers in case.items():
        table.add_row(way, f"{numbers['gb_per_second']:.2f}", f"{numbers['of_plain_reading']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
