"""The ways to read batches of 64 images that bench/stream.py measures, and the process that runs one of them.

    python bench/ways.py serve WAY FOLDER CORES          an epoch, and a JSON line of it, for each line that comes in
    python bench/ways.py write FORMAT FOLDER OUT TIMES   the tars of a folder in a peer's format

Apart from the peers it needs numpy and torch only, so it runs in an environment of the peers' own, too. Each way does
what its library's documentation tells users to do; on several cores, with as many worker processes. Nothing but the
batches' memory is touched: a checksum of eight numbers an image shows that each image was delivered once.
"""

import base64
import contextlib
import copy
import io
import itertools
import json
import os
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Batch = dict[str, Any]  # "features": a tensor of [images, regions, P or more]

BATCH = 64
REGIONS = 50
FEATURE_DIM = 2048
TEXTS = 5  # of each image
BUFFER = BATCH * REGIONS * FEATURE_DIM * 2  # bytes of a batch's float16 features
ABOUT = "about.json"  # how many images are in the data
SHARDS, TSV, MDS, LITDATA = "shards", "tsv", "mds", "litdata"
OPENED = contextlib.ExitStack()  # closed at the end


@dataclass(frozen=True, kw_only=True)
class Pass:
    """An epoch: the images of its batches, the checksum of their features, and the samples of the time measured."""

    images: int
    checksum: float | None
    samples: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """`open` takes the folder of data and the cores, and returns what runs an epoch. Each image comes `times` times."""

    open: Callable[[Path, int], Callable[[], Pass]]
    holds: str  # what a batch has
    data: str  # the folder that it reads
    packages: tuple[str, ...] = ()
    peer: bool = False
    times: int = 1


def timed(epoch: Callable[[], Iterable[Batch]]) -> Callable[[], Pass]:
    """Measure from the first batch to the last, so that an epoch's start (of workers, mostly) costs nothing."""

    def run() -> Pass:
        images, checksum, first, began, ended = 0, 0.0, 0, 0.0, 0.0
        for batch in epoch():
            features = batch["features"]
            checksum += features[:, 0, :8].double().sum().item()  # exact: float16 numbers, so in any order
            images += len(features)
            ended = time.perf_counter()
            if not first:
                first, began = images, ended
        return Pass(images=images, checksum=checksum, samples=images - first, seconds=ended - began)

    return run


def open_raw(folder: Path, cores: int, threads: int | None = 1) -> Callable[[], Pass]:
    """The limit: the tars' bytes into a buffer that is used again, by one thread, or one for each core."""
    cores = threads or cores
    tars = sorted((folder / SHARDS).glob("*.tar"))
    images, sizes = about(folder)["images"], {tar: tar.stat().st_size for tar in tars}
    buffers = [bytearray(BUFFER) for _ in range(cores)]
    pool = ThreadPoolExecutor(cores)

    def read(part: Sequence[Path], buffer: bytearray) -> None:
        for tar in part:
            with tar.open("rb", buffering=0) as file:
                read = sum(iter(lambda: file.readinto(buffer), 0))
            assert read == sizes[tar]

    def run() -> Pass:
        began = time.perf_counter()
        list(pool.map(read, [tars[n::cores] for n in range(cores)], buffers))
        return Pass(images=images, checksum=None, samples=images, seconds=time.perf_counter() - began)

    return run


