"""What a run folder holds beside checkpoints and logs: run.yaml, the settings, so that it needs nothing else to go on.

The file is a recipe, too: `oscar-train --recipe RUN/run.yaml` begins another run with the same settings.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

import yaml

from oscar_common.config import parse, read_yaml
from oscar_common.errors import UsageError
from oscar_common.files import no_folder, replacing
from oscar_common.settings import Finetune, Train, paths
from oscar_train.arguments import RUN_FILE, checkpoints

FILE, VOCABULARY = RUN_FILE, "tag_vocabulary.txt"
S = TypeVar("S", bound=Train)


def write_settings(out: Path, settings: Train) -> None:
    """Write the settings of a run; paths of files that are there become absolute. A vocabulary is copied, too."""
    values = dataclasses.asdict(settings)
    if settings.tag_vocabulary is not None:
        content = Path(settings.tag_vocabulary).read_bytes()
        with replacing(out / VOCABULARY) as file:
            file.write(content)
        values["tag_vocabulary"] = str(out / VOCABULARY)

    values |= {name: _each(values[name], lambda path: str(path.resolve())) for name in paths(type(settings))}
    values |= {"recipe": None, "overwrite": False}  # what a recipe said is among the values
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    with replacing(out / FILE) as file:
        command = f"oscar-finetune {settings.task}" if isinstance(settings, Finetune) else "oscar-train"
        file.write(f"# Settings of this run: {command} --resume {out}\n{text}".encode())


def resumed(folder: Path, schema: type[S] = Train) -> S:  # type: ignore[assignment]  # S is Train then
    """Return the settings of a run folder, which may have been moved.

    What they name and is no longer there is looked for where it was as seen from the run folder: a folder moved
    together with its shards finds them.

    Raises:
        UsageError: it is no run folder.
    """
    path = folder / FILE
    if not path.is_file():
        reason = f"no {FILE} there; give a folder that oscar-train wrote" if folder.is_dir() else no_folder(folder)
        raise UsageError(f"--resume {folder}: {reason}")

    content = read_yaml(path, "--resume")
    if isinstance(content, dict) and not content.get("shards"):
        raise UsageError(
            f"--resume {folder}: {path} is {'cut' if content else 'empty'}: it names no shards; give the command that "
            "began the run instead, which writes it again"
        )

    settings = parse(schema, content, str(path))
    before = settings.out or str(folder)

    def moved(path: Path) -> str:
        new_path = folder / os.path.relpath(path, before) if path.is_absolute() else path
        return str(new_path.resolve() if not path.exists() and new_path.exists() else path)

    values = {name: _each(getattr(settings, name), moved, missing=True) for name in paths(schema)}
    if checkpoints(folder):
        values["init"] = settings.init  # is not needed any more, and its name is that of the run

    if values["cache"] and not Path(values["cache"]).exists():
        values["cache"] = None  # it was another machine's

    return dataclasses.replace(settings, **{**values, "out": str(folder), "overwrite": False})


def schema_of(folder: Path) -> type[Train]:
    """Return the schema of a run folder's settings: those of a fine-tuning name its task."""
    content = read_yaml(folder / FILE, "--resume")
    return Finetune if isinstance(content, dict) and "task" in content else Train


def own_shards(path: Path) -> list[str]:
    """Return the shards that a run evaluates itself on.

    Raises:
        UsageError: it does not, or this is no run.
    """
    for folder in (path, path.resolve().parent):
        if (folder / FILE).is_file():
            settings: Train = resumed(folder, schema_of(folder))
            if settings.eval_shards or settings.eval_fraction:
                return settings.eval_shards or settings.shards

            flags = " ".join(f"--shards {place}" for place in settings.shards)
            raise UsageError(
                f"--shards is missing: {path} held nothing out of its training; give --shards with other images, or "
                f"{flags} --all to ask about those that it was trained on, or train with --eval-fraction 0.1"
            )

    raise UsageError(f"--shards is missing: {path} is not in a run's folder; give the shards to evaluate on")


def _each(value: Any, change: Any, missing: bool = False) -> Any:
    """Change a path, or each of several; what is none (a URL, a hub name) stays, and what is not there unless asked."""
    if isinstance(value, list):
        return [_each(item, change, missing) for item in value]
    if value is None or "://" in value or not (missing or Path(value).exists()):
        return value
    return change(Path(value))
