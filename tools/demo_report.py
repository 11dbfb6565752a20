"""The demo's last step: one self-contained page of photos with regions, shard statistics and loss curves."""

import csv
import html
import io
from pathlib import Path

import click
import matplotlib as mpl
from matplotlib.figure import Figure

from oscar_common.files import replacing
from oscar_shards.read import ShardFolder, open_folder
from oscar_shards.stats import count
from oscar_shards.view import CSS, figures

MIN_SCORE = 0.3  # regions drawn; shards hold more (at least --min-boxes an image)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write FOLDER/report.html from FOLDER/images, FOLDER/shards and FOLDER/train."""
    shards = open_folder(folder / "shards")
    sheet = "\n".join(figures(shards, folder / "images", limit=100, min_score=MIN_SCORE))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Oscar demo</title><style>{CSS}</style>
<h1>From photos to a pre-trained Oscar</h1>
<h2>Photos, regions and tags</h2>
<p>Drawn are regions with a score of at least {MIN_SCORE}; the texts are below each photo.</p>
<div class="sheet">{sheet}</div>
<h2>Shards</h2>{statistics(shards)}
<h2>Pre-training</h2>{curves(folder / "train" / "metrics.csv")}</html>
"""
    with replacing(folder / "report.html") as file:
        file.write(page.encode())
    print(f"report: {folder / 'report.html'}")


def statistics(shards: ShardFolder) -> str:
    """Return the shards' statistics as an HTML table."""
    stats, detector = count(shards.tars), shards.manifest.detector
    rows = {
        "detector": f"{detector.name}, preset {detector.preset}, {detector.feature_dim} features a region",
        "images": f"{stats.images:,} in {stats.shards} shards, {stats.bytes / 1e6:.1f} MB",
        "triples (image, text)": ", ".join(f"{n:,} ({kind})" for kind, n in stats.triples.most_common()),
        "regions": f"{stats.regions:,}; {stats.regions_min} to {stats.regions_max} an image",
        "most frequent tags": ", ".join(f"{tag} {n}" for tag, n in stats.tags.most_common(15)),
        "refused images": ", ".join(f"{reason} {n}" for reason, n in stats.rejects.most_common()) or "none",
    }
    return "<table>" + "".join(f"<tr><th>{k}<td>{html.escape(v)}" for k, v in rows.items()) + "</table>"


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
