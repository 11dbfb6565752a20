"""The commands' frame: flags made from a settings dataclass, one line for every error, and the exit code."""

import dataclasses
import errno
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from oscar_common import __version__
from oscar_common.config import check_range, load_catalog
from oscar_common.errors import UsageError, nearest
from oscar_common.settings import Catalog

S = TypeVar("S")


def settings_command(
    stage: str, schema: type[S], help: str, examples: str
) -> Callable[[Callable[[S, Catalog], None]], click.Command]:
    """Make a click command of `function(settings, catalog)` whose flags are the fields of `schema`.

    A value is, in this order: the flag, the key under `pipelines.NAME.<stage>` (with `--pipeline NAME`), the default.
    """

    def decorate(function: Callable[[S, Catalog], None]) -> click.Command:
        def callback(pipeline: str | None, pipelines: str | None, **flags: Any) -> None:
            catalog = load_catalog(Path(pipelines) if pipelines else None)
            function(_resolve(schema, stage, catalog, pipeline, flags), catalog)

        command = click.Command(
            name=f"oscar-{stage}",
            callback=callback,
            params=[*_PIPELINE_OPTIONS, *_options(schema)],
            help=help,
            epilog="\b\nExamples:\n" + examples,
            context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
        )
        return click.version_option(__version__)(command)

    return decorate


def run(command: click.Command, arguments: list[str] | None = None) -> NoReturn:
    """Run a command: exit 0, or one line on stderr and exit 2 (bad input), 1 (trouble) or 130 (Ctrl-C)."""
    # How long torch's threads spin before they sleep, read when torch is imported. By default they spin so long that
    # two jobs on two cores run at a tenth of their speed; this costs a twentieth of it when nothing else runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        sys.exit(command.main(arguments, standalone_mode=False) or 0)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command again continues", 130)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space or give another --out; the same command again continues" if full else ""
        _fail(f"{error.filename or 'output'}: {error.strerror or error}{hint}", 1)


def _fail(message: str, code: int) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


_PIPELINE_OPTIONS = [
    click.Option(["--pipeline"], metavar="NAME", help="Take settings from `pipelines:` in pipelines.yaml; flags win."),
    click.Option(["--pipelines"], metavar="FILE", help="[default: ./pipelines.yaml, else the one that is installed]"),
]


def _options(schema: type[Any]) -> list[click.Option]:
    hints = typing.get_type_hints(schema)
    return [_option(f, hints[f.name]) for f in dataclasses.fields(schema)]


def _option(field: "dataclasses.Field[Any]", hint: Any) -> click.Option:
    """Make a click option that says its default but is None unless given, so that a pipeline can fill it."""
    if typing.get_origin(hint) is types.UnionType:
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
    several = typing.get_origin(hint) is list
    choices = field.metadata["choices"]
    default = f" [default: {field.default}]" if field.default not in (None, False, dataclasses.MISSING) else ""
    return click.Option(
        [f"--{field.name.replace('_', '-')}", field.name],
        type=click.Choice(choices) if choices else typing.get_args(hint)[0] if several else hint,
        is_flag=hint is bool,
        multiple=several,
        default=None,
        help=field.metadata["help"] + default,
    )


def _resolve(schema: type[S], stage: str, catalog: Catalog, pipeline: str | None, flags: dict[str, Any]) -> S:
    base = schema()
    if pipeline is not None:
        if pipeline not in catalog.pipelines:
            raise UsageError(f"--pipeline: no pipeline {pipeline!r}{nearest(pipeline, catalog.pipelines)}")
        base = getattr(catalog.pipelines[pipeline], stage)
    given = {
        name: list(flag) if isinstance(flag, tuple) else flag for name, flag in flags.items() if flag not in (None, ())
    }
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.name in given:
            check_range(given[field.name], f"--{field.name.replace('_', '-')}", field)
    return dataclasses.replace(base, **given)  # type: ignore[type-var]
