"""The command `oscar-predict`: fine-tuned models at work on people's own photos."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from oscar_common import __version__
from oscar_common.cli import PATH, Group, examples, run
from oscar_common.errors import UsageError
from oscar_common.files import check_output_file
from oscar_common.progress import say_next
from oscar_common.settings import DEVICES, PRECISIONS
from oscar_train.arguments import FEW_SHAPES
from oscar_train.predict.caption_command import caption

HELP = """Use a model that oscar-finetune made, on photos of your own."""
SEARCH = """Find the photos that fit a text, or with --image the texts that fit a photo.

All photos are first compared with the text by their tags and words; then the model looks at the best --candidates of
them, and says how many it did not look at. --exhaustive lets it look at all.
"""

ANSWER = """Answer a question about each photo: one line a photo."""
MARK = b'{\n "model": '  # how the JSON of this command begins


@click.group(cls=Group, name="oscar-predict", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Use a model."""


command.add_command(caption)


@command.command(
    help=SEARCH,
    context_settings={"max_content_width": 110},
    epilog=examples(
        "oscar-predict",
        'search --model search-run --shards shards "a dog on a beach"',
        'search --model search-run --images ~/photos --html found.html "two people at a table"',
        "search --model search-run --shards shards --image dog.jpg",
    ),
)
@click.argument("text", required=False)
@click.option("--model", "path", type=PATH, required=True, help="A run of oscar-finetune retrieval, or a checkpoint.")
@click.option("--shards", multiple=True, type=PATH, help="Folder of shards with the photos. May be given again.")
@click.option("--images", type=PATH, help="Folder of photos, whose regions are extracted first (once).")
@click.option("--image", type=PATH, help="A photo, for which the best of the shards' texts are found.")
@click.option(
    "--detector", default="builtin", show_default=True, help="For --images and a new --image; see oscar-extract."
)
@click.option("--limit", type=click.IntRange(1), default=12, show_default=True, help="Results, at most.")
@click.option(
    "--candidates", type=click.IntRange(1), default=200, show_default=True, help="How many the model looks at, at most."
)
@click.option("--exhaustive", is_flag=True, help="Let the model look at all.")
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write the results to a file, too.")
@click.option("--html", type=PATH, metavar="FILE", help="Write a page of the photos with what carried the match.")
@click.option("--photos", type=PATH, help="Folder of the photos, for --html. [default: the one that was extracted]")
@click.option("--overwrite", is_flag=True, help="Replace files of --json and --html that this command did not write.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--cache", type=PATH, help="Folder for what is extracted. [default: ~/.cache/oscar-pretrain]")
def search(text: str | None, path: Path, **flags: Any) -> None:
    """Check the arguments, and only then import torch."""
    if (text is None) == (flags["image"] is None):
        raise UsageError("TEXT: give a text to search for, or --image with a photo, one of the two")

    _check_photos(flags)
    if flags["json_file"] is not None:
        check_output_file(flags["json_file"], "--json", mark=MARK, overwrite=flags["overwrite"])

    if flags["html"] is not None:
        from oscar_shards.pages.page import MARK as PAGE

        check_output_file(flags["html"], "--html", mark=PAGE, overwrite=flags["overwrite"])

    _search(text, path, **flags)


