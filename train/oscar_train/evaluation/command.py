"""The command `oscar-evaluate`: what a checkpoint has learned, as a table and JSON."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from oscar_common import __version__
from oscar_common.cli import PATH, Command, examples, run
from oscar_common.errors import UsageError
from oscar_common.files import check_output_file
from oscar_common.progress import say_next
from oscar_common.settings import DEVICES, OBJECTIVES, PRECISIONS
from oscar_train.arguments import FEW_SHAPES, SHUFFLES, check_model
from oscar_train.checkpoints.run_settings import own_shards

HELP = """Ask a model about images that it was not trained on.

FOLDER is a run of oscar-train (its newest whole checkpoint counts), a checkpoint, an export, or the folder of an Oscar.
Masked tokens (words, tags and answers), the contrastive head (each class) and retrieval (texts find images and images
texts, by the head's "matched") are measured. A model of oscar-finetune is asked what its task asks. The numbers are a
function of the checkpoint and the shards alone, so those of two models compare; a --seed draws other questions.

Of shards that the model was trained on, only the images that --eval-fraction held out are asked about.
"""

MARK = b'{\n "model": '  # how the JSON of an evaluation begins

_examples = partial(examples, "oscar-evaluate")


@click.command(
    cls=Command,
    help=HELP,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog=_examples(
        "run",
        "run/checkpoint-000500 --shards flickr30k-shards --images 1000",
        "run --controls --json evaluation.json",
    ),
)
@click.argument("path", metavar="FOLDER", type=PATH)
@click.option(
    "--shards",
    multiple=True,
    help="Folder of shards, or its URL. May be given again. [default: what the run's own evaluation is on]",
)
@click.option("--all", "everything", is_flag=True, help="All images of --shards, also those that were trained on.")
@click.option("--triples", type=click.IntRange(0), default=2000, show_default=True, help="Most triples; 0: all.")
@click.option("--images", type=click.IntRange(0), default=100, show_default=True, help="Most images for retrieval.")
@click.option(
    "--shuffle",
    multiple=True,
    type=click.Choice(SHUFFLES),
    help="Measure again with this of another image: what rests on it must fall. May be given again.",
)
@click.option("--controls", is_flag=True, help="All of --shuffle, side by side.")
@click.option("--annotations", multiple=True, help="VQA's annotations (.json), for a model fine-tuned for it.")
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write the numbers to a file, too.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --json even if this command did not write it.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="What is replaced. [default: as it was trained]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the questions.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Triples at once.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--cache", type=PATH, help="Folder for token ids and fetched shards. [default: ~/.cache/oscar-pretrain]")
@click.option("--skip-corrupt", is_flag=True, help="Go on without shards and images that are gone or damaged.")
@click.version_option(__version__)
def command(
    path: Path, shards: tuple[str, ...], shuffle: tuple[str, ...], controls: bool, overwrite: bool, **flags: Any
) -> None:
    """Check the arguments, and only then import torch."""
    if flags["json_file"] is not None:
        check_output_file(flags["json_file"], "--json", mark=MARK, overwrite=overwrite)

    check_model(path)
    places = shards or tuple(own_shards(path))
    from oscar_train.tasks.evaluate import evaluate_task, task_of

    if (task := task_of(path)) is not None:
        if shuffle or controls or flags["objective"]:
            pretraining_flags = "--shuffle, --controls, --objective"
            raise UsageError(f"{pretraining_flags}: FOLDER {path} is fine-tuned for {task}; leave them out")
        evaluate_task(path, task, places, flags.pop("annotations"), flags)
        return

    del flags["annotations"]
    from oscar_train.evaluation.evaluate import Asked, evaluate

    shuffles = SHUFFLES if controls else tuple(dict.fromkeys(shuffle))
    evaluate(Asked(path=path, shards=places, shuffles=shuffles, **flags))
    if shuffles:
        say_next("oscar-checkpoint", "export", path, "--format", "hf", "--out", f"{path.resolve().name}-hf")
    else:
        given = [word for place in shards for word in ("--shards", place)]
        say_next("oscar-evaluate", path, *given, *["--all"] * bool(flags["everything"]), "--controls")


def main() -> None:
    """Run the command."""
    run(command, environment=FEW_SHAPES)


if __name__ == "__main__":
    main()
