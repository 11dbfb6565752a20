"""The command `oscar-submit`: both stages of a pipeline as batch jobs of a cluster."""

import json
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click

from oscar_common import __version__, cli
from oscar_common.config import load_catalog
from oscar_common.errors import OperationError
from oscar_common.files import check_output_file
from oscar_submit.request import STAGES, Request, make_request

HELP = """Submit a pipeline of pipelines.yaml to a cluster, look at it, cancel it.

Stage 1 becomes one job array of workers that share the shards of a folder, and a short job that checks them; stage 2
one job that starts torchrun on its nodes and goes on after each time limit. The same command again submits only what
is missing. `oscar-submit NAME` is short for `oscar-submit submit NAME`.
"""
SHORTHANDS = {
    "partition": "cluster.partition",
    "account": "cluster.account",
    "time": "cluster.time",
    "workers": "cluster.extract.workers",
    "nodes": "cluster.train.nodes",
}
_examples = partial(cli.examples, "oscar-submit")


class Group(cli.Group):
    """Commands, of which `submit` is meant where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments."""
        first_words = {*self.commands, "-h", "--help", "--version"}
        return super().parse_args(ctx, ["submit", *args] if args and args[0] not in first_words else args)


def of_a_pipeline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the argument and the options that say which pipeline is meant."""
    parameters = [
        click.argument("name", metavar="NAME"),
        click.option("--stage", type=click.Choice((*STAGES, "all")), default="all", help="[default: all]"),
        click.option("--cluster", metavar="NAME", help="Entry of `clusters:`. [default: the pipeline's]"),
        click.option(
            "--set",
            "changes",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change a key: extract.KEY, train.KEY, cluster.KEY, cluster.extract.KEY or cluster.train.KEY.",
        ),
        click.option("--partition", metavar="NAME", help="Short for --set cluster.partition=NAME."),
        click.option("--account", metavar="NAME", help="Short for --set cluster.account=NAME."),
        click.option("--time", "time", metavar="TIME", help="Short for --set cluster.time=TIME."),
        click.option("--workers", type=int, help="Short for --set cluster.extract.workers=N."),
        click.option("--nodes", type=int, help="Short for --set cluster.train.nodes=N."),
        click.option(
            "--pipelines", type=cli.PATH, metavar="FILE", help="[default: ./pipelines.yaml, else the one installed]"
        ),
    ]
    return reduce(lambda inner, parameter: parameter(inner), reversed(parameters), function)


def _request(
    name: str, stage: str, cluster: str | None, changes: tuple[str, ...], pipelines: Path | None, **flags: Any
) -> Request:
    short = [f"{SHORTHANDS[flag]}={text}" for flag, text in flags.items() if text is not None]
    return make_request(load_catalog(pipelines), name, stage, cluster, [*changes, *short])


@click.group(
    cls=Group,
    help=HELP,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog=_examples(
        "demo --dry-run",
        "demo --cluster slurm",
        "oscar-corpus --partition a100 --account vision --workers 64",
        "coco --stage train --set train.batch_size=1024 --nodes 2",
        "status coco --watch",
        "status coco --html status.html",
        "cancel coco",
    ),
)
@click.version_option(__version__)
def command() -> None:
    """Group the commands."""


@command.command("submit", epilog=_examples("demo --dry-run", "demo", "oscar-corpus --dry-run --rate 40"))
@of_a_pipeline
@click.option("--dry-run", is_flag=True, help="Print what it will take and the exact scripts; write nothing.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Images/s of a worker. [default: as measured]")
def submit_command(dry_run: bool, rate: float | None, **keywords: Any) -> None:
    """Submit what is missing of a pipeline and neither waits nor runs."""
    request = _request(**keywords)
    from oscar_submit import submit

    if dry_run:
        submit.dry_run(request, rate)
    else:
        submit.submit(request, rate)


@command.command("status", epilog=_examples("status demo", "status demo --watch", "status demo --json"))
@of_a_pipeline
@click.option("--watch", is_flag=True, help="Look again and again until no job waits or runs.")
@click.option("--every", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Seconds between looks.")
@click.option("--json", "as_json", is_flag=True, help="Print one object of JSON.")
@click.option("--html", type=cli.PATH, help="Write a page with the curve of shards over time.")
def status_command(watch: bool, every: float, as_json: bool, html: Path | None, **keywords: Any) -> None:
    """Say how far a pipeline is; exit 1 if it is not complete and no job waits or runs."""
    request = _request(**keywords)
    from oscar_submit import show, status

    if html is not None:
        check_output_file(html, "--html", mark=show.MARK)

    while True:
        now = status.look(request)
        if html is not None:
            show.write_page(now, html)

        print(json.dumps(status.as_json(now)) if as_json else "\n".join(show.lines_of(now)), flush=True)
        if not watch or not now.is_at_work:
            break

        time.sleep(every)

    if not now.is_complete and not now.is_at_work and not now.queue:
        raise OperationError(
            f"{request.name}: not complete, and no job of it waits or runs; oscar-submit {request.name}"
        )


@command.command("cancel", epilog=_examples("cancel demo"))
@of_a_pipeline
def cancel_command(**keywords: Any) -> None:
    """End the jobs of a pipeline cleanly and say what stays."""
    request = _request(**keywords)
    from oscar_submit.cancel import cancel

    cancel(request)


def main() -> None:
    """Run the command line."""
    cli.run(command, continues=True)


if __name__ == "__main__":
    main()
