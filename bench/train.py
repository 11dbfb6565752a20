"""Training steps of this project beside the released ones and VisualBERT's: samples/s, arithmetic, waiting, memory.

    oscar-extract --images PHOTOS --out shards
    python bench/train.py --shards shards

Ways, all on the same triples, with dropout, of random weights:

- ours: what `oscar-train` does, through its stream, in each precision, and compiled.
- release: the step of microsoft/Oscar re-created (released.py): batches padded to 35 + 50, the head over the vocabulary
  at all positions, its own AdamW; in fp32, and under bf16 autocast.
- visualbert: VisualBertForPreTraining of transformers in the same loop, with torch's fused AdamW.

The peers get their batches from our stream, as tensors that are ready before the clock starts, which flatters them:
their own reading is left out. `waited` is the share of our time in which the stream had nothing ready.

Each way runs in a process of its own. After warming up, they take turns, a few steps each, so that the machine's moods
strike all alike; medians are over the rounds. As many are there at once as memory holds, those of one precision next to
each other. The operations that count are the useful ones alone: those of real tokens, and of the head at masked ones;
they are the same for all ways. The ceiling is that of the fastest product of two square matrices in the same precision,
before the steps or after them. Memory is the most after warming up: of tensors on the GPU, or of the process with its
imports.

`ablation` is one of our choices the other way at a time, for the first size. `numerics` compares a pass of what is not
exact with a plain one in fp32 of the same weights, batch and dropout, and the release's with ours, without dropout.

Without --shards some are made at random, each image with --regions. The numbers go to bench/results/train-DEVICE.json.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import steps as bench_steps
from machine import machine
from oscar_common.cli import SPIN
from oscar_common.device import choose_device
from oscar_common.errors import UsageError
from oscar_common.sample import Regions
from oscar_shards.manifest import Layout, write_manifest
from oscar_shards.write import shard_path, write_shard
from oscar_train.arguments import FEW_SHAPES, SIZES
from oscar_train.batch import MAX_REGIONS, MAX_TOKENS
from oscar_train.data.stream import open_stream
from oscar_train.model.flops import Work, count, flops, matrix_ceiling
from oscar_train.model.oscar import oscar_config, random_config
from oscar_train.model.packing import pack
from served import Served
from steps import KINDS, TWISTS, Job, Lap
from stream import make_manifest, make_sample
from ways import FEATURE_DIM

RESULTS = Path(__file__).parent / "results"
GOAL = 1.3  # times the release's samples/s, in the same precision
BATCH = {"cpu": {"base": 16, "large": 8}, "cuda": {"base": 256, "large": 128}}
ROUNDS = {"cpu": 3, "cuda": 7}
TURN = {"cpu": (0, 1), "cuda": (5, 20)}  # steps before the clock starts, and with it
FASTER = ("compile", "graphs", "compiledgraphs")  # ways of their own
ROOM = 1.5  # times the largest process' memory that must be free for one more


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. job: of every process, up to its way, size and batch."""

    job: Job
    ways: list[str]
    ablation: list[str]
    rounds: int
    lead: int
    steps: int
    at_once: int

    @property
    def precisions(self) -> list[str]:
        return list(dict.fromkeys(replace(self.job, way=way).precision for way in self.ways))


