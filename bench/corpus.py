"""How soon a corpus of Oscar's size opens, how much memory it takes, and what the order of an epoch costs.

    python bench/corpus.py

A few real tars are put under thousands of names (hard links); each name has an index of its own, whose rows are real
ones but for keys, hashes, tags and texts: captions of 8 to 14 words, a quarter questions with answers. Features have 64
numbers instead of 2048: no array of a corpus depends on that, but the memory of batches does, of which a run makes
several at once (`batch_of_2048_gb` says what each would take).

Measured are the making of the corpus' arrays in the cache, the first time; opening them again, with what the files have
in the page cache, and with nothing there (only root can empty it); the memory of several ranks of one machine, all of
which hold the corpus at once and have drawn texts and batches all over it; and the times of what a run does first.
Everything has a fresh process. "Private" is memory that a process has to itself; the rest are pages of files, which all
processes share and the system may drop. The numbers go to bench/results/corpus.json.
"""

import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from machine import machine
from oscar_common.errors import UsageError
from oscar_common.processes import each
from oscar_common.sample import Attribute, ImageRecord, Regions, Sample, Text
from oscar_common.vocabulary import NAMES, read_names
from oscar_common.wordpiece import SHIPPED
from oscar_shards.content import TEXT
from oscar_shards.index import PLACES, SCHEMA, index_path, load_index, write_index
from oscar_shards.manifest import DetectorRecord, Layout, Manifest, PlanRecord, write_manifest
from oscar_shards.write import shard_path, write_shard

if TYPE_CHECKING:  # it loads torch, which the making of rows does without
    from oscar_train.data.stream import Stream

RESULTS = Path(__file__).parent / "results" / "corpus.json"
ABOUT = "about.json"
TARS, REGIONS, FEATURE_DIM = 4, 50, 64
VOCABULARY = 4000  # different words
QA = 0.25  # of the texts
BATCH = 1024  # of one rank
DRAWS, BATCHES = 2000, 50  # texts, and whole batches, that a rank draws before its memory is looked at
EPOCHS = 10  # from which
PART = 50  # shards made by one call
TEXT_STEPS = 200
ROUNDS = 5