def open_webdataset(folder: Path, cores: int) -> Callable[[], Pass]:
    import webdataset

    tars = [str(tar) for tar in sorted((folder / SHARDS).glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("features.npy", "boxes.npy", "json")
    batches = samples.batched(BATCH, collation_fn=collate)
    return timed(lambda: webdataset.WebLoader(batches, batch_size=None, num_workers=workers(cores)))


def open_tsv(folder: Path, cores: int) -> Callable[[], Pass]:
    from torch.utils.data import DataLoader

    data: Any = OscarTsv(folder / TSV)
    return timed(lambda: DataLoader(data, BATCH, shuffle=True, num_workers=workers(cores), collate_fn=collate))


class OscarTsv:
    """Images as microsoft/Oscar reads them: a line of text found by its number, base64 of float32 [K, P + 6] in it."""

    def __init__(self, folder: Path) -> None:
        (features,) = folder.glob("*/features.tsv")
        self._paths = features, features.with_name("predictions.tsv")
        self._offsets = [list(map(int, path.with_suffix(".lineidx").read_text().split())) for path in self._paths]
        self._files: dict[int, list[Any]] = {}  # of each process
        self._captions: dict[str, list[str]] = defaultdict(list)
        for row in (folder / "corpus.tsv").read_text().splitlines():
            name, _, caption = row.split("\t")
            self._captions[name].append(caption)
        self._source = features.parent.name

    def __len__(self) -> int:
        return len(self._offsets[0])

    def __getitem__(self, number: int) -> tuple[Any, Any, Batch]:
        import torch

        (key, count, packed), (_, label) = (self._row(file, number) for file in range(2))
        numbers = np.frombuffer(base64.b64decode(packed), np.float32).reshape(int(count), -1)
        padded = torch.zeros(REGIONS, numbers.shape[1])
        padded[: len(numbers)] = torch.tensor(numbers[:REGIONS])
        objects = json.loads(label)["objects"]
        boxes = np.array([o["rect"] for o in objects], np.float32)
        texts = [{"text": text} for text in self._captions[f"{self._source}_{key}"]]
        return padded, boxes, {"tags": [o["class"] for o in objects], "texts": texts}

    def _row(self, which: int, number: int) -> list[str]:
        """Return the fields of a line; a process opens files of its own, as their place is shared otherwise."""
        if os.getpid() not in self._files:
            self._files[os.getpid()] = [path.open() for path in self._paths]
        file = self._files[os.getpid()][which]
        file.seek(self._offsets[which][number])
        return [field.strip() for field in file.readline().split("\t")]


def open_mds(folder: Path, cores: int, shuffle: bool = False) -> Callable[[], Pass]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=str(folder / MDS), batch_size=BATCH, shuffle=shuffle)
    return timed(lambda: DataLoader(data, BATCH, num_workers=workers(cores), collate_fn=collate_dicts))


def open_litdata(folder: Path, cores: int, **settings: Any) -> Callable[[], Pass]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / LITDATA), **settings)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers(cores), collate_fn=collate_dicts)
    return timed(lambda: loader)


def open_regions(folder: Path, cores: int) -> Callable[[], Pass]:
    return open_ours(folder, cores, lambda stream, *steps: ({"features": f} for f in stream.regions(*steps)))


def open_batches(folder: Path, cores: int) -> Callable[[], Pass]:
    return open_ours(folder, cores, lambda stream, *steps: (vars(batch) for batch in stream.batches(*steps)))


def open_ours(folder: Path, cores: int, read: Callable[..., Iterator[Batch]]) -> Callable[[], Pass]:
    """This project's stream, an epoch after the other: each image with each of its texts."""
    from oscar_train.data.stream import open_stream

    shards, cache = str(folder / SHARDS), str(folder / "cache")
    opened = open_stream([shards], batch_size=BATCH, seed=0, threads=cores, cache=cache)
    stream = OPENED.enter_context(opened)
    steps = about(folder)["images"] * TEXTS // BATCH  # of an epoch
    firsts = itertools.count(0, steps)
    return timed(lambda: read(stream, first := next(firsts), first + steps))


def workers(cores: int) -> int:
    """Return how many processes read: none but this one on one core."""
    return 0 if cores == 1 else cores


def collate(samples: Iterable[tuple[Any, Any, Any]]) -> Batch:
    """Stack arrays as torch's own collation does (in worker processes straight into shared memory); keep strings."""
    from torch.utils.data import default_collate

    features, boxes, contents = zip(*samples, strict=True)
    return {
        "features": default_collate(list(features)),
        "boxes": default_collate(list(boxes)),
        "tags": [content["tags"] for content in contents],
        "captions": [[text["text"] for text in content["texts"]] for content in contents],
    }


def collate_dicts(samples: list[dict[str, Any]]) -> Batch:
    return collate((sample["features"], sample["boxes"], json.loads(sample["json"])) for sample in samples)


