"""What a GPU does with this project, the most important first, in some six minutes: `make bench-gpu`.

Each part is a process of its own with a limit of its own, so one that fails or is slow costs the others nothing. What
a part has measured is kept at once, in bench/results/gpu-CARD.json. `bench/page.py` makes docs/benchmarks.md of it.

Ways of training are those of steps.py, of random weights, on made shards with 35 + 50 tokens in every row, through the
stream: three laps of 20 steps each. The release's batches are ready before the clock starts.

    python bench/gpu.py --device cpu     # tries the script itself, with small sizes
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from oscar_common.device import choose_device
from oscar_common.errors import UsageError

if TYPE_CHECKING:
    from steps import Trainer

RESULTS = Path(__file__).parent / "results"
LAPS = 3
STEPS = {"cuda": (15, 3, 20), "cpu": (1, 0, 1)}  # to warm up, before each lap, and in it
GROUPS = {  # of a step's kernels, by what their names contain; the first that fits
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "attention": ("_forward", "_backward", "attention", "scaled_dot"),
    "optimizer": ("multi_tensor", "FusedOptimizer", "adam"),
    "copies from the host": ("HtoD",),
    "dropout": ("_dropout", "bitwise"),
}
REST = "LayerNorm, GELU, sums, casts and the rest"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the measurement. limit: seconds. arguments: of this script's `part`, after the device."""

    name: str
    limit: int
    arguments: tuple[str, ...]


def training(size: str, batch_size: int, *ways: str) -> tuple[str, ...]:
    """Return the arguments that measure ways of training."""
    return ("training", size, str(batch_size), *ways)


def extraction(detector: str, batch_size: int, *rest: str) -> tuple[str, ...]:
    """Return the arguments that measure a detector."""
    return ("extraction", detector, str(batch_size), *rest)


FASTEST = "ours-bf16-compiledgraphs"
PARTS = {
    "cuda": (
        Part(name="base", limit=100, arguments=training("base", 256, FASTEST, "ours-bf16", "release-bf16")),
        Part(name="profile", limit=45, arguments=("profile", "base", "256", FASTEST)),
        Part(name="vg-r101", limit=60, arguments=extraction("vg-r101", 8)),
        Part(name="base, 768", limit=45, arguments=training("base", 768, FASTEST)),
        Part(name="builtin", limit=40, arguments=extraction("builtin", 8)),
        Part(name="large", limit=60, arguments=training("large", 128, FASTEST, "visualbert-bf16")),
        Part(name="vinvl-x152", limit=60, arguments=extraction("vinvl-x152", 4, "--no-reference")),
    ),
    "cpu": (
        Part(name="tiny", limit=300, arguments=training("tiny", 8, "ours-bf16", "release-bf16")),
        Part(name="builtin", limit=300, arguments=extraction("builtin", 2, "--batches", "1")),
    ),
}


@click.group(help=__doc__, invoke_without_command=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the numbers.")
@click.pass_context
def main(context: click.Context, device: str, out: Path) -> None:
    if context.invoked_subcommand is not None:
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU that torch can use; --device cpu tries the script with small sizes")

    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    report: dict[str, Any] = {
        "card": card,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "parts": {},
    }
    path = out / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower())}.json"
    out.mkdir(parents=True, exist_ok=True)

    console = Console()
    for part in PARTS[device]:
        began = time.monotonic()
        console.print(f"{part.name} (at most {part.limit} s)")
        for measured in run_part(part, device):
            merge(report, measured)
            path.write_text(json.dumps(report, indent=1) + "\n")
            console.print_json(data=measured)
        seconds = time.monotonic() - began
        report["parts"][part.name] = f"cut after {part.limit} s" if seconds > part.limit else f"{seconds:.0f} s"
        path.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {path}; next: python bench/page.py")