Result = TypeVar("Result")
Context = get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much there is; every image has a text."""

    images: int
    texts: int
    images_per_shard: int

    @property
    def shards(self) -> int:
        return self.images // self.images_per_shard

    def texts_of(self, shard: int) -> int:
        """Return how many texts a shard has; all together have them all."""
        return self.texts * (shard + 1) // self.shards - self.texts * shard // self.shards


@click.command(help=__doc__)
@click.option("--images", default=4_100_000, show_default=True, help="A multiple of --images-per-shard.")
@click.option("--texts", default=6_500_000, show_default=True, help="As many as the images, or more.")
@click.option("--images-per-shard", default=1000, show_default=True)
@click.option("--ranks", default=2, show_default=True, help="Processes that hold the corpus at once.")
@click.option("--data", type=click.Path(path_type=Path), help="Keep the shards here, and use them again.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(images: int, texts: int, images_per_shard: int, ranks: int, data: Path | None, out: Path) -> None:
    if images % images_per_shard or texts < images:
        raise UsageError(f"--images {images}: allowed are multiples of {images_per_shard} up to --texts {texts}")
    size = Size(images=images, texts=texts, images_per_shard=images_per_shard)
    result: dict[str, Any] = {"machine": machine(), **asdict(size), "ranks": ranks, "batch_of_a_rank": BATCH}
    with tempfile.TemporaryDirectory() if data is None else nullcontext(data) as folder:
        result |= prepare(Path(folder), size) | measure(Path(folder), ranks)
    result["load_afterwards"] = round(os.getloadavg()[0], 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written: {out}")


def prepare(folder: Path, size: Size) -> dict[str, Any]:
    """Make the shards, unless they are there, and say how many bytes their indexes have."""
    about = folder / ABOUT
    if not about.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"--data {folder}: neither empty nor made by this; give another folder, or delete it")
        make_shards(folder, size)
        about.write_text(json.dumps(asdict(size)))
    if json.loads(about.read_text()) != asdict(size):
        raise UsageError(f"--data {folder}: is of another size; give another folder, or delete it")
    indexes = sum(file.stat().st_size for file in (folder / "shards").glob("*.parquet"))
    return {"shards": size.shards, "indexes_gb": gb(indexes)}


def make_shards(folder: Path, size: Size) -> None:
    for name in ("once", "shards"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(TARS):
        samples = (make_sample(n, rng) for n in range(size.images_per_shard))
        write_shard(shard_path(folder / "once", "shard", number), samples, Layout(feature_dim=FEATURE_DIM))
    parts = [range(n, min(n + PART, size.shards)) for n in range(0, size.shards, PART)]
    list(track(each(partial(link_shards, folder, size), parts), "making shards", len(parts), transient=True))
    write_manifest(folder / "shards", make_manifest(size))


def make_sample(number: int, rng: np.random.Generator) -> Sample:
    corners = np.sort(rng.uniform(0, 1, (REGIONS, 2, 2)), axis=1) * [640, 480]
    return Sample(
        key=f"coco-{number}",
        image=ImageRecord(source="coco", id=str(number), path="", width=640, height=480, sha256="ab" * 32),
        regions=Regions(
            boxes=corners.reshape(REGIONS, 4).astype(np.float32),
            features=np.maximum(rng.normal(size=(REGIONS, FEATURE_DIM)), 0).astype(np.float16),
            tags=["tag"] * REGIONS,
            scores=np.sort(rng.uniform(size=REGIONS).round(4))[::-1].tolist(),
            attributes=[[Attribute(id=int(a), name=f"attribute {a}", score=0.5)] for a in rng.integers(400, size=50)],
        ),
        texts=[Text(kind="caption", source="coco", id=str(number), text="a text")],
    )


def make_manifest(size: Size) -> Manifest:
    detector = DetectorRecord(
        name="random",
        preset="detectron2",
        config="",
        weights="random",
        weights_sha256="0" * 64,
        classes=read_names("", NAMES / "objects.txt", ""),
        feature_dim=FEATURE_DIM,
    )
    plan = PlanRecord(
        images="random",
        captions=None,
        num_images=size.images,
        num_texts=size.texts,
        images_per_shard=size.images_per_shard,
        num_shards=size.shards,
        sha256="0" * 64,
    )
    return Manifest(name="shard", detector=detector, settings={}, plan=plan)


def link_shards(folder: Path, size: Size, numbers: range) -> None:
    """Put the tars there under further names, each with an index of its own."""
    names = pa.array(read_names("", NAMES / "objects.txt", ""))
    found = [word for word in (SHIPPED / "vocab.txt").read_text().split() if word.isalpha() and word.isascii()]
    words = pa.array([word for word in found if len(word) > 1][:VOCABULARY])
    once = {n: load_index(shard_path(folder / "once", "shard", n)) for n in range(TARS)}
    for number in numbers:
        tar = shard_path(folder / "shards", "shard", number)
        os.link(shard_path(folder / "once", "shard", number % TARS), tar)
        write_index(make_index(once[number % TARS], size, number, names, words), index_path(tar))
        assert load_index(tar).select(PLACES.names).equals(once[number % TARS].select(PLACES.names))


def make_index(once: pa.Table, size: Size, number: int, names: pa.Array, words: pa.Array) -> pa.Table:
    """Return the index of a tar as that of shard `number`: the same places, other images."""
    rng, rows = np.random.default_rng(number), len(once)
    ids = pa.array(np.arange(number * rows, (number + 1) * rows)).cast(pa.string())
    hashes = pa.py_buffer(rng.bytes(32 * rows).hex().encode())
    changed = {
        "key": pc.binary_join_element_wise("coco", ids, "-"),
        "id": ids,
        "path": pc.binary_join_element_wise("train2014/", ids, ".jpg", ""),
        "sha256": pa.StringArray.from_buffers(
            rows, pa.array(np.arange(rows + 1) * 64, pa.int32()).buffers()[1], hashes
        ),
        "tags": rows_of(names, rng, np.full(rows, REGIONS)),
        "texts": make_texts(rng, words, rows, size.texts_of(number)),
    }
    return pa.table([changed.get(name, once[name]) for name in SCHEMA.names], once.schema)


def make_texts(rng: np.random.Generator, words: pa.Array, images: int, count: int) -> pa.ListArray:
    """Return a text for each image; those that are left are of the first quarter, as few images have many texts."""
    of = 1 + np.bincount(rng.integers(-(-images // 4), size=count - images), minlength=images)
    qa, nothing = pa.array(rng.random(count) < QA), pa.scalar(None, pa.string())
    columns = {
        "kind": pc.if_else(qa, "qa", "caption"),
        "source": pc.if_else(qa, "vqa", "coco"),
        "id": pa.array(rng.integers(1 << 20, size=count)).cast(pa.string()),
        "text": pc.if_else(qa, nothing, sentences(words, rng, count, 8, 14, ".")),
        "question": pc.if_else(qa, sentences(words, rng, count, 4, 9, "?"), nothing),
        "answer": pc.if_else(qa, sentences(words, rng, count, 1, 2, ""), nothing),
    }
    texts = pa.StructArray.from_arrays([columns[field.name] for field in TEXT], fields=list(TEXT))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *of]), pa.int32()), texts)


def sentences(words: pa.Array, rng: np.random.Generator, count: int, least: int, most: int, end: str) -> pa.Array:
    """Return so many texts of `least` to `most` words."""
    joined = pc.binary_join(rows_of(words, rng, rng.integers(least, most + 1, count)), " ")
    return pc.binary_join_element_wise(joined, end, "")


def rows_of(values: pa.Array, rng: np.random.Generator, lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    """Return rows of some lengths, of any of the values."""
    drawn = values.take(pa.array(rng.integers(len(values), size=lengths.sum())))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), drawn)


def measure(folder: Path, ranks: int) -> dict[str, Any]:
    """Measure everything, each in a fresh process."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    result: dict[str, Any] = {"making": apart(make_cache, folder)}
    result["cache_gb"] = gb(sum(file.stat().st_size for file in (folder / "cache").rglob("*.npy")))
    result["opening"] = {"warm": apart(open_again, folder)}
    result["opening"]["cold"] = (
        apart(open_again, folder) if drop_caches() else "left out: only root can empty the cache"
    )
    result["memory"] = hold_together(folder, ranks)
    result["first_batch_seconds"] = {f"step {s}": apart(first_batch, folder, s) for s in (0, 3000)}
    return result | {"order": apart(order, folder), "text_per_second": apart(text_per_second, folder)}


