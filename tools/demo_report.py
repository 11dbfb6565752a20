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
from oscar_shards.pages.photos import find_photos
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
    rows = choose(shards, limit=LIMIT)
    yield from sheet(rows, find_photos(folder / "images", [row for _, row in rows]), MIN_SCORE)
    yield f"<h2>Shards</h2>{fact_table(measure([shards]))}\n"
    yield f'<h2>Pre-training</h2><div class="paper">{curves(folder / "train")}</div>\n'


def curves(run: Path) -> str:
    """Return losses and accuracies over the steps as inline SVG; dots are those of images held out of training."""
    trained, asked = read(run / "metrics.csv"), read(run / "evaluation.csv")
    mpl.rcParams.update({"svg.hashsalt": "oscar", "svg.fonttype": "none"})  # the same page for the same numbers
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, names, held_out, label in zip(
        figure.subplots(1, 3),
        (["mlm_loss"], ["match_loss"], ["mlm_accuracy", "match_accuracy"]),
        (["words_loss", "tags_loss"], ["match_loss"], ["words_accuracy", "tags_accuracy", "match_accuracy"]),
        ("masked token loss", "contrastive loss", "accuracy"),
        strict=True,
    ):
        for name in names:
            axes.plot(*points(trained, name), label=name, linewidth=0.8)
        for name in held_out:
            axes.plot(*points(asked, name), "o--", label=f"{name}, held out", markersize=4)
        axes.set(title=label, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing.getvalue()[drawing.getvalue().index("<svg") :]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def points(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a number is there, and the number."""
    there = [row for row in rows if row[name]]
    return [int(row["step"]) for row in there], [float(row[name]) for row in there]


if __name__ == "__main__":
    main()
