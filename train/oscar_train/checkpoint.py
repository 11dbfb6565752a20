"""Checkpoints: `OUT/checkpoint-000200/`, whole or absent, in the layout of Hugging Face, and resumable.

config.json  model.safetensors  vocab.txt  tokenizer.json  tokenizer_config.json    the model, as BERT folders have it
optimizer.pt                                                                        AdamW's moments
trainer.json    step, the settings that decide the numbers, what the guard remembers, size and XXH3-64 of each file
"""

import json
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from oscar_common.errors import OperationError, UsageError, reason
from oscar_common.files import TEMPORARY, replacing_folder, temporary
from oscar_common.settings import Train, decisive
from oscar_train import run_folder
from oscar_train.arguments import CHECKPOINT, RECORD
from oscar_train.guard import Guard
from oscar_train.model import OscarForPreTraining
from oscar_train.objectives import choose_objective, choose_region_init
from oscar_train.texts.tokens import Tokenizer

UNSAID = Train(region_init="random")  # what runs had before there was a setting


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk.

    run: the decisive settings and the fingerprint of the corpus. ranks, threads: how many there were, and torch had;
    another number adds up in another order and rounds differently. guard: its state. about: what an evaluation must
    know: `tags`, the rule of the run (`oscar_train.texts.tags.TagRule`), and `shards`, the hashes of their manifests.
    """

    folder: Path
    step: int
    run: dict[str, Any]
    ranks: int
    threads: int
    guard: dict[str, Any]
    about: dict[str, Any]


def folder(out: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return out / f"{CHECKPOINT}{step:06d}"


def identity(settings: Train) -> dict[str, Any]:
    """Return the settings that decide the numbers of a run; the others may change from one start to the next."""
    values = {name: getattr(settings, name) for name in decisive()}
    values["mix"] = " ".join(map(str, settings.mix))
    values["negatives"] = choose_objective(settings).negatives
    values["region_init"] = choose_region_init(settings)
    init = Path(settings.init)
    return {**values, "init": str(init.resolve() if init.is_dir() else init)}


def save(
    out: Path,
    step: int,
    run: dict[str, Any],
    model: OscarForPreTraining,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    *,
    ranks: int = 1,
    guard: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> Checkpoint:
    """Write a checkpoint.

    Raises:
        OperationError, OSError: the disk is full or cannot be written; nothing is left under the final name.
    """
    place = folder(out, step)
    record = {
        "step": step,
        "run": run,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "guard": guard or Guard(0, 0).state(),
        "about": about or {},
    }
    with replacing_folder(place) as unfinished:
        try:
            # Tied weights share memory, which safetensors refuses; Oscar's checkpoints hold both names.
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
            torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
            model.config.to_json_file(unfinished / "config.json", use_diff=False)
            tokenizer.save(unfinished)
        except (RuntimeError, SafetensorError) as error:  # what the two libraries make of a full disk
            raise OperationError(
                f"{place}: cannot be written ({reason(error)}); the disk may be full: free some space; "
                "the same command again continues"
            ) from None
        files = {path.name: _seal(path) for path in sorted(unfinished.iterdir())}
        (unfinished / RECORD).write_text(json.dumps({**record, "files": files}, indent=1) + "\n")
    return read(place)[0]


def room(model: OscarForPreTraining) -> int:
    """Return the bytes that a checkpoint takes: the weights, the tied ones twice, and AdamW's two moments."""
    parameters = sum(tensor.numel() for tensor in model.parameters())
    tied = model.bert.embeddings.word_embeddings.weight.numel()
    return 4 * (3 * parameters + tied)


def check_space(out: Path, model: OscarForPreTraining) -> None:
    """Check that a checkpoint fits on the disk: better at the start than after hours.

    Raises:
        OperationError: it does not.
    """
    need, free = room(model), shutil.disk_usage(out).free
    if need > free:
        raise OperationError(
            f"--out {out}: {free / 1e6:,.0f} MB are free, a checkpoint takes {need / 1e6:,.0f} MB; free some space or "
            "give another --out"
        )


def load(checkpoint: Checkpoint, model: OscarForPreTraining, optimizer: Optimizer, ranks: int = 1) -> None:
    """Put a checkpoint's numbers into the model and the optimizer; nothing in it is executed.

    Torch gets as many threads as it had, if there are as many ranks.
    """
    if ranks == checkpoint.ranks:
        torch.set_num_threads(checkpoint.threads)
    model.load_state_dict(load_file(checkpoint.folder / "model.safetensors"))
    optimizer.load_state_dict(torch.load(checkpoint.folder / "optimizer.pt", map_location="cpu", weights_only=True))


