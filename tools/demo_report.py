"""The demo's last step: one self-contained page of photos with regions, shard statistics and loss curves."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import click
import matplotlib as mpl
from matplotlib.figure import Figure

from oscar_common.files import replacing
from oscar_shards.pages.page import page
from oscar_shards.pages.report import fact_table, measure
from oscar_shards.pages.show import MIN_SCORE, choose
from oscar_shards.pages.view import sheet

LIMIT = 100  # images


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write FOLDER/report.html from FOLDER/images, FOLDER/shards and FOLDER/train."""
    with replacing(folder / "report.html") as file:
        for piece in page("Oscar demo", body(folder)):
            file.write(piece.encode())
    print(f"report: {folder / 'report.html'}")


def body(folder: Path) -> Iterator[str]:
    """Yield the page's content."""
    shards = folder / "shards"
    yield "<h1>From photos to a pre-trained Oscar</h1>\n"
    yield '<p class="lead">Photos with the regions, tags and scores in the shards, and their texts.</p>\n'
    yield from sheet(choose(shards, limit=LIMIT), folder / "images", MIN_SCORE)
    yield f"<h2>Shards</h2>{fact_table(measure([shards]))}\n"
    yield f'<h2>Pre-training</h2><div class="paper">{curves(folder / "train" / "metrics.csv")}</div>\n'


def curves(metrics: Path) -> str:
    """Return losses and accuracies over the steps as inline SVG."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    mpl.rcParams.update({"svg.hashsalt": "oscar", "svg.fonttype": "none"})  # the same page for the same numbers
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, names, label in zip(
        figure.subplots(1, 3),
        (["mlm_loss"], ["match_loss"], ["mlm_accuracy", "match_accuracy"]),
        ("masked token loss", "contrastive loss", "accuracy"),
        strict=True,
    ):
        for name in names:
            axes.plot(steps, [float(row[name]) for row in rows], label=name)
        axes.set(title=label, xlabel="step")
        axes.grid(alpha=0.3)
    axes.legend()
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing.getvalue()[drawing.getvalue().index("<svg") :]


if __name__ == "__main__":
    main()