def run_part(part: Part, device: str) -> Iterator[dict[str, Any]]:
    """Run a part in a process of its own, and yield what it has measured as it comes."""
    line = [sys.executable, __file__, "part", device, *part.arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        limit = threading.Timer(part.limit, process.kill)
        limit.start()
        for answer in process.stdout:
            if answer.startswith("{"):
                yield json.loads(answer)
        limit.cancel()


def merge(report: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add what was measured to the report, dictionaries into those of the same name."""
    for name, value in measured.items():
        if isinstance(value, dict):
            merge(report.setdefault(name, {}), value)
        else:
            report[name] = value


@main.command("part", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("device")
@click.argument("kind")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(device: str, kind: str, arguments: tuple[str, ...]) -> None:
    """Measure one part, and print each result as a line of JSON."""
    kinds: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "training": measure_training,
        "profile": measure_profile,
        "extraction": measure_extraction,
    }
    for measured in kinds[kind](choose_device(device), *arguments):
        print(json.dumps(measured), flush=True)


def measure_training(device: str, size: str, batch_size: str, *ways: str) -> Iterator[dict[str, Any]]:
    """Yield samples/s of ways of training, one after the other."""
    from oscar_train.model.flops import matrix_ceiling

    ceiling = matrix_ceiling(torch.device(device), "bf16")
    yield {"matrix_ceiling_tflops": round(ceiling / 1e12, 2)}

    warmup, lead, steps = STEPS[device]
    for way in ways:
        with opened(device, way, size, int(batch_size)) as (trainer, gflop):
            trainer.lap(0, warmup)
            laps = [trainer.lap(lead, steps) for _ in range(LAPS)]
            rates = sorted(int(batch_size) * lap.steps / lap.seconds for lap in laps)
            median = rates[LAPS // 2]
            numbers = {
                "samples_per_second": [float(f"{rate:.4g}") for rate in rates],
                "of_ceiling": round(median * gflop * 1e9 / ceiling, 3),
                "waited": round(sum(lap.waited for lap in laps) / sum(lap.seconds for lap in laps), 4),
                "peak_gb": round(laps[-1].peak_gb, 2),
            }
            yield {"training": {f"{size}, batch {batch_size}": {way: numbers}}}


def measure_profile(device: str, size: str, batch_size: str, way: str) -> Iterator[dict[str, Any]]:
    """Yield the milliseconds that kinds of kernels take of a step."""
    from torch.profiler import ProfilerActivity, profile

    steps = 4
    with opened(device, way, size, int(batch_size)) as (trainer, _):
        trainer.lap(0, STEPS[device][0])
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            trainer.lap(0, steps)

    groups: dict[str, float] = defaultdict(float)
    for kernel in profiled.key_averages():
        groups[group_of(kernel.key)] += kernel.self_device_time_total / 1e3 / steps
    milliseconds = {name: round(groups[name], 2) for name in (*GROUPS, REST)}
    yield {"kernels_ms_per_step": {f"{size}, batch {batch_size}, {way}": milliseconds}}


def group_of(kernel: str) -> str:
    """Return the group of a kernel of this name."""
    for group, parts in GROUPS.items():
        if any(part in kernel for part in parts):
            return group
    return REST


def measure_extraction(device: str, detector: str, batch_size: str, *rest: str) -> Iterator[dict[str, Any]]:
    """Yield what bench/extract.py measures of a detector."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("extract.py")
        settings = ("--detector", detector, "--device", device, "--batch-size", batch_size, "--precision", "bf16")
        subprocess.run([sys.executable, str(script), *settings, *rest, "--out", folder], check=True, stdout=sys.stderr)
        (path,) = Path(folder).glob("*.json")
        measured = json.loads(path.read_text())

    names = ("milliseconds_per_image", "images_per_second", "backbone_and_head", "reference_way", "against_fp32")
    numbers = {name: measured[name] for name in names if name in measured}
    yield {"extraction": {f"{detector}, batch {batch_size}": numbers}}


@contextmanager
def opened(device: str, way: str, size: str, batch_size: int) -> Iterator[tuple["Trainer", float]]:
    """Open a way of training on made shards; yield it with the useful GFLOP of a sample."""
    from oscar_train.data.stream import open_stream
    from oscar_train.model.flops import Work, count, flops
    from oscar_train.model.oscar import oscar_config, random_config
    from oscar_train.model.packing import pack
    from steps import OPENERS, Job, forget_peak
    from train import make_shards

    with tempfile.TemporaryDirectory() as folder:
        shards = [str(make_shards(Path(folder) / "shards", images=300, regions=50))]
        threads = len(os.sched_getaffinity(0))
        with open_stream(shards, batch_size=batch_size, cache=folder, pin=device == "cuda") as stream:
            work = Work()
            for number in range(4):
                work += count([pack(stream.batch(number, stream.buffer()), torch.device("cpu"))])
            config = oscar_config(random_config(size, stream.corpus.tokenizer.size), stream.corpus.feature_dim)

            job = Job(
                way=way, size=size, batch_size=batch_size, shards=shards, cache=folder, device=device, threads=threads
            )
            forget_peak(torch.device(device))
            yield OPENERS[job.kind](job, stream), flops(config, work) / work.triples / 1e9


if __name__ == "__main__":
    main()