@click.command(help=__doc__)
@click.option("--shards", multiple=True, help="Folder of shards; may be given again.  [default: made at random]")
@click.option("--regions", type=click.IntRange(1, 50), default=50, show_default=True, help="Of made images.")
@click.option("--images", type=click.IntRange(1), default=500, show_default=True, help="Images to make.")
@click.option("--sizes", default="base,large", show_default=True, help=f"Some of {', '.join(SIZES)}.")
@click.option("--batch-sizes", help="One for each size.  [default: 16,8; on a GPU 256,128]")
@click.option("--ways", help="Some of ours-PRECISION, ours-PRECISION-compile, release-..., ...  [default: all]")
@click.option("--ablation/--no-ablation", default=True, show_default=True, help="Our choices the other way.")
@click.option("--rounds", type=click.IntRange(1), help="[default: 3; on a GPU 7]")
@click.option("--steps", type=click.IntRange(1), help="Of each way in a round.  [default: 1; on a GPU 20]")
@click.option("--warmup", type=click.IntRange(1), default=2, show_default=True, help="Steps before the first round.")
@click.option("--at-once", type=click.IntRange(1), default=16, help="Most ways in memory.  [default: all that fit]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of torch.  [default: as many as cores]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: bench/results/train-DEVICE.json]")
def main(
    shards: tuple[str, ...],
    regions: int,
    images: int,
    sizes: str,
    batch_sizes: str | None,
    ways: str | None,
    ablation: bool,
    rounds: int | None,
    steps: int | None,
    warmup: int,
    at_once: int,
    device: str,
    threads: int | None,
    out: Path | None,
) -> None:
    device = choose_device(device)
    names = chosen_ways(ways, device)
    batches = chosen_sizes(sizes, batch_sizes, device)
    rounds, threads = rounds or ROUNDS[device], threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    said = "given" if shards else f"made, {regions} regions each"
    report = circumstances(device, threads) | {"rounds": rounds, "shards": said}
    with tempfile.TemporaryDirectory() as folder:
        places = list(shards) or [str(make_shards(Path(folder) / "shards", images, regions))]
        job = Job(shards=places, cache=folder, device=device, threads=threads, warmup=warmup)
        lead, turn = TURN[device]
        plan = Plan(job=job, ways=names, ablation=[], rounds=rounds, lead=lead, steps=steps or turn, at_once=at_once)
        plain = "ours-fp32" if device == "cpu" else "ours-bf16"
        others = [f"{plain}-{twist}" for twist in TWISTS if twist not in FASTER] if plain in names else []
        report["sizes"] = {}
        for number, (size, batch_size) in enumerate(batches.items()):
            extra = others if ablation and not number else []
            one = replace(plan, job=replace(job, size=size, batch_size=batch_size), ablation=extra)
            report["sizes"][size] = measure(one)
            show(size, report)
    out = out or RESULTS / f"train-{re.sub('[^a-z0-9]+', '-', report['device'].lower())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {out}")


def chosen_ways(ways: str | None, device: str) -> list[str]:
    """Return the ways, those of one precision next to each other."""
    allowed = []
    for precision in ("fp32", "tf32", "bf16") if device == "cuda" else ("fp32", "bf16"):
        kinds = KINDS if precision != "tf32" else KINDS[:1]
        allowed += [*(f"{kind}-{precision}" for kind in kinds), f"ours-{precision}-compile"]
        if device == "cuda":
            allowed += [f"ours-{precision}-graphs", f"ours-{precision}-compiledgraphs"]
    names = [name.strip() for name in ways.split(",")] if ways else allowed
    if unknown := [name for name in names if name not in allowed]:
        raise UsageError(f"--ways {unknown[0]}: allowed are {', '.join(allowed)}")
    return sorted(dict.fromkeys(names), key=allowed.index)


def chosen_sizes(sizes: str, batch_sizes: str | None, device: str) -> dict[str, int]:
    names = [name.strip() for name in sizes.split(",")]
    if unknown := [name for name in names if name not in SIZES]:
        raise UsageError(f"--sizes {unknown[0]}: allowed are {', '.join(SIZES)}")
    default = BATCH[device]
    numbers = batch_sizes.split(",") if batch_sizes else [str(default.get(name, default["base"])) for name in names]
    if len(numbers) != len(names) or not all(number.isdecimal() and int(number) % 4 == 0 for number in numbers):
        raise UsageError(f"--batch-sizes {batch_sizes}: give a multiple of 4 for each of --sizes {sizes}, as in 16,8")
    return dict(zip(names, map(int, numbers), strict=True))


def make_shards(out: Path, images: int, regions: int) -> Path:
    """Make a shard at random, each image with so many regions."""
    out.mkdir()
    rng = np.random.default_rng(0)
    pool = np.maximum(rng.normal(size=(4096, FEATURE_DIM)), 0).astype(np.float16)
    whole = (make_sample(number, pool, rng) for number in range(images))
    samples = (replace(sample, regions=first(sample.regions, regions)) for sample in whole)
    write_shard(shard_path(out, "shard", 0), samples, Layout(feature_dim=FEATURE_DIM))
    manifest = make_manifest(images)
    write_manifest(out, replace(manifest, plan=replace(manifest.plan, num_shards=1)))
    return out


def first(regions: Regions, count: int) -> Regions:
    return Regions(**{name: values[:count] for name, values in vars(regions).items()})


