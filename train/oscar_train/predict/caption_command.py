"""`oscar-predict caption`: a caption for each photo."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oscar_common.cli import PATH, Command, examples
from oscar_common.errors import UsageError
from oscar_common.files import check_output_file, replacing
from oscar_common.progress import plural, say_next
from oscar_common.settings import DEVICES, PRECISIONS
from oscar_train.arguments import check_model
from oscar_train.captioning.constraints import check_words
from oscar_train.predict.captions import BUILTIN
from oscar_train.predict.captions import caption as write_captions

if TYPE_CHECKING:
    from oscar_train.captioning.writer import Captioned

MARK = b'{\n "captions": '  # how the JSON begins
HELP = """Write a caption for each photo, one line a photo.

--model is a run of oscar-finetune caption, one of its checkpoints, or the folder of microsoft/Oscar's. The photos are
those of --shards, or of a folder of --images, which oscar-extract reads first.

--mention asks for captions that mention a word, like "dog|dogs" with its forms; give it up to three times.
"""

_examples = partial(examples, "oscar-predict caption")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command was given; its options' help says what each is."""

    model: Path
    shards: Path | None
    images: Path | None
    mention: tuple[str, ...]
    beams: int
    score: bool
    json_file: Path | None
    html_file: Path | None
    overwrite: bool
    batch_size: int
    detector: str
    device: str
    precision: str
    cache: Path | None


@click.command(
    "caption",
    cls=Command,
    help=HELP,
    epilog=_examples(
        "--model run --images photos",
        "--model run --shards shards --html captions.html --images photos",
        "--model run --images photos --mention 'dog|dogs' --mention beach",
        "--model run --shards test-shards --score --json captions.json",
    ),
)
@click.option("--model", type=PATH, metavar="FOLDER", required=True, help="The model.")
@click.option("--shards", type=PATH, metavar="FOLDER", help="The photos, as oscar-extract wrote them.")
@click.option("--images", type=PATH, metavar="FOLDER", help="The photos themselves; with --shards, for --html only.")
@click.option("--mention", metavar="WORD", multiple=True, help="What each caption should mention. May be given again.")
@click.option("--beams", type=click.IntRange(1, 64), default=5, show_default=True, help="Of the search; 1: none.")
@click.option("--score", is_flag=True, help="Compare with the captions in --shards: BLEU-4, CIDEr-D, ROUGE-L, ...")
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write the captions to a file, too.")
@click.option("--html", "html_file", type=PATH, metavar="FILE", help="Write a page with the photos, too.")
@click.option("--overwrite", is_flag=True, help="Replace files of --json and --html that this command did not write.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Photos at once.")
@click.option("--detector", default=BUILTIN, show_default=True, help="For --images: as of oscar-extract.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--cache", type=PATH, help="Folder for shards of --images. [default: ~/.cache/oscar-pretrain]")
def caption(**flags: Any) -> None:
    """Check the arguments, and only then import torch."""
    request = Asked(**flags)
    _check(request)
    captions = _written(request)
    scores = _scores(captions) if request.score else {}
    if request.json_file is not None:
        _write_json(request.json_file, captions, scores)

    if request.html_file is not None:
        from oscar_train.predict.caption_page import write_page

        write_page(request.html_file, captions, request.images, f"Captions by {request.model.name}")
        click.echo(f"{request.html_file}: {plural(len(captions), 'photo')}", err=True)
    else:
        shards = ["--shards", request.shards] if request.shards else []
        images = ["--images", request.images or "PHOTOS"]
        say_next("oscar-predict", "caption", "--model", request.model, *shards, *images, "--html", "captions.html")


def _check(asked: Asked) -> None:
    """Refuse what cannot be, before anything is loaded."""
    if asked.shards is None and asked.images is None:
        raise UsageError("no photos: give a folder of them, --images DIR, or what oscar-extract wrote, --shards DIR")

    check_words(asked.mention)
    if asked.score and asked.shards is None:
        raise UsageError("--score: compares with the captions in --shards; give these")

    check_model(asked.model, "--model")
    if asked.json_file is not None:
        check_output_file(asked.json_file, "--json", mark=MARK, overwrite=asked.overwrite)

    if asked.html_file is not None:
        from oscar_shards.pages.page import MARK as PAGE

        check_output_file(asked.html_file, "--html", mark=PAGE, overwrite=asked.overwrite)


def _written(asked: Asked) -> "list[Captioned]":
    """Write the captions, and print them as they come."""
    captions = []
    for captioned in write_captions(
        asked.model,
        shards=asked.shards,
        images=asked.images,
        mention=asked.mention,
        beams=asked.beams,
        batch_size=asked.batch_size,
        detector=asked.detector,
        device=asked.device,
        precision=asked.precision,
        cache=asked.cache,
    ):
        click.echo(f"{captioned.name}: {captioned.caption}{_lack(captioned.satisfied, asked.mention)}")
        captions.append(captioned)

    return captions


def _lack(satisfied: int, words: Sequence[str]) -> str:
    lacking = len(words) - satisfied
    return f"  (without {lacking} of the {len(words)} words)" if lacking else ""


def _scores(captions: "Sequence[Captioned]") -> dict[str, float]:
    """Print and return how close captions are to those of their shards."""
    from oscar_train.captioning.coco import java_scores
    from oscar_train.captioning.metrics import caption_scores

    pairs = [(captioned.caption, captioned.references) for captioned in captions if captioned.references]
    if not pairs:
        raise UsageError("--score: no image of --shards has a caption; extract with --captions")

    texts, references = zip(*pairs, strict=True)
    scores = caption_scores(texts, references)
    java, absent = java_scores(texts, references)
    scores |= java
    click.echo(f"{plural(len(pairs), 'photo')}: {', '.join(_named(scores))}")

    for line in absent:
        click.echo(line, err=True)

    return scores


def _named(scores: dict[str, float]) -> Iterator[str]:
    for name, value in scores.items():
        yield f"{name} {100 * value:.1f}"


def _write_json(path: Path, captions: "Sequence[Captioned]", scores: dict[str, float]) -> None:
    rows = [
        {
            "key": captioned.row["key"],
            "path": captioned.row.get("path"),
            "caption": captioned.caption,
            "score": captioned.score,
        }
        for captioned in captions
    ]
    content = {"captions": rows} | ({"scores": scores} if scores else {})
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