@command.command(
    help=ANSWER,
    context_settings={"max_content_width": 110},
    epilog=examples("oscar-predict", 'answer --model vqa-run --images ~/photos "what colour is the cup?"'),
)
@click.argument("question")
@click.option("--model", "path", type=PATH, required=True, help="A run of oscar-finetune vqa or gqa, or a checkpoint.")
@click.option("--shards", multiple=True, type=PATH, help="Folder of shards with the photos. May be given again.")
@click.option("--images", type=PATH, help="Folder of photos, whose regions are extracted first (once).")
@click.option("--detector", default="builtin", show_default=True, help="For what is extracted; see oscar-extract.")
@click.option("--limit", type=click.IntRange(1), help="Photos, at most, the first. [default: all]")
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write the answers to a file, too.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --json even if this command did not write it.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--cache", type=PATH, help="Folder for what is extracted. [default: ~/.cache/oscar-pretrain]")
def answer(question: str, path: Path, **flags: Any) -> None:
    """Check the arguments, and only then import torch."""
    _check_photos(flags)
    if flags["json_file"] is not None:
        check_output_file(flags["json_file"], "--json", mark=MARK, overwrite=flags["overwrite"])

    from oscar_train.predict.answer import answers
    from oscar_train.predict.model import open_model
    from oscar_train.predict.photos import open_photos

    model = open_model(path, ("vqa", "gqa"), flags["device"], flags["precision"])
    photos = open_photos(_places(flags), model)
    result = answers(model, photos, question, flags["limit"])

    for prediction in result:
        print(f"{prediction.path}: {prediction.answer} ({prediction.probability:.1%})")

    if flags["json_file"] is not None:
        _write(flags["json_file"], {"model": str(model.folder), "query": question, "answers": list(map(vars, result))})


def _check_photos(flags: dict[str, Any]) -> None:
    if bool(flags["shards"]) == bool(flags["images"]):
        raise UsageError("--shards is missing: give the folder of shards with the photos, or --images with the photos")


def _places(flags: dict[str, Any]) -> list[Path]:
    """Return the folders of shards, extracted now if photos were given."""
    from oscar_train.predict.photos import extract

    if flags["images"] is None:
        return list(flags["shards"])
    return [extract(flags["images"], flags["cache"], flags["detector"])]


def _search(text: str | None, path: Path, **flags: Any) -> None:
    from oscar_train.predict.model import open_model
    from oscar_train.predict.page import write_page
    from oscar_train.predict.photos import extract, open_photos
    from oscar_train.predict.search import search as find
    from oscar_train.predict.search import search_texts

    model = open_model(path, "retrieval", flags["device"], flags["precision"])
    photos = open_photos(_places(flags), model)
    candidates = None if flags["exhaustive"] else flags["candidates"]
    searched = photos
    if text is not None:
        result = find(model, photos, text, limit=flags["limit"], candidates=candidates)
    else:
        number = photos.find_file(flags["image"])
        if number is None:
            shards = extract(flags["image"], flags["cache"], flags["detector"], "--image")
            searched, number = open_photos(shards, model), 0
        texts = [entry["text"] for entries in photos.table["texts"].to_pylist() for entry in entries if entry["text"]]
        result = search_texts(model, searched, number, texts, limit=flags["limit"], candidates=candidates)

    title = text or str(flags["image"])
    Console(soft_wrap=True).print(_table(result, by_text=text is not None))
    if result.scored < result.total:
        what = "photos" if text is not None else "texts"
        print(
            f"the model looked at {result.scored:,} of {result.total:,} {what}, those whose words are nearest; "
            "--exhaustive looks at all"
        )

    if flags["json_file"] is not None:
        content = {"model": str(model.folder), "query": title, "scored": result.scored, "total": result.total}
        _write(flags["json_file"], {**content, "matches": list(map(vars, result.matches))})

    if flags["html"] is not None:
        write_page(flags["html"], model, searched, result, title, flags["photos"] or flags["images"])
        print(f"{flags['html']}: {len(result.matches)} results, with what carried them")
    else:
        flags_again = [word for place in flags["shards"] for word in ("--shards", place)]
        flags_again += ["--images", flags["images"]] if flags["images"] else []
        say_next("oscar-predict", "search", "--model", path, *flags_again, "--html", "found.html", title)


def _table(result: Any, by_text: bool) -> Table:
    """Return the results for people."""
    shown = Table()
    shown.add_column("", justify="right")
    shown.add_column("photo" if by_text else "text", overflow="fold")
    shown.add_column("match", justify="right")

    for rank, match in enumerate(result.matches, 1):
        shown.add_row(str(rank), match.path if by_text else match.text, f"{match.probability:.1%}")

    return shown


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write the results as JSON."""
    from oscar_common.files import replacing

    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def main() -> None:
    """Run the command."""
    run(command, environment=FEW_SHAPES)


if __name__ == "__main__":
    main()