def apart(job: Callable[..., Result], *arguments: Any) -> Result:
    """Run a job in a process of its own."""
    with ProcessPoolExecutor(1, Context) as pool:
        return pool.submit(job, *arguments).result()


def drop_caches() -> bool:
    """Empty the system's cache of files; False if this user may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


@contextmanager
def opened(folder: Path, rank: int = 0, ranks: int = 1) -> Iterator["Stream"]:
    from oscar_train.data.stream import open_stream

    place, cache = str(folder / "shards"), str(folder / "cache")
    with open_stream([place], batch_size=BATCH * ranks, rank=rank, ranks=ranks, cache=cache) as stream:
        yield stream


def make_cache(folder: Path) -> dict[str, float]:
    """Open the corpus for the first time."""
    import oscar_train.data.stream  # noqa: F401  # torch

    imports = memory()
    with sampled() as peaks:
        start, busy = time.perf_counter(), sum(os.times()[:4])
        with opened(folder) as stream:
            seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - busy
            triples = len(stream.corpus)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "triples": triples,
        "imports_rss_gb": imports["rss"],
        "peak_rss_gb": most_rss(),
        "peak_sampled_rss_gb": peaks["rss"],
        "peak_sampled_private_gb": peaks["private"],
    }


@contextmanager
def sampled() -> Iterator[dict[str, float]]:
    """Yield the most memory that this process has had so far, looked at again and again."""
    peaks, done = memory(), Event()

    def watch() -> None:
        while not done.wait(0.5):
            peaks.update({name: max(now, peaks[name]) for name, now in memory().items()})

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def memory() -> dict[str, float]:
    """Return what this process holds, in GB; "pss": each shared page by the share of one process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
    private, shared = (found[f"{of}_Clean"] + found[f"{of}_Dirty"] for of in ("Private", "Shared"))
    return {"rss": gb(found["Rss"]), "pss": gb(found["Pss"]), "private": gb(private), "shared": gb(shared)}


def most_rss() -> float:
    """Return the most that this process, or one that it started, has held, in GB."""
    usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return gb(max(usages) * 1024)


def gb(size: float) -> float:
    return round(size / 1e9, 3)


def open_again(folder: Path) -> dict[str, Any]:
    """Open the corpus from the cache; say what takes how long."""
    start = time.perf_counter()
    from oscar_train.data import corpus, stream

    functions = {
        "imports, before that": [time.perf_counter() - start],
        "listing the shards": timed(stream, "open_source"),
        "tokenizer, with transformers": timed(stream, "load_tokenizer"),
        "hashes of the cache's files": timed(corpus, "_whole"),
        "mapping": timed(corpus, "_mapped"),
        "stream": timed(stream, "Stream"),
    }
    start = time.perf_counter()
    with opened(folder) as opened_stream:
        seconds = time.perf_counter() - start
        from oscar_train.training.loop import describe

        start = time.perf_counter()
        describe(opened_stream)
        functions["counts that a run prints, after"] = [time.perf_counter() - start]
    stages = {name: round(sum(spent), 3) for name, spent in functions.items()}
    return {"seconds": round(seconds, 2), "stages": stages}


