"""`--batch-size auto`: the largest batch that fits into the memory there is."""

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from oscar_common.errors import UsageError
from oscar_common.memory import free_memory
from oscar_common.settings import Train
from oscar_train.objectives import choose_objective
from oscar_train.ranks import Ranks
from oscar_train.step import Workshop, open_workshop, rehearse
from oscar_train.stream import make_room
from oscar_train.weights import Start, build

PROBES = {"cpu": (4, 16), "cuda": (8, 24)}  # triples; more would tell the same, but take minutes on a CPU
SHARE = 0.9  # of the free memory: allocators leave holes, and others may want some
STEP = 8  # triples that matrix units like to have at a time
MOST = 4096  # triples a step: papers have 512 to 1024; nobody knows a learning rate for many more
NONE_FITS = (
    "--batch-size auto: not even a single triple fits; try --activation-checkpointing, --precision bf16 or a smaller "
    "model"
)


def largest_batch(settings: Train, start: Start, feature_dim: int, ranks: Ranks) -> int:
    """Return the largest global batch that fits on all ranks, and say so in one line; never more than `MOST`.

    The rehearsal of two small parts shows what a triple takes; a GPU then rehearses the answer, too.

    Args:
        settings: of the run.
        start: where the model begins; its weights are not read.
        feature_dim: of the regions, P.
        ranks: all of them call this.

    Raises:
        UsageError: no batch fits, or what a triple takes cannot be seen.
    """
    alone = replace(settings, accumulate=1, compile=False)  # compiled for each size it would take minutes
    model, _ = build(
        replace(start, folder=None),
        feature_dim,
        settings.seed,
        classes=choose_objective(settings).classes,
        image_layernorm=settings.image_layernorm,
        position=settings.region_position,
    )
    shop = open_workshop(model.to(ranks.device), alone, replace(ranks, rank=0, size=1))
    sizes, free = PROBES[ranks.device.type], _free(ranks.device)
    peaks = _peaks(shop, sizes, feature_dim)
    shares = settings.accumulate * ranks.size
    part = min(fits(sizes, peaks, free), _round(MOST // shares))
    if ranks.device.type == "cuda":
        part = _verified(shop, part, feature_dim)
    part = _least(part, ranks)
    if part * shares < 2:
        raise UsageError(NONE_FITS)
    if ranks.first:
        print(_found(part * shares, part, sizes, peaks, free), flush=True)
    return part * shares


def fits(sizes: Sequence[int], peaks: Sequence[int], free: int) -> int:
    """Return how many triples fit into `free` bytes: 90 % of these, on the line through two measurements.

    Args:
        sizes: triples of two batches, the smaller one first.
        peaks: bytes that each took.
        free: bytes that there are.

    Raises:
        UsageError: the larger batch did not take more.
    """
    each = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    if each <= 0:
        raise UsageError("--batch-size auto: what a triple takes cannot be measured here; give a number")
    fixed = peaks[0] - each * sizes[0]
    return _round(max(0, int((SHARE * free - fixed) / each)))


def _round(size: int) -> int:
    """Round down to what matrix units like; a few are kept as they are."""
    return size if size < STEP else size // STEP * STEP


def _peaks(shop: Workshop, sizes: Sequence[int], feature_dim: int) -> list[int]:
    """Return the bytes that parts of some sizes take beyond what is there now, with AdamW's moments."""
    _reset_peak(shop.ranks.device)
    before = _held(shop.ranks.device)
    cuda = shop.ranks.device.type == "cuda"
    moments = 0 if cuda else 8 * sum(p.numel() for p in shop.model.parameters())  # a GPU's rehearsal has them
    peaks = []
    try:
        for size in (sizes[0], *sizes):  # the first time, libraries take memory that they keep
            _reset_peak(shop.ranks.device)
            rehearse(shop, make_room(size, feature_dim).batch)
            peaks.append(_peak(shop.ranks.device) - before + moments)
    except torch.cuda.OutOfMemoryError:
        raise UsageError(NONE_FITS) from None
    return peaks[1:]


def _verified(shop: Workshop, part: int, feature_dim: int) -> int:
    """Rehearse a part, and with an eighth less as long as it does not fit."""
    while part > 0:
        torch.cuda.empty_cache()
        try:
            rehearse(shop, make_room(part, feature_dim).batch)
            break
        except torch.cuda.OutOfMemoryError:
            shop.optimizer.zero_grad()
            part = _round(part * 7 // 8)
    return part


def _least(part: int, ranks: Ranks) -> int:
    """Return the smallest of the ranks' numbers."""
    all_parts = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device)
    all_parts[ranks.rank] = part
    return int(ranks.total(all_parts).min())


def _found(total: int, part: int, sizes: Sequence[int], peaks: Sequence[int], free: int) -> str:
    """Say what was chosen, and why."""
    took = " and ".join(f"{peak / 1e9:.2f}" for peak in peaks)
    most = f"; more than {MOST} are never chosen" if total > 0.99 * MOST else ""
    return (
        f"--batch-size auto: {total} triples a step, {part} at a time; {sizes[0]} and {sizes[1]} took {took} GB, "
        f"{free / 1e9:.2f} GB are free{most}"
    )


def _free(device: torch.device) -> int:
    """Return the bytes that this rank may still fill."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(AttributeError):  # only glibc has it, and keeps what was freed, which would hide what is taken next
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # not every system lets it; then the larger batch must still set a peak
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
