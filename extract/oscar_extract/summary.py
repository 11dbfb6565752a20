"""What a job says to people: a line before, a table after."""

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from oscar_common.errors import OperationError
from oscar_extract.detector import Detector
from oscar_extract.plan import Plan
from oscar_shards.read import ShardFolder, open_folder, read_rejects


def print_start(plan: Plan, detector: Detector, out: Path) -> None:
    """Say what is about to happen."""
    record, model = plan.record, detector.record
    print(
        f"{record.num_images:,} images of {record.images}, {record.num_texts:,} texts -> {record.num_shards:,} shards in "
        f"{out}; detector {model.name} (P = {model.feature_dim}) on {detector.model.device.type}",
        flush=True,
    )


def print_summary(out: Path, plan: Plan, rate: float) -> None:
    """Print a table of what lies in the folder now."""
    folder = open_folder(out, "--out")
    counts, rejects = folder.table["num_boxes"], reject_reasons(folder)
    table = Table("", out.as_posix(), title="oscar-extract", title_justify="left")
    table.add_row("images", f"{len(counts):,} in {len(folder.tars):,} shards")
    if len(counts):
        spread = pc.min_max(counts).as_py()
        table.add_row("regions", f"{pc.sum(counts).as_py():,}, per image {spread['min']}-{spread['max']}, "
                      f"mean {pc.mean(counts).as_py():.1f}")
    without = int(pc.sum(pc.equal(pc.list_value_length(folder.table["texts"]), 0)).as_py() or 0)
    table.add_row("texts", f"{plan.record.num_texts:,}; {without:,} images have none")
    if plan.unmatched_texts:
        table.add_row("texts left out", f"{plan.unmatched_texts:,} are empty or name no image here")
    table.add_row("rejects", f"{sum(rejects.values()):,}" + "".join(f"; {r}: {n:,}" for r, n in rejects.most_common()))
    table.add_row("bytes", f"{sum(t.stat().st_size for t in folder.tars) / 1e6:,.1f} MB")
    table.add_row("speed", f"{rate:.1f} images/s" if rate else "nothing left to do")
    Console(width=None if Console().is_terminal else 110).print(table)


def reject_reasons(folder: ShardFolder) -> Counter[str]:
    """Count the rejects of a folder by reason."""
    rejects = read_rejects(folder)
    return Counter(rejects["reason"].to_pylist() if rejects else [])


def check_rejects(out: Path, allowed: float) -> None:
    """Raise an OperationError if more than the allowed fraction of the images was refused."""
    folder = open_folder(out, "--out")
    refused, total = sum(reject_reasons(folder).values()), folder.manifest.plan.num_images
    if refused > allowed * total:
        raise OperationError(
            f"{refused} of {total} images were refused, more than --max-reject-fraction {allowed}; see "
            f"{out}/*.rejects.parquet, mend them, and run again with --retry-rejects"
        )