def newest(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint, if any, and what is wrong with those after it, one line each.

    Raises:
        UsageError: there are checkpoints, but none is whole.
    """
    damages: list[str] = []
    for folder in _newest_first(out):
        try:
            return whole(folder), damages
        except ValueError as error:
            damages.append(f"{folder} is damaged ({error})")
    if damages:
        raise UsageError(f"--out: {damages[0]} and no other checkpoint is whole; start anew with --overwrite")
    return None, damages


def agree(checkpoint: Checkpoint | None, run: dict[str, Any]) -> None:
    """Check that a checkpoint, if there is one, is of the same run.

    Raises:
        UsageError: a setting differs; continuing would be neither the old run nor the new one.
    """
    if checkpoint is None:
        return
    for name, value in run.items():
        before = checkpoint.run.get(name, getattr(UNSAID, name, None))
        if before == value:
            continue
        instead = f"give another --out, or --overwrite to start anew; {checkpoint.folder} is at step {checkpoint.step}"
        if name == "corpus":
            raise UsageError(
                f"--shards and --texts: their content is not what the run in --out began with ({before}, now {value}), "
                f"or other --tags are chosen from it; {instead}"
            )
        raise UsageError(f"--{name.replace('_', '-')} {value}: the run in --out began with {before}; {instead}")


def prune(out: Path, keep: int, step: int) -> None:
    """Delete all but the newest `keep` whole checkpoints up to `step`, the one just saved.

    Those after it belong to a line of steps that was given up because they were damaged. A damaged checkpoint never
    counts, and if none is whole, none is deleted. Each goes by a rename first, so that none is ever half there.
    """
    newest_first = _newest_first(out)
    last = folder(out, step).name
    line = [place for place in newest_first if _order(place) <= (len(last), last)]
    kept = list(islice(filter(_is_whole, line), keep))
    if not kept:
        return

    for place in newest_first:
        if place in kept:
            continue
        shutil.rmtree(temporary(place), ignore_errors=True)
        place.replace(temporary(place))
        shutil.rmtree(temporary(place))


def _newest_first(out: Path) -> list[Path]:
    return sorted(out.glob(f"{CHECKPOINT}*"), key=_order, reverse=True)


def _order(place: Path) -> tuple[int, str]:
    """Return what sorts checkpoints by their step, also past the sixth digit."""
    return len(place.name), place.name


def _is_whole(place: Path) -> bool:
    try:
        whole(place)
    except ValueError:
        return False
    return True


def sweep(out: Path, everything: bool = False) -> None:
    """Delete what a killed run left unfinished; with `everything`, its checkpoints and logs too, and nothing else."""
    for path in [*out.glob(f"{TEMPORARY}{CHECKPOINT}*"), *(out.glob(f"{CHECKPOINT}*") if everything else ())]:
        shutil.rmtree(path)
    if everything:
        for name in ("metrics.csv", "evaluation.csv", "starts.jsonl", run_folder.FILE, run_folder.VOCABULARY):
            (out / name).unlink(missing_ok=True)
        for name in ("tensorboard", "wandb"):
            shutil.rmtree(out / name, ignore_errors=True)


def at(out: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step, which another process found to be whole."""
    return read(folder(out, step))[0]


def read(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a checkpoint by its record, and the seal of each file.

    Raises:
        ValueError: there is no record that makes sense.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        guard = {"skipped": int(record["guard"]["skipped"]), "losses": list(map(float, record["guard"]["losses"]))}
        made = Checkpoint(
            folder=folder,
            step=int(record["step"]),
            run=dict(record["run"]),
            ranks=int(record["ranks"]),
            threads=int(record["threads"]),
            guard=guard,
            about=dict(record.get("about", {})),
        )
        return made, dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{RECORD} is missing or unreadable") from None


def whole(folder: Path) -> Checkpoint:
    """Read a checkpoint's record and compare each file with it; ValueError says what is wrong."""
    made, files = read(folder)
    for name, seal in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if (found := _seal(folder / name)) != seal:
            raise ValueError(f"{name} has {found['bytes']} bytes, written were {seal['bytes']}, or its content changed")
    return made


def _seal(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}
