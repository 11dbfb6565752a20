"""What a pipeline will take, before it is submitted: images, shards, bytes, GPU-hours, network, at measured rates."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from oscar_common.errors import UsageError
from oscar_common.progress import duration, plural
from oscar_common.settings import AUTO, Extract, Train
from oscar_extract.messages import Job
from oscar_extract.plan import PLAN, Plan, plan_of, planned_record
from oscar_extract.sizing import Estimate, estimate
from oscar_extract.sources.request import make_request as make_corpus_request
from oscar_extract.sources.tables import LEFT_OUT
from oscar_shards.manifest import JOB_FILE, PlanRecord
from oscar_submit.request import Request, output

WIDTH = 120
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A measured rate, a second, on one device. source: the file under bench/results that it stands in."""

    rate: float
    device: str
    source: str


# Images a second of all stages in one thread, on one device, by detector and precision.
IMAGES = {
    ("builtin", "fp32"): Rate(rate=13.37, device="2 CPU cores", source="extract-builtin-detectron2-cpu-fp32.json"),
    ("builtin", "bf16"): Rate(rate=74.33, device="H100", source="extract-builtin-detectron2-cuda-bf16.json"),
    ("vg-r101", "bf16"): Rate(rate=42.45, device="H100", source="extract-vg-r101-bua-cuda-bf16.json"),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Training steps of so many triples on one GPU, in bf16; rate: triples a second."""

    model: str
    batch: int
    compile: bool
    rate: Rate


STEPS = (  # by batch
    Step(model="base", batch=256, compile=False, rate=Rate(rate=2335, device="H100", source="gpu-nvidia-h100.json")),
    Step(model="base", batch=256, compile=True, rate=Rate(rate=2543, device="H100", source="gpu-nvidia-h100.json")),
    Step(model="base", batch=768, compile=True, rate=Rate(rate=5426, device="H100", source="gpu-nvidia-h100.json")),
)
MODELS = {"bert-base-uncased": "base", "random:base": "base"}
REGIONS = 50  # of a triple, at most


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """How much there is to extract. origin: where the counts come from, for people."""

    record: PlanRecord
    origin: str


def measure(request: Request, settings: Extract) -> Corpus:
    """Return the counts of a corpus: of the plan in its folder, else of the data, else those of the paper.

    Raises:
        UsageError: there is neither a plan, nor data, nor a paper.
    """
    out = output(settings)
    if (out / JOB_FILE).exists():
        return Corpus(record=planned_record(out), origin=f"the plan in {settings.out}")

    try:
        plan = plan_of(make_corpus_request(settings, request.catalog), settings)
    except UsageError as error:
        if request.expected is None:
            raise
        return Corpus(record=_expected_record(request, settings), origin=f"the paper, as here {error.message}")

    return Corpus(record=plan.record, origin="the files here")


def _expected_record(request: Request, settings: Extract) -> PlanRecord:
    assert request.expected is not None
    images = request.expected.images
    return PlanRecord(
        images=",".join(settings.dataset),
        captions=None,
        num_images=images,
        num_texts=request.expected.texts,
        images_per_shard=settings.images_per_shard,
        num_shards=-(-images // settings.images_per_shard),
        sha256="",
    )


def print_extract(request: Request, settings: Extract, job: Job, corpus: Corpus, rate: float | None) -> None:
    """Print what stage 1 will take, at `rate` images a second and GPU or at the measured one."""
    jobs, record = request.cluster.extract, corpus.record
    measured = (
        Rate(rate=rate, device="", source="--rate") if rate else IMAGES.get((settings.detector, settings.precision))
    )
    size = _estimate(job, record, measured.rate if measured else 1.0)
    workers = max(1, min(jobs.workers, jobs.max_running or jobs.workers, record.num_shards))

    table = _table("extraction")
    table.add_row("images", f"{record.num_images:,} with {plural(record.num_texts, 'text')} ({corpus.origin})")
    if (expected := request.expected) is not None and corpus.record.sha256:
        table.add_row("the paper's", f"{expected.images:,} with {plural(expected.texts, 'text')}, rounded")

    table.add_row(
        "shards", f"{record.num_shards:,} of up to {plural(record.images_per_shard, 'image')}, in {settings.out}"
    )
    table.add_row(
        "bytes", f"{_span(size.size)}: {size.regions[0]} to {size.regions[1]} regions, P = {size.feature_dim}"
    )
    table.add_row("workers", _workers(request))
    if measured is None:
        table.add_row("time", f"not known: {settings.detector} in {settings.precision} was not measured; give --rate N")
    else:
        table.add_row("pace", f"{measured.rate:,g} images/s of a worker {_origin(measured)}")
        unit = "GPU-hours" if jobs.gpus else "worker-hours"
        table.add_row(
            "time", f"{size.gpu_hours:,.1f} {unit}; {duration(size.gpu_hours * 3600 / workers)} of all workers"
        )
        written = _span(tuple(total / max(size.gpu_hours * 3600 / workers, 1e-9) for total in size.size))
        table.add_row("network", f"writes {written} a second, and reads each image once")

    _print(table)


def print_train(request: Request, settings: Train) -> None:
    """Print what stage 2 will take at a measured rate."""
    job = request.cluster.train
    table = _table("training")
    batch = "a batch that fits" if settings.batch_size == AUTO else f"{settings.batch_size:,} triples"
    table.add_row("steps", f"{settings.steps:,} of {batch}, into {settings.out}")
    table.add_row("processes", f"{job.ranks:,} on {plural(job.nodes, 'node')}, {'GPUs' if job.gpus else 'CPUs'}")

    part = settings.batch_size // (job.ranks * settings.accumulate)
    measured = measured_step(settings, part) if job.gpus else None
    if measured is None:
        table.add_row("time", "not known: such steps were not measured on this device; the log says it soon")
    else:
        seconds = measured.batch / measured.rate.rate * settings.accumulate
        hours = settings.steps * seconds / 3600
        table.add_row(
            "pace",
            f"a step of {part} triples on a GPU takes at most the {seconds:.3f} s that one of {measured.batch} took "
            f"{_origin(measured.rate)}; the exchange of gradients comes on top",
        )
        table.add_row("time", f"{hours * job.ranks:,.1f} GPU-hours; {duration(hours * 3600)}")
        read = part * settings.accumulate * job.processes_per_node / seconds * REGIONS * 2048 * 2
        table.add_row("network", f"a node reads up to {_size(read)} a second ({REGIONS} regions of 2048 float16)")

    _print(table)


def measured_step(settings: Train, part: int) -> Step | None:
    """Return the smallest measured step of the same model, in bf16, that does at least `part` triples on a GPU."""
    if settings.precision != "bf16" or settings.batch_size == AUTO:
        return None
    model = MODELS.get(settings.init)
    steps = [step for step in STEPS if step.model == model and step.compile == settings.compile]
    return next((step for step in steps if step.batch >= part), None)


def _estimate(job: Job, record: PlanRecord, rate: float) -> Estimate:
    """Return what stage 1 takes; of the plan, counts are enough."""
    plan = Plan(
        roots=[], table=PLAN.empty_table(), counts=[], left_out=LEFT_OUT.empty_table(), record=record, inputs=""
    )
    return estimate(job, plan, rate)


def extract_job(request: Request, settings: Extract) -> Job:
    """Return stage 1's job: its settings with the detector that they name.

    Raises:
        UsageError: no such detector, or settings that cannot be.
    """
    from oscar_extract.__main__ import check, choose_detector

    check(dataclasses.replace(settings, out=None, dry_run=True))
    return Job(out=output(settings), settings=settings, entry=choose_detector(settings, request.catalog))


def _workers(request: Request) -> str:
    jobs, cluster = request.cluster.extract, request.cluster
    limit = f", at most {jobs.max_running} at once" if jobs.max_running else ""
    gpus = f"{plural(jobs.gpus, 'GPU')}, " if jobs.gpus else ""
    worker = f"{gpus}{plural(jobs.cpus, 'core')}, {jobs.memory}, {jobs.time or cluster.time} each"
    return f"{jobs.workers}{limit}: {worker}, on {request.cluster_name}"


def _origin(rate: Rate) -> str:
    if not rate.device:
        return f"({rate.source})"
    return f"(measured on {rate.device}: {Path('bench/results', rate.source)})"


def _table(title: str) -> Table:
    return Table("", "", title=title, title_justify="left", show_header=False)


def _print(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def _span(sizes: tuple[float, ...]) -> str:
    low, high = _size(sizes[0]), _size(sizes[-1])
    return low if low == high else f"{low} to {high}"


def _size(size: float) -> str:
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:,.1f} {unit}"