def timed(module: Any, name: str) -> list[float]:
    """Have a module's function note the seconds that it takes in the list returned."""
    seconds: list[float] = []
    work = getattr(module, name)

    def clocked(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(module, name, clocked)
    return seconds


def hold_together(folder: Path, ranks: int) -> dict[str, Any]:
    """Return the memory of each of several ranks that hold the corpus at once, and of all of them."""
    with Context.Manager() as manager, ProcessPoolExecutor(ranks, Context) as pool:
        together = manager.Barrier(ranks)
        held = [pool.submit(hold, folder, rank, ranks, together) for rank in range(ranks)]
        found = [rank.result() for rank in held]
    most = max(rank["in use"]["shared"] for rank in found)
    private = sum(rank["in use"]["private"] for rank in found)
    return {
        "ranks": found,
        "all_ranks_gb": round(private + most, 3),
        "batch_of_2048_gb": gb(BATCH * REGIONS * 2048 * 2),
    }


def hold(folder: Path, rank: int, ranks: int, together: Barrier) -> dict[str, dict[str, float]]:
    """Draw texts and batches all over the corpus, and look at the memory when all ranks have done so."""
    from oscar_train.training.loop import describe

    found = {"imports": memory()}
    with opened(folder, rank, ranks) as stream:
        describe(stream)
        found["opened"] = memory() | {"most_rss": most_rss()}
        steps = np.random.default_rng(rank).integers(EPOCHS * len(stream.corpus) // (BATCH * ranks), size=DRAWS)
        for step in steps.tolist():
            stream.text(step)
        buffer = stream.buffer()
        for step in steps[:BATCHES].tolist():
            stream.batch(step, buffer)
        together.wait()
        found["in use"] = memory() | {"most_rss": most_rss()}
        together.wait()
    return found


def first_batch(folder: Path, step: int) -> float:
    """Return the seconds from the opened corpus to the first batch of a run that begins at a step."""
    with opened(folder) as stream:
        start = time.perf_counter()
        for batch in stream.batches(step, step + 1):
            assert len(batch.triples) == BATCH
        return round(time.perf_counter() - start, 3)


def order(folder: Path) -> dict[str, float]:
    """Return the seconds, medians of some epochs that nothing was asked of before, that parts of the order cost."""
    seconds: dict[str, list[float]] = {}

    def clock(name: str, job: Callable[..., Result], *arguments: int) -> Result:
        start = time.perf_counter()
        made = job(*arguments)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return made

    with opened(folder) as stream:
        count, whole = len(stream.corpus), stream._order
        for one, two, three in np.arange(3 * ROUNDS).reshape(ROUNDS, 3).tolist():
            clock("a step in the middle of an epoch", stream.triples, (one * count + count // 2) // BATCH)
            clock("the shards of an epoch", lambda *of: list(whole.shards(*of)), two * count, (two + 1) * count)
            triples = clock("the whole order of an epoch", whole.triples, three, 0, count)
            assert (np.bincount(triples, minlength=count) == 1).all()
    return {name: round(statistics.median(some), 4) for name, some in seconds.items()}


def text_per_second(folder: Path) -> int:
    """Return how many triples a second become text, step by step."""
    with opened(folder) as stream:
        stream.text(0)
        start = time.perf_counter()
        for step in range(1, 1 + TEXT_STEPS):
            stream.text(step)
        return round(TEXT_STEPS * BATCH / (time.perf_counter() - start))


def show(result: dict[str, Any]) -> None:
    title = f"{result['images']:,} images, {result['texts']:,} texts, {result['shards']:,} shards"
    table = Table("", "seconds", "GB", title=title, title_justify="left")
    made = result["making"]
    table.add_row("making the arrays, once", f"{made['seconds']:.0f}", f"{made['peak_rss_gb']:.2f} at most")
    table.add_row("  of that, private", "", f"{made['peak_sampled_private_gb']:.2f} at most")
    table.add_row("the arrays, in the cache", "", f"{result['cache_gb']:.2f}")
    for name, found in result["opening"].items():
        table.add_section()
        table.add_row(
            f"opening them, page cache {name}", found if isinstance(found, str) else f"{found['seconds']:.2f}"
        )
        for stage, seconds in [] if isinstance(found, str) else found["stages"].items():
            table.add_row(f"  {stage}", f"{seconds:.3f}")
    table.add_section()
    for number, rank in enumerate(result["memory"]["ranks"]):
        for when, held in rank.items():
            said = ", ".join(f"{held[name]:.2f} {name}" for name in ("rss", "pss", "private"))
            table.add_row(f"rank {number}, {when}", "", said)
    table.add_row("all ranks, what they share once", "", f"{result['memory']['all_ranks_gb']:.2f}")
    table.add_row("each batch, had it 2048 features", "", f"{result['memory']['batch_of_2048_gb']:.2f}")
    table.add_section()
    for name, seconds in result["first_batch_seconds"].items():
        table.add_row(f"first batch, {name}", f"{seconds:.3f}")
    for name, seconds in result["order"].items():
        table.add_row(name, f"{seconds:.4f}")
    table.add_row("text of 1,000,000 triples", f"{1e6 / result['text_per_second']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