def circumstances(device: str, threads: int) -> dict[str, Any]:
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }


@contextmanager
def started(command: str, job: Job, *rest: str) -> Iterator[Served]:
    """Start a process of steps.py; the end of its input ends it."""
    line = [sys.executable, bench_steps.__file__, command, json.dumps(asdict(job)), *rest]
    environment, pipe = {**SPIN, **FEW_SHAPES, **os.environ}, subprocess.PIPE  # as oscar-train sets them
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, stderr=said, text=True) as process,
    ):
        yield Served(way=job.way, process=process, said=said)


def measure(plan: Plan) -> dict[str, Any]:
    """Return what was seen of one size."""
    device = torch.device(plan.job.device)
    ceilings = [{p: matrix_ceiling(device, p) for p in plan.precisions}]
    laps = run_ways(plan)
    ceilings.append({p: matrix_ceiling(device, p) for p in plan.precisions})
    work = per_sample(plan)
    best = {p: max(c[p] for c in ceilings) for p in plan.precisions}
    seen = {way: summary(plan, way, some, work["gflop"], best) for way, some in laps.items()}
    compiled = any(way.endswith("compile") for way in plan.ways)
    with started("numerics", plan.job, ",".join(plan.precisions), "compile" if compiled else "") as worker:
        differences = worker.answer()
    return {
        "batch_size": plan.job.batch_size,
        "steps_in_a_round": plan.steps,
        "per_sample": work,
        "matrix_ceiling_gflop_per_second": {
            p: {"before": round(ceilings[0][p] / 1e9), "after": round(ceilings[1][p] / 1e9)} for p in plan.precisions
        },
        "ways": {way: seen[way] | ratios(seen, way) for way in plan.ways},
        "goal": {way: met for way in plan.ways if (met := goal(seen, way))},
        "ablation": ablation(seen, plan),
        "numerics": differences,
    }


def run_ways(plan: Plan) -> dict[str, list[Lap]]:
    """Let all ways take turns, as many at once as memory holds."""
    pending, laps = [*plan.ways, *plan.ablation], defaultdict(list)
    pending.sort(key=lambda way: plan.precisions.index(replace(plan.job, way=way).precision))
    largest = 0.0
    while pending:
        with ExitStack() as stack:
            workers: list[Served] = []
            while pending and (not workers or has_room(plan, len(workers), largest)):
                workers.append(stack.enter_context(started("serve", replace(plan.job, way=pending.pop(0)))))
                largest = max(largest, Lap(**workers[-1].answer()).peak_gb)
            title = f"{plan.job.size}: {', '.join(worker.way for worker in workers)}"
            for _ in track(range(plan.rounds), title, transient=True):
                for worker in workers:
                    laps[worker.way].append(Lap(**worker.ask(plan.lead, plan.steps)))
    return laps


def has_room(plan: Plan, workers: int, largest: float) -> bool:
    """Return whether one more process may join, if it is as large as the largest; those that wait may grow, too."""
    free = torch.cuda.mem_get_info()[0] if plan.job.device == "cuda" else psutil.virtual_memory().available
    return workers < plan.at_once and bool(free > ROOM * largest * 1e9)


def per_sample(plan: Plan) -> dict[str, float]:
    """Return what a triple holds on average, in the batches that were timed, and its useful operations."""
    work, cpu = Work(), torch.device("cpu")
    with open_stream(plan.job.shards, batch_size=plan.job.batch_size, cache=plan.job.cache) as stream:
        steps = plan.job.warmup + plan.rounds * (plan.lead + plan.steps)
        for batch in stream.batches(0, steps):
            work += count([pack(batch, cpu)])
        config = oscar_config(random_config(plan.job.size, stream.corpus.tokenizer.size), stream.corpus.feature_dim)
    tokens, regions, masked = (number / work.triples for number in (work.tokens, work.regions, work.masked))
    return {
        "text_tokens": round(tokens - regions, 1),
        "regions": round(regions, 1),
        "share_of_85": round(tokens / (MAX_TOKENS + MAX_REGIONS), 3),
        "masked_tokens": round(masked, 2),
        "gflop": round(flops(config, work) / work.triples / 1e9, 3),
    }


