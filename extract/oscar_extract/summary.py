"""What a job says to people: a line before, a table after."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from oscar_common.errors import OperationError
from oscar_extract.detector import Detector
from oscar_extract.plan import Plan
from oscar_shards.read import open_folder
from oscar_shards.stats import count


def print_start(plan: Plan, detector: Detector, out: Path) -> None:
    """Say what is about to happen."""
    record, model = plan.record, detector.record
    print(
        f"{record.num_images:,} images of {record.images}, {record.num_texts:,} texts -> {record.num_shards:,} shards "
        f"in {out}; detector {model.name} (P = {model.feature_dim}) on {detector.model.device.type}",
        flush=True,
    )


def print_summary(out: Path, plan: Plan, time: str) -> None:
    """Print a table of what lies in the folder now."""
    stats = count(open_folder(out, "--out"))
    spread = f"{stats.regions_min}-{stats.regions_max} an image, mean {stats.regions_mean:.1f}"
    reasons = "".join(f"; {reason}: {n:,}" for reason, n in stats.rejects.most_common())
    table = Table("", out.as_posix(), title="oscar-extract", title_justify="left")
    table.add_row("images", f"{stats.images:,} in {stats.shards:,} shards")
    table.add_row("regions", f"{stats.regions:,}; {spread}")
    table.add_row("texts", f"{stats.triples.total():,}; {stats.images_without_text:,} images have none")
    if plan.unmatched_texts:
        table.add_row("texts left out", f"{plan.unmatched_texts:,} are empty or name no image here")
    table.add_row("rejects", f"{stats.rejects.total():,}{reasons}")
    table.add_row("bytes", f"{stats.bytes / 1e6:,.1f} MB")
    table.add_row("time", time)
    console = Console()
    console.print(table, width=None if console.is_terminal else 110)


def check_rejects(out: Path, allowed: float) -> None:
    """Raise an OperationError if more than the allowed fraction of the images was refused."""
    folder = open_folder(out, "--out")
    refused, total = count(folder).rejects.total(), folder.manifest.plan.num_images
    if refused > allowed * total:
        raise OperationError(
            f"{refused} of {total} images were refused, more than --max-reject-fraction {allowed}; see "
            f"{out}/*.rejects.parquet, mend them, and run again with --retry-rejects"
        )
