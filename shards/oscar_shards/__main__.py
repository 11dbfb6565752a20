"""The command `oscar-shards`: check, index, count, look at and convert shards. Nothing here loads torch."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from oscar_common import __version__
from oscar_common.cli import PATH, Group, examples, run
from oscar_common.progress import say_next
from oscar_common.settings import DTYPES

FORMATS = ("oscar", "lxmert", "bottom-up", "npz")
TRAIN = ("oscar-train", "--out", "run", "--eval-fraction", "0.1", "--shards")  # what comes next
HELP = """Check, index, count, look at and convert shards: the files between oscar-extract and oscar-train.

A shard is a plain webdataset tar with a Parquet index beside it. PATH is a folder of shards or a tar, of this project
or of any other writer with the same members: KEY.json, KEY.boxes.npy, KEY.features.npy.
"""


_examples = partial(examples, "oscar-shards")
paths = click.argument("paths", metavar="PATH...", type=PATH, nargs=-1, required=True)
one_path = click.argument("path", metavar="PATH", type=PATH)
overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace a file that this command did not write. Its own are always replaced."
)
workers = click.option("--workers", type=click.IntRange(1), help="Processes. [default: as many as cores]")


@click.group(
    cls=Group,
    help=HELP,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog=_examples(
        "verify shards",
        "index shards",
        "stats shards --html stats.html",
        "show shards --images photos --html sheet.html",
        "import oscar vinvl/coco_flickr30k_gqa.yaml --out shards",
        "export lxmert shards --out exported",
        "texts shards --captions more.tsv --out more.parquet",
        "tags shards --ground-truth instances.json --out truth.parquet",
    ),
)
@click.version_option(__version__)
def command() -> None:
    """Group the commands."""


@command.command(
    epilog=_examples("verify shards", "verify shards/shard-000003.tar", "verify --quick shards more-shards")
)
@paths
@click.option("--quick", is_flag=True, help="Check sizes and headers only; no array is read.")
@workers
def verify(paths: tuple[Path, ...], quick: bool, workers: int | None) -> int:
    """Read every byte of shards and name whatever is wrong, by shard and key; exit 1 if anything is.

    Checked are the tars' structure, checksums of all bytes, counts against index and manifest, boxes within their
    image, features that are numbers, tags of the detector's vocabulary, and keys that occur twice in a folder.
    """
    from oscar_shards.verify import verify as check

    faults = check(paths, quick, workers)
    if not faults:
        say_next("oscar-shards", "show", paths[0])
    return faults


@command.command(epilog=_examples("index shards", "index others/*.tar", "index others --classes names.txt"))
@paths
@click.option("--classes", type=PATH, help="Class names, one a line, for a manifest.json where there is none.")
@workers
def index(paths: tuple[Path, ...], classes: Path | None, workers: int | None) -> None:
    """Rebuild the Parquet index of each tar from the tar, which is the truth.

    For shards of this project the index comes out as it was written, to the bit. A folder of another writer gets a
    manifest.json, too, so that oscar-train reads it.
    """
    from oscar_shards.reindex import reindex

    reindex(paths, classes, workers)
    say_next("oscar-shards", "verify", *paths)


@command.command(epilog=_examples("stats shards", "stats shards --html stats.html"))
@paths
@click.option("--html", type=PATH, help="Write a page with plots.")
@overwrite
def stats(paths: tuple[Path, ...], html: Path | None, overwrite: bool) -> None:
    """Count images, triples by source and kind, regions, tags, tokens and bytes."""
    from oscar_shards.pages.report import write_report

    write_report(paths, html, overwrite)
    say_next("oscar-shards", "show", paths[0])


@command.command(
    epilog=_examples(
        "show shards --images photos",
        "show shards/shard-000000.tar --key 000000391895 --html one.html",
        "show shards --tag dog --limit 50",
    )
)
@one_path
@click.option("--key", "keys", multiple=True, help="Show this image. May be given again.")
@click.option("--tag", "tags", multiple=True, help="Show images that have this tag. May be given again.")
@click.option("--images", type=PATH, help="Folder of the photos; without it boxes are drawn on blank canvases.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Show at most so many images.")
@click.option("--html", type=PATH, default=Path("shards.html"), show_default=True, help="The page to write.")
@overwrite
def show(
    path: Path,
    keys: tuple[str, ...],
    tags: tuple[str, ...],
    images: Path | None,
    limit: int,
    html: Path,
    overwrite: bool,
) -> None:
    """Write one page with photos, their boxes, tags, scores and texts, to be filtered by tag in a browser."""
    from oscar_shards.pages.show import show as write_page

    write_page(path, keys, tags, images, limit, html, overwrite)
    say_next(*TRAIN, path if path.is_dir() else path.parent)


@command.command(
    "import",
    epilog=_examples(
        "import oscar vinvl/coco_flickr30k_gqa.yaml --out shards",
        "import oscar vinvl/coco/features.tsv --source coco --out shards",
        "import lxmert train2014_obj36.tsv --source coco --out shards",
        "import bottom-up trainval_36.tsv --source coco --out shards --dtype int8",
        "import npz features --source coco --out shards",
    ),
)
@click.argument("format", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("source_path", metavar="FROM", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the shards. The same command again continues.")
@click.option("--source", help="Name of the dataset in the samples. [default: what FROM says, else its name]")
@click.option(
    "--classes",
    type=PATH,
    help="Class names, one a line. [default, for numbers: those of an export's manifest.json, else Visual Genome's]",
)
@click.option("--attributes", type=PATH, help="Attribute names, one a line. [default: likewise]")
@click.option("--dtype", type=click.Choice(DTYPES), help="How features are stored. [default: float16]")
@click.option("--images-per-shard", type=click.IntRange(1), help="Images in a shard. [default: 1000]")
@workers
def import_(format: str, source_path: Path, **options: Any) -> None:
    """Make shards of region features in another FORMAT: oscar (VinVL's TSV), lxmert, bottom-up, npz (MILVLG's)."""
    from oscar_shards.formats.convert import import_shards

    import_shards(format, source_path, **options)
    say_next("oscar-shards", "verify", options["out"])


@command.command(
    epilog=_examples(
        "export oscar shards --out tsv", "export lxmert shards --out tsv", "export npz shards --out features"
    )
)
@click.argument("format", metavar="FORMAT", type=click.Choice(FORMATS))
@one_path
@click.option("--out", type=PATH, required=True, help="Folder for the files.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
def export(format: str, path: Path, out: Path, overwrite: bool) -> None:
    """Write shards in another FORMAT, for the code that reads that: oscar, lxmert, bottom-up, npz."""
    from oscar_shards.formats.export import export_shards

    export_shards(format, path, out, overwrite)


@command.command(
    epilog=_examples(
        "texts shards --captions more.tsv --out more.parquet",
        "texts shards --captions better.json --replace image --out better.parquet",
        "texts shards --captions qa.jsonl --source my-qa --out qa.parquet",
    )
)
@one_path
@click.option(
    "--captions", "files", type=PATH, multiple=True, required=True, help="A file of texts. May be given again."
)
@click.option("--source", help="Name of the texts' dataset. [default: the file's name]")
@click.option(
    "--replace",
    type=click.Choice(("none", "image", "all")),
    default="none",
    show_default=True,
    help="What the new texts stand instead of: nothing; the texts of the images that have new ones; all texts.",
)
@click.option("--out", type=PATH, required=True, help="The overlay to write, a .parquet file.")
@overwrite
def texts(path: Path, files: tuple[Path, ...], source: str | None, replace: str, out: Path, overwrite: bool) -> None:
    """Add or replace texts without touching the shards: write an overlay, for oscar-train --texts."""
    from oscar_shards.texts import write_overlay

    write_overlay(path, files, source, replace, out, overwrite)
    say_next(*TRAIN, path if path.is_dir() else path.parent, "--texts", out)


@command.command(epilog=_examples("tags shards --ground-truth instances_val2017.json --out truth.parquet"))
@one_path
@click.option(
    "--ground-truth",
    "files",
    type=PATH,
    multiple=True,
    required=True,
    help="A file in the format of COCO's instances_*.json. May be given again.",
)
@click.option("--out", type=PATH, required=True, help="The overlay to write, a .parquet file.")
@overwrite
def tags(path: Path, files: tuple[Path, ...], out: Path, overwrite: bool) -> None:
    """Add ground-truth tags without touching the shards: write an overlay, for oscar-train --texts.

    The tags of an image are the category names of its annotations, in the order of the file, repeated ones included.
    """
    from oscar_shards.ground_truth import write_overlay

    write_overlay(path, files, out, overwrite)
    folder = path if path.is_dir() else path.parent
    say_next(*TRAIN, folder, "--texts", out, "--tags", "ground-truth")


def main() -> None:
    """Run the command."""
    run(command, continues=sys.argv[1:2] == ["import"])


if __name__ == "__main__":
    main()
