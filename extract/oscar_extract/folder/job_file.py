"""_job.json: the settings of a folder's job, so that `oscar-extract --resume` needs nothing but the folder."""

import json
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from oscar_common.config import parse
from oscar_common.errors import UsageError
from oscar_common.files import no_folder
from oscar_common.settings import Detector, Extract
from oscar_shards.manifest import FILE as MANIFEST
from oscar_shards.manifest import JOB_FILE
from oscar_shards.seal import sealed_json

# What a command may say that joins a job: how it works, and nothing that a shard depends on.
OF_A_COMMAND = (
    *("workers", "scheduler", "device", "cache", "cache_size", "decode_threads", "image_timeout"),
    *("max_reject_fraction", "retry_rejects", "check", "json"),
)
# What the job's file does not hold: the next command says it, or does not.
NOT_KEPT = (
    *("out", "workers", "scheduler", "retry_rejects", "overwrite", "dry_run", "rate", "plan_only", "check", "json"),
)
DECISIVE = (  # what the bytes of shards depend on, apart from the plan and the detector's files
    *("name", "dtype", "min_boxes", "max_boxes", "score_threshold", "batch_size", "precision", "compile"),
)
FIXED = tuple(field.name for field in fields(Extract) if field.name not in OF_A_COMMAND)


def job_content(settings: Extract, entry: Detector) -> bytes:
    """Return what _job.json holds: settings and the detector's entry, with absolute paths of files that are there."""
    content = {name: value for name, value in asdict(settings).items() if name not in NOT_KEPT}
    named = [field.name for field in fields(Extract) if field.metadata["path"] and field.name in content]
    content |= {name: _absolute(content[name]) for name in named}
    files = {name: _absolute(value) for name, value in asdict(entry).items()}
    return sealed_json({"settings": content, "entry": files})


def resumed(folder: Path) -> Extract:
    """Return the settings of a folder's job, wherever the folder lies now.

    Raises:
        UsageError: it is no folder of a job.
    """
    settings, _ = read_job(folder)
    return settings


def read_job(folder: Path) -> tuple[Extract, Detector]:
    """Return the settings and the detector of a folder's job.

    Raises:
        UsageError: it is no folder of a job.
    """
    path = folder / JOB_FILE
    if not path.is_file():
        reason = _no_job(folder) if folder.is_dir() else no_folder(folder)
        raise UsageError(f"--resume {folder}: {reason}")

    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        content = json.loads(path.read_bytes())
        settings = parse(Extract, content["settings"], f"{path}: settings")
        entry = parse(Detector, content["entry"], f"{path}: entry")
        return replace(settings, out=str(folder)), entry

    raise UsageError(f"--resume {folder}: {path} is damaged; the command that began the job writes it again")


def check_same_job(out: Path, settings: Extract, entry: Detector) -> None:
    """Refuse a job that decides otherwise than the one whose plan lies in `out`; for before there is a manifest.

    Raises:
        UsageError: in one line, with both values.
    """
    if not (out / JOB_FILE).exists():
        return

    existing, existing_entry = read_job(out)

    def refuse(name: str, old: object, new: object) -> None:
        raise UsageError(
            f"--out {out}: holds the plan of a job with {name} {old}, this is {new}; give another --out, or --overwrite"
        )

    for name in DECISIVE:
        old, new = getattr(existing, name), getattr(settings, name)
        if old != new:
            refuse(name, old, new)

    for name, old in vars(existing_entry).items():
        new = _absolute(getattr(entry, name))
        if old != new:
            refuse(f"the detector's {name}", old, new)


def _no_job(folder: Path) -> str:
    if (folder / MANIFEST).exists():
        return f"no {JOB_FILE} there, as an older version made it; give the command that began the job, once"
    return f"no {JOB_FILE} there; give a folder that oscar-extract wrote, or first run oscar-extract --plan-only"


def _absolute(value: Any) -> Any:
    """Return a path, or each of several, as one that holds in any folder; what is no file (a name, a URL) stays."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if not isinstance(value, str) or not Path(value).exists():
        return value
    return str(Path(value).absolute())