ALIKE = "features, boxes, tags and captions as strings"
MOSAIC: dict[str, Any] = {"data": MDS, "packages": ("mosaicml-streaming",), "peer": True}
LIT: dict[str, Any] = {"data": LITDATA, "packages": ("litdata",), "peer": True}
WAYS = {
    "raw": Way(open=open_raw, data=SHARDS, holds="bytes of the tars, of which nothing is made"),
    "raw-threads": Way(open=partial(open_raw, threads=None), data=SHARDS, holds="the same, a thread for each core"),
    "webdataset": Way(open=open_webdataset, data=SHARDS, holds=ALIKE, packages=("webdataset",)),
    "oscar-tsv": Way(open=open_tsv, data=TSV, holds=f"{ALIKE}; features float32 with positions"),
    "mds": Way(open=open_mds, holds=ALIKE, **MOSAIC),
    "mds-shuffled": Way(open=partial(open_mds, shuffle=True), holds=ALIKE, **MOSAIC),
    "litdata": Way(open=open_litdata, holds=ALIKE, **LIT),
    "litdata-shuffled": Way(open=partial(open_litdata, shuffle=True), holds=ALIKE, **LIT),
    # By default litdata decodes many neighbours of each image, and has them again and again with images this large.
    "litdata-tuned": Way(open=partial(open_litdata, shuffle=True, batch_decode=0), holds=ALIKE, **LIT),
    "ours-features": Way(open=open_regions, data=SHARDS, holds="features", times=TEXTS),
    "ours": Way(
        open=open_batches,
        data=SHARDS,
        holds="features, positions, token ids of captions and tags, masks, negatives",
        times=TEXTS,
    ),
}


def serve(name: str, folder: Path, cores: int) -> None:
    """Say which versions are at work, then run an epoch for each line that comes."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(cores)
    way = WAYS[name]
    run = way.open(folder, cores)
    print(json.dumps({p: metadata.version(p) for p in ("numpy", "torch", *way.packages)}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(vars(run())), file=answers, flush=True)


def write_mds(tars: list[Path], out: Path, times: int) -> None:
    from streaming import MDSWriter

    columns = {"features": "ndarray:float16", "boxes": "ndarray:float32", "json": "str"}
    with MDSWriter(out=str(out), columns=columns) as writer:
        for tar in tars:
            for sample in samples_of(tar):
                writer.write(sample)
    repeat(out, "shards", "basename", "shard.{:05d}.mds", times)


def write_litdata(tars: list[Path], out: Path, times: int) -> None:
    from litdata import optimize

    inputs = list(map(str, tars))
    optimize(fn=samples_of, inputs=inputs, output_dir=str(out), chunk_bytes="64MB", num_workers=1, verbose=False)
    repeat(out, "chunks", "filename", "chunk-0-{}.bin", times)


def samples_of(tar: str | Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(tar) as archive:
        contents = (archive.extractfile(member).read() for member in archive)  # type: ignore[union-attr]
        for content, *arrays in zip(*[contents] * 3, strict=True):  # a sample has three members
            boxes, features = map(np.load, map(io.BytesIO, arrays))
            yield {"features": features, "boxes": boxes, "json": content.decode()}


def repeat(out: Path, entries: str, key: str, name: str, times: int) -> None:
    """Put the files of an index under several names into it: one in the page cache, as large an epoch as is wanted."""
    index = json.loads((out / "index.json").read_text())
    count = len(index[entries])
    index[entries] = [copy.deepcopy(entry) for _ in range(times) for entry in index[entries]]
    for number, entry in enumerate(index[entries]):
        named = entry.get("raw_data", entry)  # MDS has it there
        if number >= count:
            os.link(out / named[key], out / name.format(number))
        named[key] = name.format(number)
    (out / "index.json").write_text(json.dumps(index))


def about(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    return content


if __name__ == "__main__":
    command, name, folder, *rest = sys.argv[1:]
    with OPENED:
        if command == "serve":
            serve(name, Path(folder), int(rest[0]))
        else:
            write = {MDS: write_mds, LITDATA: write_litdata}[name]
            write(sorted(Path(folder).glob("*.tar")), Path(rest[0]), int(rest[1]))
