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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

OSCAR = {  # images and texts of Oscar's corpus (Li et al. 2020, appendix)
    "coco": (112_000, 560_000),
    "cc": (3_000_000, 3_000_000),
    "sbu": (840_000, 840_000),
    "flickr30k": (29_000, 145_000),
    "vqa": (83_000, 444_000),
    "gqa": (79_000, 1_026_000),
    "vg-qa": (48_000, 484_000),
}
IMAGES_OF = {"vqa": "coco", "gqa": "vg", "vg-qa": "vg"}  # whose images a dataset asks about
IN_FOLDER = IN_TAR = 10_000
VG = 2_300_000  # the first image
WORDS = ("a", "the", "man", "woman", "dog", "street", "red", "sitting", "with", "of", "in", "on", "two", "people", "to")
Sizes = dict[str, tuple[int, int]]
Result = TypeVar("Result")

# What all jobs import is imported once, by the process that they are forked from.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["__main__", "oscar_extract.plan", "oscar_extract.request", "oscar_extract.tasks"])


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
    from oscar_extract.request import make_request
    from oscar_extract.sources import corpus
    from oscar_extract.sources.inventory import take_inventory
    from oscar_shards.write import PLAN_FILE

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
    from oscar_extract.plan import plan_of, read_shard_plan
    from oscar_extract.request import make_request
    from oscar_extract.tasks import is_done
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
        _, images = read_shard_plan(out, todo[0])
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
    from oscar_shards.write import index_path, shard_path, write_shard

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
    write_shard(first, samples, 1)
    for tar in others:
        os.link(first, tar)
        os.link(index_path(first), index_path(tar))


