"""Makes docs/benchmarks.md of bench/results/gpu-*.json: `python bench/page.py`. Nothing on the page is typed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
WAYS = {
    "ours-bf16": "eager",
    "ours-bf16-compile": "`--compile`",
    "ours-bf16-graphs": "`--cuda-graphs`",
    "ours-bf16-compiledgraphs": "`--compile --cuda-graphs`",
    "release-bf16": "the release's step, re-created",
    "visualbert-bf16": "transformers' VisualBERT",
}
HEAD = """# Benchmarks on GPUs

`python bench/page.py` makes this page of [bench/results](../bench/results)`/gpu-*.json`, which `make bench-gpu` writes.
Weights are random and shards are made: speed does not depend on what a network has learned. Rows are full, 35 + 50
tokens, and the arithmetic is bf16. The ceiling is that of the fastest product of two square matrices on the same card.
"""


def page() -> str:
    """Return the page."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return "\n".join([HEAD, *(line for report in reports for line in card(report))])


def card(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about a card."""
    yield f"## {report['card']}\n"
    yield f"{report['date']}, torch {report['torch']}, ceiling {report['matrix_ceiling_tflops']} TFLOP/s.\n"

    if "training" in report:
        yield from training(report["training"])
    if "kernels_ms_per_step" in report:
        yield from kernels(report["kernels_ms_per_step"])
    if "extraction" in report:
        yield from extraction(report["extraction"])

    for note in report.get("notes", []):
        yield f"- {note}"
    if "notes" in report:
        yield ""


def training(sizes: dict[str, Any]) -> Iterator[str]:
    """Yield a table of training steps."""
    yield "| training | way | samples/s, median (least to most) | of the ceiling | waited for data | GB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for size, ways in sizes.items():
        for way, row in ways.items():
            least, median, most = row["samples_per_second"]
            spread = "" if least == most else f" ({least:,.0f} to {most:,.0f})"
            rate = f"{median:,.0f}{spread}"
            share = percent(row.get("of_ceiling"))
            waited = percent(row.get("waited"))
            yield f"| {size} | {WAYS.get(way, way)} | {rate} | {share} | {waited} | {row.get('peak_gb', '')} |"
    yield ""


def percent(share: float | None) -> str:
    """Return a share as a percentage, or nothing if it was not measured."""
    return "" if share is None else f"{share:.1%}"


def kernels(steps: dict[str, Any]) -> Iterator[str]:
    """Yield a table of what a step's kernels take."""
    names = list(dict.fromkeys(name for groups in steps.values() for name in groups))
    yield f"| kernels of a step, ms | {' | '.join(names)} | all |"
    yield f"| --- {'| --- ' * (len(names) + 1)}|"
    for step, groups in steps.items():
        times = " | ".join(str(groups.get(name, "")) for name in names)
        yield f"| {step} | {times} | {sum(groups.values()):.1f} |"
    yield ""


def extraction(detectors: dict[str, Any]) -> Iterator[str]:
    """Yield a table of detectors."""
    stages = list(dict.fromkeys(name for row in detectors.values() for name in row["milliseconds_per_image"]))
    yield f"| extraction, ms an image | {' | '.join(stages)} | share of the ceiling, backbone and head |"
    yield f"| --- {'| --- ' * (len(stages) + 1)}|"
    for detector, row in detectors.items():
        times = " | ".join(str(row["milliseconds_per_image"].get(stage, "")) for stage in stages)
        share = percent(row.get("backbone_and_head", {}).get("share_of_ceiling"))
        yield f"| {detector} | {times} | {share} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
