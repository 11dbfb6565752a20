"""What a job says to people: the corpus and the plan before it, a table after it."""

import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from oscar_common.errors import OperationError
from oscar_common.files import replacing
from oscar_common.progress import duration, plural
from oscar_extract.messages import Survey
from oscar_extract.plan import Plan
from oscar_extract.sizing import Estimate
from oscar_extract.sources.corpus import MISSING
from oscar_shards.manifest import LEFT_OUT_FILE, MISSING_FILE
from oscar_shards.read import find_shards
from oscar_shards.seal import write_sealed
from oscar_shards.stats import count

PAPER = {  # images / texts of Oscar's pre-training corpus (Li et al. 2020, appendix)
    "coco": "112k / 560k",
    "cc": "3.0M / 3.0M",
    "sbu": "840k / 840k",
    "flickr30k": "29k / 145k",
    "vqa": "83k / 444k",
    "gqa": "79k / 1026k",
    "vg-qa": "48k / 484k",
}
PLAIN_WIDTH = 130
NAMED = 10  # damaged tars that are named one by one


def print_corpus(plan: Plan) -> None:
    """Print images and texts by dataset, beside the paper's, and what is left out."""
    published = any(row.dataset in PAPER for row in plan.counts)
    table = Table("dataset", title="corpus", title_justify="left")
    for name in ("images", "texts", *(["Oscar's images / texts"] if published else []), "left out"):
        table.add_column(name, justify="left" if name == "left out" else "right")

    for row in plan.counts:
        left_out = ", ".join(f"{reason} {n:,}" for reason, n in sorted(row.left_out.items()))
        paper = [PAPER.get(row.dataset, "")] if published else []
        table.add_row(row.dataset, f"{row.images:,}", f"{row.texts:,}", *paper, left_out)

    record = plan.record
    table.add_section()
    paper = ["4.1M / 6.5M"] if published else []
    table.add_row("all, each image once", f"{record.num_images:,}", f"{record.num_texts:,}", *paper, "")
    _print(table)


def print_estimate(plan: Plan, survey: Survey, workers: str, speedup: int) -> None:
    """Print the plan, and what a sample says of the time and the bytes that it will take."""
    record, rate = plan.record, survey.images_per_second * speedup
    table = Table("", "", title="plan", title_justify="left", show_header=False)
    table.add_row(
        "images", f"{record.num_images:,} in {plural(record.num_shards, 'shard')} of up to {record.images_per_shard:,}"
    )
    table.add_row("bytes", f"about {_bytes(survey.bytes_per_image * record.num_images)}")
    detector = survey.manifest.detector
    table.add_row(
        "detector", f"{detector.name}, preset {detector.preset}, P = {detector.feature_dim}, on {survey.device}"
    )
    table.add_row("pace", f"{rate:,.1f} images/s ({workers}; measured on a short sample)")
    table.add_row("time", f"about {duration(record.num_images / rate)}" if rate else "unknown: no image could be used")
    table.add_row("memory", f"{survey.memory / 1e9:.2f} GB a process")
    _print(table)


def print_size(size: Estimate, rate: float) -> None:
    """Print what a job takes at `rate` images a second."""
    low, high = size.regions
    spread = f"{low}" if low == high else f"{low} to {high}"
    room = f"about {_bytes(size.size[1])}" if low == high else " to ".join(_bytes(count) for count in size.size)
    hours = size.gpu_hours

    table = Table("", "", title="plan", title_justify="left", show_header=False)
    table.add_row("images", f"{size.images:,} in {plural(size.shards, 'shard')}")
    table.add_row("bytes", f"{room} ({spread} regions an image, P = {size.feature_dim})")
    table.add_row("GPU-hours", f"{hours:,.1f} at {rate:g} images/s ({duration(hours * 3600)} of one GPU)")
    _print(table)


def warn_of_damage(plan: Plan) -> None:
    """Name damaged tars, a few of them, on standard error; the list of what is left out has all."""
    damaged = plan.left_out.filter(pc.equal(plan.left_out["reason"], "damaged-tar")).to_pylist()
    for row in damaged[:NAMED]:
        print(f"warning: {row['image']} is damaged: {row['message']}", file=sys.stderr)
    if damaged[NAMED:]:
        print(f"warning: {len(damaged) - NAMED:,} more tars are damaged; {LEFT_OUT_FILE} lists them", file=sys.stderr)


