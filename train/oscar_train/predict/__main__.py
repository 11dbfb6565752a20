"""oscar-predict: what a fine-tuned model says of one's own photos."""

import click

from oscar_common import __version__
from oscar_common.cli import Group, examples, run
from oscar_train.arguments import FEW_SHAPES
from oscar_train.predict.caption_command import caption

HELP = """Use a model on your own photos, in shards or in a folder.

Models are made by oscar-finetune, or are microsoft/Oscar's.
"""


@click.group(
    cls=Group,
    help=HELP,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog=examples("oscar-predict", "caption --model run --images photos --html captions.html"),
)
@click.version_option(__version__)
def command() -> None:
    """Group the commands."""


command.add_command(caption)


def main() -> None:
    """Run the command."""
    run(command, environment=FEW_SHAPES)


if __name__ == "__main__":
    main()