def make_manifest(path: Path, sizes: Sizes) -> None:
    """Write a row for each text: the image's path, the text, and the dataset."""
    tables = []
    for name, (images, texts) in sizes.items():
        folder = f"{IMAGES_OF.get(name, name)}/images"
        number = (np.arange(texts) % images).astype(np.int64)
        parts = [pa.array(n).cast(pa.string()) for n in (number // IN_FOLDER, number)]
        paths = pc.binary_join_element_wise(folder, *parts, "/")
        paths = pc.binary_join_element_wise(paths, "jpg", ".")
        tables.append(pa.table({"path": paths, "text": phrases(texts, 10), "source": pa.repeat(name, texts)}))
    pq.write_table(pa.concat_tables(tables), path)


def phrases(number: int, words: int) -> pa.Array:
    """Return so many texts of so many words each."""
    rng, vocabulary = np.random.default_rng(0), pa.array(WORDS)
    return pc.binary_join_element_wise(
        *(vocabulary.take(pa.array(rng.integers(len(WORDS), size=number))) for _ in range(words)), " "
    )


def make_published(root: Path, sizes: Sizes) -> None:
    """Write annotation files as they are published, with their fields, and image files under the names in use."""
    numbers = count()
    make_coco(root / "coco", *sizes["coco"], numbers)
    make_cc(root / "cc", *sizes["cc"], numbers)
    make_sbu(root / "sbu", *sizes["sbu"], numbers)
    make_flickr30k(root / "flickr30k", *sizes["flickr30k"], numbers)
    make_vqa(root / "vqa", *sizes["vqa"])
    make_gqa(root / "gqa", *sizes["gqa"], numbers)
    make_vg_qa(root / "vg-qa", *sizes["vg-qa"], sizes["gqa"][0])


def make_images(folder: Path, names: Iterable[str], numbers: Iterator[int]) -> None:
    """Write a file of 12 bytes for each name, no two the same."""
    inner = None
    for name, number in zip(names, numbers, strict=False):
        if (parent := name.rpartition("/")[0]) != inner:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            inner = parent
        with open(f"{folder}/{name}", "wb", buffering=0) as file:
            file.write(b"%012d" % number)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_coco(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    names = [f"COCO_train2014_{n + 1:012d}.jpg" for n in range(images)]
    make_images(root, (f"train2014/{name}" for name in names), numbers)
    url = "http://farm5.staticflickr.com/4153/5014840696_98687a0c34_z.jpg"
    listed = [
        {"license": 5, "file_name": name, "coco_url": url, "height": 480, "width": 640, "flickr_url": url, "id": n + 1}
        for n, name in enumerate(names)
    ]
    captions = [
        {"image_id": n % images + 1, "id": n, "caption": text} for n, text in enumerate(phrases(texts, 10).to_pylist())
    ]
    write_json(root / "annotations/captions_train2014.json", {"images": listed, "annotations": captions})


def make_cc(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    urls = [f"https://images.example.com/photos/2018/{n % 365}/{n * 7919 % images:x}/photo.jpg" for n in range(images)]
    captions = phrases(texts, 10).to_pylist()
    make_tars(root / "images", urls, captions, numbers)
    with (root / "Train_GCC-training.tsv").open("w") as file:
        file.writelines(f"{text}\t{url}\n" for text, url in zip(captions, urls, strict=True))


def make_sbu(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    urls = [f"http://static.flickr.com/{n % 5000}/{4385058960 + 31 * n}_b0e291f86e.jpg" for n in range(images)]
    captions = phrases(texts, 12).to_pylist()
    make_tars(root / "images", urls, captions, numbers)
    for name, lines in (("urls", urls), ("captions", captions)):
        with (root / f"SBU_captioned_photo_dataset_{name}.txt").open("w") as file:
            file.writelines(f"{line}\n" for line in lines)


def make_tars(folder: Path, urls: list[str], captions: list[str], numbers: Iterator[int]) -> None:
    """Write what img2dataset does: tars with an image, its caption and what is known of it, and a table of each tar."""
    folder.mkdir(parents=True)
    sizes = {"width": 256, "height": 256, "original_width": 1024, "original_height": 768, "exif": "{}"}
    for shard, start in enumerate(range(0, len(urls), IN_TAR)):
        there = list(zip(urls[start : start + IN_TAR], captions[start : start + IN_TAR], strict=True))
        records = [
            {"caption": text, "url": url, "key": f"{shard:05}{n:04}", "status": "success", "error_message": None}
            for n, (url, text) in enumerate(there)
        ]
        pq.write_table(pa.Table.from_pylist(records), folder / f"{shard:05}.parquet")
        with (folder / f"{shard:05}.tar").open("wb") as tar:
            for record, number in zip(records, numbers, strict=False):
                tar.write(member(f"{record['key']}.jpg", b"%012d" % number))
                tar.write(member(f"{record['key']}.json", json.dumps(record | sizes).encode()))
                tar.write(member(f"{record['key']}.txt", str(record["caption"]).encode()))
            tar.write(bytes(1024))


def member(name: str, content: bytes) -> bytes:
    """Return a file in a tar, as tarfile writes it, but ten times as fast."""
    front = name.encode().ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0%011o\0" % (len(content), 0)
    back = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(247)
    checksum = b"%06o\0 " % (sum(front) + sum(back) + sum(b" " * 8))
    return front + checksum + back + content + bytes(-len(content) % 512)


def make_flickr30k(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    names = [f"{1000092795 + 17 * n}.jpg" for n in range(images)]
    make_images(root, (f"flickr30k-images/{name}" for name in names), numbers)
    with (root / "results_20130124.token").open("w") as file:
        for n, text in enumerate(phrases(texts, 12).to_pylist()):
            file.write(f"{names[n % images]}#{n // images}\t{text}\n")


def make_vqa(root: Path, images: int, texts: int) -> None:
    asked = [
        {"image_id": n % images + 1, "question": text, "question_id": n}
        for n, text in enumerate(phrases(texts, 6).to_pylist())
    ]
    write_json(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": asked})
    answers = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": n + 1} for n in range(10)]
    given = {"question_type": "is the", "multiple_choice_answer": "yes", "answers": answers, "answer_type": "yes/no"}
    said = [given | {"image_id": n % images + 1, "question_id": n} for n in range(texts)]
    write_json(root / "v2_mscoco_train2014_annotations.json", {"annotations": said})


def make_gqa(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    make_images(root, (f"images/{VG + n}.jpg" for n in range(images)), numbers)
    program = [
        {"operation": "select", "dependencies": [], "argument": "sky (2486325)"},
        {"operation": "verify color", "dependencies": [0], "argument": "dark"},
    ]
    rest = {
        "semantic": program,
        "entailed": ["02930160", "02930158", "02930159", "02930154"],
        "equivalent": ["02930152"],
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
    }
    asked = {
        f"{n:08}": rest | {"question": text, "imageId": str(VG + n % images)}
        for n, text in enumerate(phrases(texts, 8).to_pylist())
    }
    write_json(root / "train_balanced_questions.json", asked)


def make_vg_qa(root: Path, images: int, texts: int, all_images: int) -> None:
    listed = [
        {"width": 800, "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{VG + n}.jpg", "height": 600}
        | {"image_id": VG + n, "coco_id": n // 2 + 1 if n < all_images // 2 * 2 and n % 2 else None, "flickr_id": None}
        for n in range(all_images)
    ]
    write_json(root / "image_data.json", listed)
    near = [{"object_id": 1058507, "x": 421, "y": 91, "w": 79, "h": 339, "name": "tree", "synsets": ["tree.n.01"]}]
    asked: list[list[dict[str, Any]]] = [[] for _ in range(images)]
    for n, text in enumerate(phrases(texts, 6).to_pylist()):
        question = {"a_objects": near, "question": text, "image_id": VG + n % images, "qa_id": n}
        asked[n % images].append(question | {"answer": "Dark.", "q_objects": near})
    write_json(root / "question_answers.json", [{"id": VG + n, "qas": qas} for n, qas in enumerate(asked)])


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