def print_start(plan: Plan, survey: Survey, out: Path, workers: str) -> None:
    """Say what is about to happen."""
    record, detector = plan.record, survey.manifest.detector
    files = f" ({plural(record.num_images + record.num_duplicates, 'file')})" if record.num_duplicates else ""
    counts = f"{plural(record.num_images, 'image')}{files} of {record.images}, {plural(record.num_texts, 'text')}"
    print(
        f"{counts} -> {plural(record.num_shards, 'shard')} in {out}; detector {detector.name} "
        f"(P = {detector.feature_dim}) on {survey.device}, {workers}",
        flush=True,
    )


def print_summary(out: Path, plan: Plan, time: str, memory: str, lost: int) -> None:
    """Print a table of what lies in the folder now."""
    stats = count(find_shards(out, "--out")[1])
    spread = f"{stats.regions_min}-{stats.regions_max} an image, mean {stats.regions_mean:.1f}"
    table = Table("", out.as_posix(), title="oscar-extract", title_justify="left")
    table.add_row("images", f"{stats.images:,} in {plural(stats.shards, 'shard')}")
    table.add_row("regions", f"{stats.regions:,}; {spread}")
    table.add_row("texts", f"{stats.triples.total():,}; {stats.images_without_text:,} images have none")
    left_out = sum((Counter(row.left_out) for row in plan.counts), Counter[str]())
    if left_out:
        table.add_row("left out", f"{_counts(left_out)}; see {LEFT_OUT_FILE}")

    rejects = f"; {_counts(stats.rejects)}" if stats.rejects else ""
    table.add_row("rejects", f"{stats.rejects.total():,}{rejects}")
    table.add_row("bytes", f"{stats.bytes / 1e6:,.1f} MB")
    table.add_row("time", time)
    table.add_row("memory", memory)
    if lost:
        table.add_row("workers lost", f"{lost:,}; their shards were done again")

    _print(table)


def check_missing(out: Path, plan: Plan, allowed: float) -> None:
    """Raise an OperationError, before the work, if more than the allowed fraction of the images is not there.

    The list of them has a name of its own: what lies in `out` may be another plan's.
    """
    missing, total = plan.record.num_missing, _total(plan)
    if missing <= allowed * total:
        return

    missing_rows = plan.left_out.filter(pc.is_in(plan.left_out["reason"], value_set=pa.array(MISSING)))
    list_file = out / (MISSING_FILE if len(missing_rows) else LEFT_OUT_FILE)  # the second of a plan that lies there
    if len(missing_rows):
        out.mkdir(parents=True, exist_ok=True)
        with replacing(list_file) as file:
            write_sealed(plan.left_out, file, compression="zstd")

    like = ", ".join(missing_rows["image"][:3].to_pylist())
    raise OperationError(
        f"{missing} of {total} images are missing ({missing / total:.3f}{f', like {like}' if like else ''}), more than "
        f"--max-reject-fraction {allowed}; {list_file} lists them"
    )


def check_rejects(out: Path, plan: Plan, allowed: float) -> None:
    """Raise an OperationError if more than the allowed fraction of the images was refused or is missing."""
    refused = sum(pq.read_metadata(path).num_rows for path in out.glob("*.rejects.parquet"))
    missing, total = plan.record.num_missing, _total(plan)
    if refused + missing > allowed * total:
        gone = f" and {missing} are missing" if missing else ""
        raise OperationError(
            f"{refused} of {total} images were refused{gone} ({(refused + missing) / total:.3f}), more than "
            f"--max-reject-fraction {allowed}; see {out}/*.rejects.parquet, mend them, and run again with "
            "--retry-rejects"
        )


def _total(plan: Plan) -> int:
    return plan.record.num_images + plan.record.num_duplicates + plan.record.num_missing


def _counts(counts: "Counter[str]") -> str:
    return ", ".join(f"{reason}: {n:,}" for reason, n in counts.most_common())


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.1f} {unit}"


def _print(table: Table) -> None:
    console = Console()
    console.print(table, width=None if console.is_terminal else PLAIN_WIDTH)
