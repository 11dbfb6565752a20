"""The commands' frame: flags made from a settings dataclass, one line for every error, and the exit code."""

import dataclasses
import errno
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import click

from oscar_common import __version__
from oscar_common.config import load_catalog, meaning, parse, read_yaml
from oscar_common.errors import Stopped, UsageError, nearest, reason
from oscar_common.memory import lacks_memory
from oscar_common.settings import Catalog, Finetune

S = TypeVar("S")

# How long torch's threads spin before they sleep. By default they spin so long that two jobs on two cores run at a
# tenth of their speed; this costs a twentieth of it when nothing else runs.
SPIN = {"GOMP_SPINCOUNT": "10000"}


def check_local(text: str, flag: str) -> None:
    """Refuse a URL where only a path of this machine will do, which would otherwise be a folder named `s3:`.

    Raises:
        UsageError: it is a URL.
    """
    if "://" in text:
        raise UsageError(f"{flag} {text}: a URL; give a path on this machine (a mounted bucket will do)")


def flag_of(param: click.Parameter) -> str:
    """Return the name of an option or argument for messages."""
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.rstrip(".")


class _Path(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A path; whether it is there is for the command to say, with what to give instead."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, str) and param is not None:
            check_local(value, flag_of(param))
        return Path(value)


PATH = _Path()


class _NumberOr(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or one of some words."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self.name = "|".join(("integer", *self.words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in self.words:
            return str(value)
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is no whole number{''.join(f', or {word}' for word in self.words)}", param, ctx)


class Command(click.Command):
    """A command whose options are given once each, but for those that are lists: the last one never wins silently.

    groups: under which title the help lists an option, by its name; the others come first.
    """

    groups: Mapping[str, str] = MappingProxyType({})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options by group."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(self.groups.get(param.name or "", "Options"), []).append(record)

        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, once to see what is given more than once."""
        _, _, given = self.make_parser(ctx).parse_args(args=[*args])
        for param in given:
            single = isinstance(param, click.Option) and not param.multiple and not param.is_eager
            if single and given.count(param) > 1:
                raise UsageError(f"{flag_of(param)}: given {given.count(param)} times; give it once")
        return super().parse_args(ctx, args)


class Group(click.Group):
    """A group of commands, which prints its help if it is given nothing."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, or print the help where there are none."""
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


def examples(command: str, *lines: str) -> str:
    """Return the end of a command's help: what it may be called with."""
    return "\b\nExamples:\n" + "\n".join(f"  {command} {line}" for line in lines)


def settings_command(
    stage: str,
    schema: type[S],
    help: str,
    examples: str,
    resumed: Callable[[Path], S] | None = None,
    fixed: Mapping[str, Any] = MappingProxyType({}),
    without: Collection[str] = (),
    settled: Iterable[str] = ("recipe", "out", "overwrite"),
) -> Callable[[Callable[[S, Catalog], None]], click.Command]:
    """Make a click command of `function(settings, catalog)` whose flags are the fields of `schema`.

    A value is, in this order: the flag, the key under `pipelines.NAME.<stage>` (with `--pipeline NAME`), that of the
    recipe (where `schema` has such a field, and it is said), the default. With `resumed`, which returns the settings of
    a folder that an earlier command wrote, `--resume FOLDER` takes the pipeline's place.

    Args:
        stage: `train` for oscar-train.
        schema: the settings.
        help, examples: what `--help` says.
        resumed: reads the settings of a folder.
        fixed: values that the command itself stands for.
        without: settings that have no flag, as they mean nothing here.
        settled: settings that cannot be given with `--resume`.
    """

    def decorate(function: Callable[[S, Catalog], None]) -> click.Command:
        def callback(pipeline: str | None, pipelines: Path | None, resume: Path | None = None, **flags: Any) -> None:
            catalog = load_catalog(pipelines)
            given_flags = _said(schema, flags)
            if resume is not None and resumed is not None:
                _refuse_with_resume({"pipeline": pipeline, **given_flags}, settled)
                layer = vars(resumed(resume))
            else:
                layer = _pipeline(catalog, pipeline, stage) if pipeline is not None else {}

            settings = resolve(schema, catalog, layer, {**given_flags, **fixed})
            check_paths(settings)
            function(settings, catalog)

        command = Command(
            name=f"oscar-{stage}",
            callback=callback,
            params=[*_PIPELINE_OPTIONS, *([_RESUME_OPTION] if resumed else []), *_options(schema, {*fixed, *without})],
            help=help,
            epilog="\b\nExamples:\n" + examples,
            context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
        )
        command.groups = {field.name: field.metadata["group"] for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
        return click.version_option(__version__)(command)

    return decorate


def run(
    command: click.Command,
    arguments: list[str] | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    continues: bool = False,
) -> NoReturn:
    """Run a command: exit 0, or one line on stderr and exit 2 (bad input), 1 (trouble) or 128 + a signal's number.

    Of processes that torchrun started, one a machine speaks of bad input, and only the first of signals.

    Args:
        command: what to run.
        arguments: those of the command line, unless others are given.
        environment: what torch is to find there when it is imported, unless the user has set it.
        continues: whether the same command goes on where it was stopped.
    """
    again = f"the same command again {'continues' if continues else 'starts over'}"
    for name, value in {**SPIN, **environment}.items():
        os.environ.setdefault(name, value)

    try:
        with _last_words(f"stopped by SIGTERM; {again}"):
            sys.exit(command.main(arguments, standalone_mode=False) or 0)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except Stopped as error:
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail(f"interrupted; {again}", 130)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = f"; free some space or give another --out; {again}" if full else ""
        _fail(f"{error.filename or 'output'}: {error.strerror or error}{hint}", 1)
    except Exception as error:
        if not lacks_memory(error):
            raise
        smaller = any(option.name == "batch_size" for option in command.params)
        _fail(f"memory is lacking ({reason(error)}){'; give a smaller --batch-size' if smaller else ''}", 1)


@contextmanager
def _last_words(line: str) -> Iterator[None]:
    """Have SIGTERM end this process as it always does, but not without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    process = os.getpid()

    def end(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() == process:  # and not one that was forked
            os.write(2, f"error: {line}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    speaks = rank == "0" or code == 1 or (code == 2 and os.environ.get("LOCAL_RANK") == "0")
    if speaks:
        place = "" if rank == "0" else f"rank {rank}: "
        print(f"error: {place}{' '.join(message.split())}\n", end="", file=sys.stderr, flush=True)  # in one piece
    sys.exit(code)


_PIPELINE_OPTIONS = [
    click.Option(["--pipeline"], metavar="NAME", help="Take settings from `pipelines:` in pipelines.yaml; flags win."),
    click.Option(
        ["--pipelines"], type=PATH, metavar="FILE", help="[default: ./pipelines.yaml, else the one that is installed]"
    ),
]
_RESUME_OPTION = click.Option(
    ["--resume"],
    type=PATH,
    metavar="RUN",
    help="Go on with the run in this folder, wherever it was made, with its own settings.",
)


def _options(schema: type[Any], without: Collection[str] = ()) -> list[click.Option]:
    hints = typing.get_type_hints(schema)
    return [_option(f, hints[f.name]) for f in dataclasses.fields(schema) if f.name not in without]


def _option(field: "dataclasses.Field[Any]", hint: Any) -> click.Option:
    """Make a click option that says its default but is None unless given, so that a pipeline can fill it."""
    if typing.get_origin(hint) is types.UnionType:
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)

    flag = f"--{field.name.replace('_', '-')}"
    is_said = field.default is not None and field.default is not False and field.default is not dataclasses.MISSING
    default = f" [default: {field.default}]" if is_said else ""
    return click.Option(
        [f"{flag}/--no-{flag[2:]}" if hint is bool else flag, field.name],
        type=_type(field, hint),
        multiple=typing.get_origin(hint) is list,
        default=None,
        help=field.metadata["help"] + default,
    )


def _type(field: "dataclasses.Field[Any]", hint: Any) -> Any:
    if choices := field.metadata["choices"]:
        return hint if hint is int else click.Choice(choices)  # a number is checked with the others
    if words := field.metadata["words"]:
        return _NumberOr(words)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def _said(schema: type[Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were given, checked."""
    given_flags = {
        name: list(flag) if isinstance(flag, tuple) else flag for name, flag in flags.items() if flag not in (None, ())
    }
    for field in dataclasses.fields(schema):
        if field.name in given_flags:
            given_flags[field.name] = meaning(given_flags[field.name], f"--{field.name.replace('_', '-')}", field)

    return given_flags


def _pipeline(catalog: Catalog, name: str, stage: str) -> dict[str, Any]:
    if name not in catalog.pipelines:
        raise UsageError(f"--pipeline: no pipeline {name!r}{nearest(name, catalog.pipelines)}")
    values: dict[str, Any] = getattr(catalog.pipelines[name], stage)
    return values


def _refuse_with_resume(values: dict[str, Any], settled: Iterable[str]) -> None:
    for name in ("pipeline", *settled):
        value = values.get(name)
        if value is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"--resume: the run has its own settings and folder; it cannot be given with {flag}")


def resolve(schema: type[S], catalog: Catalog, layer: dict[str, Any], values: dict[str, Any]) -> S:
    """Return settings of which a recipe's values are the lowest layer, a pipeline's the next, and flags the highest."""
    recipe = values.get("recipe") or layer.get("recipe")
    lowest = {} if recipe is None else vars(_recipe(catalog, recipe, schema))
    _check_task(recipe, lowest, values)
    return schema(**{**lowest, **layer, **values})


def check_paths(settings: Any) -> None:
    """Refuse URLs in settings that are paths of this machine, wherever they were said."""
    for field in dataclasses.fields(settings):
        given = getattr(settings, field.name)
        if field.metadata["path"] and not field.metadata["url"] and given is not None:
            for path in given if isinstance(given, list) else [given]:
                check_local(path, f"--{field.name.replace('_', '-')}")


def _check_task(recipe: str | None, values: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuse the recipe of another task."""
    task = said.get("task")
    if task is not None and values.get("task", task) != task:
        raise UsageError(f"--recipe {recipe}: it is for task {values['task']}; give one for {task}")


def _recipe(catalog: Catalog, name: str, schema: type[Any]) -> Any:
    """Return the settings of a recipe: an entry of pipelines.yaml, or a file."""
    recipes: Mapping[str, Any] = catalog.finetune if schema is Finetune else catalog.recipes
    if name in recipes:
        recipe = recipes[name]
    elif Path(name).is_file():
        content = read_yaml(Path(name), "--recipe")
        if not content:
            raise UsageError(f"--recipe {name}: the file is empty; give a YAML file of settings")
        recipe = parse(schema, content, name)
    else:
        raise UsageError(f"--recipe {name}: no such file, and no recipe of this name{nearest(name, recipes)}")

    if recipe.recipe is not None:
        raise UsageError(f"--recipe {name}: it names another recipe, {recipe.recipe!r}; copy what it should have")

    return recipe