def summary(plan: Plan, way: str, laps: list[Lap], gflop: float, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return what was seen of a way; waited is for a process that reads while it trains."""
    rates = [lap.steps * plan.job.batch_size / lap.seconds for lap in laps]
    median = statistics.median(rates)
    job = replace(plan.job, way=way)
    waited = {"waited": round(sum(lap.waited for lap in laps) / sum(lap.seconds for lap in laps), 4)}
    return {
        "samples_per_second": {"median": digits(median), "min": digits(min(rates)), "max": digits(max(rates))},
        "useful_gflop_per_second": round(median * gflop, 1),
        "of_ceiling": round(median * gflop * 1e9 / ceilings[job.precision], 4),
        **(waited if job.kind == "ours" else {}),
        "peak_gb": round(max(lap.peak_gb for lap in laps), 2),
        "last_loss": round(laps[-1].loss, 4),
    }


def digits(number: float) -> float:
    """Keep four digits."""
    return float(f"{number:.4g}")


def median_of(seen: dict[str, Any], way: str) -> float:
    return float(seen[way]["samples_per_second"]["median"])


def ratios(seen: dict[str, Any], way: str) -> dict[str, float]:
    """Return how many times as many samples/s one of our ways has as the peers of the same precision."""
    kind, precision = way.split("-")[:2]
    peers = [f"{peer}-{precision}" for peer in KINDS[1:]] if kind == KINDS[0] else []
    return {f"to_{peer}": round(median_of(seen, way) / median_of(seen, peer), 3) for peer in peers if peer in seen}


def goal(seen: dict[str, Any], way: str) -> str | None:
    """Say whether one of our ways is as much faster than the release as it should be; None if that was not measured."""
    ratio = ratios(seen, way).get(f"to_release-{way.split('-')[1]}")
    return None if ratio is None else ("met" if ratio >= GOAL else "not met")


def ablation(seen: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Compare ways that differ from one of ours in one thing with it."""
    pairs = {way: way.rpartition("-")[0] for way in seen if way.count("-") == 2}
    pairs |= {f"ours-{p}": "ours-fp32" for p in plan.precisions if p != "fp32" and f"ours-{p}" in seen}
    return {
        way: {
            "what": TWISTS.get(replace(plan.job, way=way).twist, "arithmetic of the network"),
            "beside": plain,
            "samples_per_second": seen[way]["samples_per_second"],
            "speed": round(median_of(seen, way) / median_of(seen, plain), 3),
            "memory": round(seen[way]["peak_gb"] / seen[plain]["peak_gb"], 3),
        }
        for way, plain in pairs.items()
        if plain in seen
    }


def show(size: str, report: dict[str, Any]) -> None:
    found, console = report["sizes"][size], Console(width=None if sys.stdout.isatty() else 120)
    work = found["per_sample"]
    console.print(
        f"{size} on {report['device']}, batches of {found['batch_size']}: a triple has {work['text_tokens']} text "
        f"tokens and {work['regions']} regions ({work['share_of_85']:.0%} of 85), {work['gflop']} useful GFLOP"
    )
    names = ("way", "samples/s", "least", "most", "of ceiling", "waited", "GB", "x release", "x visualbert", "goal")
    table = Table(*names, title=f"{size}; goal: {GOAL} x the release's samples/s in the same precision")
    for way, row in found["ways"].items():
        rates, precision = [f"{rate:,}" for rate in row["samples_per_second"].values()], way.split("-")[1]
        waited = f"{row['waited']:.1%}" if "waited" in row else ""
        times = [str(row.get(f"to_{peer}-{precision}", "")) for peer in KINDS[1:]]
        share = f"{row['of_ceiling']:.1%}"
        table.add_row(way, *rates, share, waited, str(row["peak_gb"]), *times, found["goal"].get(way, ""))
    console.print(table)
    table = Table("way", "beside", "speed", "memory", "what", title="the other way")
    for way, row in found["ablation"].items():
        table.add_row(way, row["beside"], f"x {row['speed']}", f"x {row['memory']}", row["what"])
    if found["ablation"]:
        console.print(table)
    table = Table("way", "loss", "norm", "1 - cosine of gradients", title="relative differences from ours-fp32")
    for way, row in found["numerics"].items():
        numbers = (row["loss_difference"], row["norm_difference"], 1 - row["gradient_cosine"])
        table.add_row(way, *(f"{number:.1e}" for number in numbers))
    console.print(table)


if __name__ == "__main__":
    main()
