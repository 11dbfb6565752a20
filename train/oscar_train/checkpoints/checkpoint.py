"""Checkpoints: `OUT/checkpoint-000200/`, whole or absent, in the layout of Hugging Face, and resumable.

config.json  model.safetensors  vocab.txt  tokenizer.json  tokenizer_config.json    the model, as BERT folders have it
optimizer.pt                                                                        AdamW's moments
trainer.json    step, the settings that decide the numbers, what the guard remembers, size and XXH3-64 of each file,
                and the XXH3-64 of all that it says itself
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from oscar_common.errors import OperationError, UsageError, reason
from oscar_common.files import TEMPORARY, aside, remove, replacing_folder, restore_folders, temporary
from oscar_common.settings import Train, decisive
from oscar_train.arguments import CHECKPOINT, LOGS, RECORD, checkpoints, step_of
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.objectives import choose_objective, choose_region_init

ENTRIES = {"step", "run", "ranks", "threads", "guard", "about", "files", "seal"}  # of the record
NEEDED = ("config.json", "model.safetensors", "optimizer.pt")  # a run cannot go on without them
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # errors that no other try mends
UNSAID = Train(region_init="random")  # what runs had before there was a setting


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk.

    run: the decisive settings and the fingerprint of the corpus. ranks, threads: how many there were, and torch had;
    another number adds up in another order and rounds differently. guard: its state. about: what an evaluation must
    know: `tags`, the rule of the run (`TagRule`), and `shards`, the hashes of their manifests.
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
    values = {name: getattr(settings, name) for name in decisive(type(settings))}
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
    record: dict[str, Any] = {
        "step": step,
        "run": run,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "guard": guard or {"skipped": 0, "losses": []},
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

        record["files"] = {path.name: _seal(path) for path in sorted(unfinished.iterdir())}
        record["seal"] = _record_seal(record)
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    return read(place)[0]


def buffer(model: OscarForPreTraining) -> int:
    """Return the bytes that a checkpoint takes: the weights, the tied ones twice, and AdamW's two moments."""
    parameters = sum(tensor.numel() for tensor in model.parameters())
    tied = model.bert.embeddings.word_embeddings.weight.numel()
    return 4 * (3 * parameters + tied)


def check_space(out: Path, model: OscarForPreTraining) -> None:
    """Check that a checkpoint fits on the disk: better at the start than after hours.

    Raises:
        OperationError: it does not.
    """
    need, free = buffer(model), shutil.disk_usage(out).free
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
    state = torch.load(checkpoint.folder / "optimizer.pt", map_location="cpu", weights_only=True)

    # How the rate is kept is this run's own (--cuda-graphs keeps it in a tensor); each step sets its value
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update(lr=group["lr"], capturable=group["capturable"])

    optimizer.load_state_dict(state)


def newest(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint, if any, and what is wrong with those after it, one line each.

    Raises:
        UsageError: there are checkpoints, but none is whole.
        OSError: one cannot be read now. It may be whole, so that no older one takes its place.
    """
    damages: list[str] = []
    for place in checkpoints(out):
        try:
            return whole(place), damages
        except ValueError as error:
            damages.append(f"{place} is damaged ({error})")

    if damages:
        raise UsageError(f"--out: {damages[0]} and no other checkpoint is whole; start over with --overwrite")

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

        instead = f"give another --out, or --overwrite to start over; {checkpoint.folder} is at step {checkpoint.step}"
        if name == "corpus":
            raise UsageError(
                f"--shards and --texts: their content is not what the run in --out began with ({before}, now {value}), "
                "or other --tags are chosen from it, or an earlier version took texts that spell [MASK], [SEP] or the "
                f"like for special tokens; {instead}"
            )

        raise UsageError(f"--{name.replace('_', '-')} {value}: the run in --out began with {before}; {instead}")


def prune(out: Path, keep: int, step: int) -> None:
    """Delete all but the newest `keep` whole checkpoints up to `step`, the one just saved.

    Those after it belong to a line of steps that was given up because they were damaged; they go once the one just
    saved is whole. A damaged checkpoint never counts as kept. One that cannot be read now neither counts nor goes,
    unless `keep` newer ones are whole. Nothing is read unless something is to go.
    """
    places = checkpoints(out)
    given_up = [place for place in places if step_of(place) > step]
    line = [place for place in places if step_of(place) <= step]
    if not given_up and len(line) <= keep:
        return

    kept_folders: list[Path] = []
    outdated: list[Path] = []
    for place in line:
        if len(kept_folders) == keep:
            outdated.append(place)
            continue

        try:
            whole(place)
            kept_folders.append(place)
        except ValueError:
            outdated.append(place)
        except OSError:  # the disk may be well again the next time
            continue

    if not kept_folders:
        return

    if step_of(kept_folders[0]) == step:
        outdated = given_up + outdated

    for place in outdated:
        _delete(place)


def sweep(out: Path, everything: bool = False) -> None:
    """Delete what a killed run left unfinished; with `everything`, its checkpoints and logs too, and nothing else.

    A checkpoint that was about to take the place of another one gets its name.
    """
    restore_folders(out, CHECKPOINT)
    for leftover in checkpoints(out, TEMPORARY):
        remove(leftover)

    if everything:
        for place in checkpoints(out):
            _delete(place)
        for name in LOGS:
            remove(out / name)


def _delete(place: Path) -> None:
    """Delete a checkpoint by a rename first, so that none is ever half there."""
    remove(temporary(place))
    remove(aside(place))
    place.replace(temporary(place))
    remove(temporary(place))


def at(out: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step, which another process found to be whole."""
    return read(folder(out, step))[0]


def read(folder: Path) -> tuple[Checkpoint, dict[str, dict[str, Any]]]:
    """Return a checkpoint by its record, and the seal of each file. The first versions wrote no seal of the record.

    Raises:
        ValueError: there is no record that makes sense, or it was changed.
        OSError: it cannot be read now.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
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
        files = {str(name): dict(seal) for name, seal in record["files"].items()}
        sealed = record["seal"] == _record_seal(record) if "seal" in record else record.keys() <= ENTRIES
    except GONE:
        raise ValueError(f"{RECORD} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise ValueError(f"{RECORD} is unreadable") from None

    if not sealed:
        raise ValueError(f"the content of {RECORD} changed")

    return made, files


def whole(folder: Path) -> Checkpoint:
    """Read a checkpoint's record and compare each file, and the folder's name, with it.

    Raises:
        ValueError: what is wrong with it.
        OSError: it cannot be read now, which says nothing about what is in it.
    """
    made, seals = read(folder)
    for name in NEEDED:
        if name not in seals:
            raise ValueError(f"{RECORD} has no seal of {name}")

    for name, seal in seals.items():
        try:
            content = _seal(folder / name)
        except GONE:
            raise ValueError(f"{name} is missing") from None

        if content != seal:
            written = seal.get("bytes", "unknown")
            raise ValueError(f"{name} has {content['bytes']} bytes, written were {written}, or its content changed")

    if step_of(folder) not in (-1, made.step):
        raise ValueError(f"{RECORD} is of step {made.step}")

    return made


def _record_seal(record: dict[str, Any]) -> str:
    """Return the XXH3-64 of all that a record says, in whatever form it is written."""
    content = json.loads(json.dumps({name: value for name, value in record.items() if name != "seal"}))
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def _seal(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a failing read does not say
        raise

    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}
