"""The command's arguments, checked before anything slow is imported."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from oscar_common.errors import UsageError, nearest
from oscar_common.files import check_output_folder, no_folder
from oscar_common.settings import Train

ALLOWED_INIT = "give a BERT folder, a hub name or random:tiny|small|base|large"
RANDOM = "random:"
CHECKPOINT = "checkpoint-"  # of folders' names
LOGS = (  # what a run writes beside checkpoints
    *("metrics.csv", "evaluation.csv", "starts.jsonl", "run.yaml", "tag_vocabulary.txt", "tensorboard", "wandb"),
)
RECORD = "trainer.json"  # of a checkpoint: what it was made with
RUN_FILE = "run.yaml"  # the settings of a run, in its folder
SHUFFLES = ("features", "tags", "captions")  # what an evaluation may take from another image
# Batches have ever other numbers of tokens, and on a CPU torch keeps what it prepared for the last 1,024 of them, which
# takes gigabytes; what a step needs more than once are some dozens.
FEW_SHAPES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
SIZES = {  # layers, hidden size, heads; the inner size is four times the hidden size
    "tiny": (2, 128, 2),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def checkpoints(out: Path, prefix: str = "") -> list[Path]:
    """Return the checkpoint folders in `out`, newest first; other names that only begin alike are people's own."""
    places = [place for place in out.glob(f"{prefix}{CHECKPOINT}*") if step_of(place, prefix) >= 0 and place.is_dir()]
    return sorted(places, key=lambda place: step_of(place, prefix), reverse=True)


def step_of(place: Path, prefix: str = "") -> int:
    """Return the step that a checkpoint folder's name says, or -1 if it is no such name."""
    name = re.fullmatch(rf"{re.escape(prefix + CHECKPOINT)}([0-9]{{6,}})", place.name)
    return int(name[1]) if name else -1


def check(settings: Train) -> Path:
    """Return the folder of output.

    Raises:
        UsageError: a flag is missing, or its value makes no sense.
    """
    if not settings.shards:
        raise UsageError("--shards is missing: give the folder that oscar-extract wrote, or a --pipeline that names it")
    if settings.out is None:
        raise UsageError("--out is missing: give the folder for checkpoints and logs, or a --pipeline that names it")
    if settings.mix and len(settings.mix) != len(settings.shards):
        raise UsageError(f"--mix: {len(settings.mix)} weights for {len(settings.shards)} --shards; give one for each")
    if settings.warmup_steps >= settings.steps:
        raise UsageError(f"--warmup-steps {settings.warmup_steps}: must be less than --steps {settings.steps}")
    if settings.eval_shards and settings.eval_fraction:
        raise UsageError(f"--eval-fraction {settings.eval_fraction:g}: there are --eval-shards; give one of the two")

    for texts in settings.texts:
        if not Path(texts).is_file():
            raise UsageError(f"--texts {texts}: no such file; give one that oscar-shards texts wrote")

    out = Path(settings.out)
    check_output_folder(out, "--out", (RUN_FILE, f"{CHECKPOINT}*", "metrics.csv"))
    if settings.overwrite or not checkpoints(out):  # else the checkpoint has all that is needed
        _check_init(settings.init)

    if settings.overwrite:
        _check_overwritten(settings, out)

    check_ranks(settings)
    if settings.wandb is not None and getattr(find_spec("wandb"), "origin", None) is None:  # a folder may be called so
        raise UsageError(f"--wandb {settings.wandb}: wandb is not installed; pip install wandb, or leave --wandb out")

    return out


def _check_overwritten(settings: Train, out: Path) -> None:
    """Refuse to begin with what `--overwrite` deletes before there is anything newer."""
    for flag, value in (
        ("--init", settings.init),
        ("--recipe", settings.recipe),
        ("--tag-vocabulary", settings.tag_vocabulary),
    ):
        if value is None or not Path(value).exists():
            continue

        inside = Path(value).resolve()
        if not inside.is_relative_to(out.resolve()):
            continue

        first = out.resolve() / Path(*inside.relative_to(out.resolve()).parts[:1])
        if first.name in LOGS or step_of(first) >= 0:
            raise UsageError(f"{flag} {value}: --overwrite deletes it from --out {out}; give a copy, or another --out")


def check_ranks(settings: Train) -> None:
    """Refuse a batch that cannot be spread evenly."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % (ranks * settings.accumulate):
        raise UsageError(
            f"--batch-size {settings.batch_size}: not a multiple of {ranks} ranks times --accumulate "
            f"{settings.accumulate}; give one that is"
        )


def _check_init(init: str) -> None:
    """Refuse what can be neither a folder, a hub name nor a random size, and hub names that are mistyped folders."""
    if init.startswith(RANDOM):
        if (size := init[len(RANDOM) :]) not in SIZES:
            raise UsageError(f"--init {init}: no size {size!r}{nearest(size, SIZES)}")
        return

    path = Path(init)
    if path.is_dir():
        if not (path / "config.json").is_file() and not checkpoints(path):
            raise UsageError(f"--init {init}: {path} has no config.json; give the folder of a BERT model")
        return
    if path.exists():
        raise UsageError(f"--init {init}: a file; {ALLOWED_INIT}")

    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    if in_a_folder or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", init) or init.startswith("."):
        raise UsageError(f"--init {init}: no such folder; {ALLOWED_INIT}")

    from oscar_train.checkpoints import hub

    hub.check(init)


def check_model(path: Path, flag: str = "FOLDER") -> None:
    """Refuse a folder that is not that of a model, nor that of a run with checkpoints.

    Raises:
        UsageError: in one line.
    """
    if not path.is_dir():
        raise UsageError(f"{flag} {path}: {no_folder(path)}; give that of a model or of a run")
    if not any((path / name).is_file() for name in ("config.json", RECORD)) and not checkpoints(path):
        problem = "a run without any checkpoint yet" if (path / RUN_FILE).is_file() else "neither a model nor a run"
        raise UsageError(f"{flag} {path}: {problem}; give a folder with config.json or {CHECKPOINT}*")
