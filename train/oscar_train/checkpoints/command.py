"""The command `oscar-checkpoint`: look at checkpoints, and write them for others."""

from functools import partial
from pathlib import Path

import click

from oscar_common import __version__
from oscar_common.cli import PATH, Group, examples, run
from oscar_common.files import check_writable
from oscar_common.progress import say_next
from oscar_train.arguments import check_model

HELP = """Look at checkpoints, and write them for others.

FOLDER is a checkpoint of oscar-train, a run (its newest whole checkpoint counts), an export, or a folder of an Oscar,
VinVL or BERT model.
"""


_examples = partial(examples, "oscar-checkpoint")
folder = click.argument("path", metavar="FOLDER", type=PATH)


@click.group(
    cls=Group,
    help=HELP,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog=_examples(
        "show run",
        "export run --format oscar --out exported",
        "export exported --format hf --out back",
    ),
)
@click.version_option(__version__)
def command() -> None:
    """Group the commands."""


@command.command(epilog=_examples("show run", "show run/checkpoint-000200", "show vinvl/checkpoint-2000000"))
@folder
def show(path: Path) -> None:
    """Say what a model is: step, sizes, features, classes, whether it is whole, and what it lacks or has too much.

    A checkpoint's files are compared with their sizes and hashes; exit 1 if one differs.
    """
    check_model(path)
    from oscar_train.checkpoints.export import describe, find

    print("\n".join(describe(find(path))))
    say_next("oscar-checkpoint", "export", path, "--format", "hf", "--out", f"{path.resolve().name}-hf")


@command.command(
    epilog=_examples(
        "export run --format oscar --out exported",
        "export run/checkpoint-000200 --format hf --out hf --overwrite",
        "export vinvl/checkpoint-2000000 --format hf --out vinvl-hf",
    )
)
@folder
@click.option(
    "--format",
    type=click.Choice(("oscar", "hf")),
    required=True,
    help="oscar: pytorch_model.bin, config.json and vocab.txt, for microsoft/Oscar's fine-tuning. hf: the files that "
    "Hugging Face has; transformers opens the text side.",
)
@click.option("--out", type=PATH, required=True, help="Folder for the files.")
@click.option("--overwrite", is_flag=True, help="Replace an export in --out.")
def export(path: Path, format: str, out: Path, overwrite: bool) -> None:
    """Write a model in another form; its weights stay the same to the bit, and --init takes either form."""
    check_writable(out, f"--out {out}", "--out")
    check_model(path)
    from oscar_train.checkpoints.export import export as write
    from oscar_train.checkpoints.tensor_names import modules

    model = write(path, format, out, overwrite)
    print(f"{out}: {model.parameters:,} parameters of {model.folder}")

    for what, names in (("not in it, as the source has none", model.lost), ("left out", model.extra)):
        if names:
            print(f"{what}: {', '.join(modules(names))}")

    say_next("oscar-checkpoint", "show", out)


def main() -> None:
    """Run the command."""
    run(command)


if __name__ == "__main__":
    main()
