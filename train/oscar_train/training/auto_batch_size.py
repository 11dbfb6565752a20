"""What fits into the memory there is: `--batch-size auto` is the largest batch that does; others are refused early."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from oscar_common.errors import OperationError, UsageError
from oscar_common.memory import free_memory, neighbours
from oscar_common.settings import Train
from oscar_train.checkpoints.init import Start
from oscar_train.checkpoints.tensor_names import TIED, shapes
from oscar_train.data.batch_buffer import make_batch_buffer, triple_bytes
from oscar_train.data.sampling.shape import PAIR
from oscar_train.data.stream import Stream
from oscar_train.model.oscar import oscar_config
from oscar_train.ranks import Ranks
from oscar_train.tasks import pretraining
from oscar_train.tasks.task import Task
from oscar_train.training.step import TrainState, make_train_state, rehearse

PROBES = {"cpu": (4, 16), "cuda": (8, 24)}  # triples; more would tell the same, but take minutes on a CPU
SHARE = 0.9  # of the free memory: allocators leave holes, and others may want some
STEP = 8  # triples that matrix units like to have at a time
MOST = 4096  # triples a step: papers have 512 to 1024; nobody knows a learning rate for many more
EPOCH = 8  # steps that an epoch has at least: a larger share of the triples at once leaves too few updates
NONE_FITS = (
    "--batch-size auto: not even a single triple fits; try --activation-checkpointing, --precision bf16 or a smaller "
    "model"
)


def check_weights(settings: Train, start: Start, feature_dim: int, ranks: Ranks, task: Task | None = None) -> None:
    """Check, before a model is made, that there is memory for it, for what trains it, and for two batches.

    Raises:
        OperationError: there is not.
    """
    config = oscar_config(deepcopy(start.config), feature_dim)
    parameters = sum(shape.numel() for name, shape in shapes(config).items() if name != TIED)
    copies = 4 if ranks.device.type == "cpu" else 1  # weights, gradient and AdamW's two moments; a GPU has its own
    batch_bytes = settings.batch_size // ranks.size * triple_bytes(feature_dim, task.shape if task else PAIR)
    need = 4 * copies * parameters + 2 * batch_bytes
    if need > (free := free_memory(neighbours())):
        raise lacking(settings, need, free)


def check_part(train_state: TrainState, stream: Stream) -> None:
    """Check on a CPU, before the largest part is rehearsed, that it fits: its memory follows from two small ones.

    A GPU says by itself that memory is lacking; on a CPU the system would kill the process without a word.

    Raises:
        OperationError: it does not fit.
    """
    if train_state.ranks.device.type != "cpu":
        return

    part, feature_dim = stream.size // train_state.settings.accumulate, stream.corpus.feature_dim
    sizes, whole = _small(part), replace(train_state, settings=replace(train_state.settings, accumulate=1))
    peaks, free = _peaks(whole, sizes, feature_dim), _free(train_state.ranks.device)
    per_triple = max(0.0, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]))
    need = (
        peaks[1]
        + per_triple * (part - sizes[1])
        + stream.buffers * stream.size * triple_bytes(feature_dim, stream.shape)
    )
    if need > free:
        raise lacking(train_state.settings, need, free)


def lacking(settings: Train, need: float = 0, free: int = 0) -> OperationError:
    """Return the error that says that memory is lacking: for how much, of how much, if that is known."""
    sizes = f" (about {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free)" if need else ""
    parts = f"{settings.accumulate} part{'s' * (settings.accumulate > 1)}"
    return OperationError(
        f"--batch-size {settings.batch_size or 'auto'}: does not fit into the memory in --accumulate {parts}{sizes}; "
        "give a larger --accumulate, --activation-checkpointing, a smaller --batch-size or a smaller model"
    )


def largest_batch(
    settings: Train, start: Start, feature_dim: int, ranks: Ranks, triples: int, task: Task | None = None
) -> int:
    """Return the largest global batch that fits on all ranks, and say so in one line.

    It is never more than `MOST`, nor more than the `EPOCH`th part of the triples.

    The rehearsal of two small parts shows what a triple takes; a GPU then rehearses the answer, too.

    Args:
        settings: of the run.
        start: where the model begins; its weights are not read.
        feature_dim: of the regions, P.
        ranks: all of them call this.
        triples: how many there are to train on, about.
        task: what is trained; pre-training, unless another is given.

    Raises:
        UsageError: no batch fits, or what a triple takes cannot be seen.
    """
    # To compile or record for each size would take minutes.
    alone = replace(settings, accumulate=1, compile=False, cuda_graphs=False)
    task = task or pretraining.make_task(settings)
    model, _ = task.build(replace(start, folder=None), feature_dim, None)
    train_state = make_train_state(model.to(ranks.device), alone, replace(ranks, rank=0, size=1), task)
    sizes, free = PROBES[ranks.device.type], _free(ranks.device)
    peaks = _peaks(train_state, sizes, feature_dim)
    shares = settings.accumulate * ranks.size
    part = min(fits(sizes, peaks, free), _round(max(1, min(MOST, triples // EPOCH) // shares)))
    if ranks.device.type == "cuda":
        part = _verified(train_state, part, feature_dim)

    part = _least(part, ranks)
    if part * shares < 2:
        raise UsageError(NONE_FITS)

    if ranks.first:
        print(_found(part * shares, part, sizes, peaks, free, triples), flush=True)

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


def _peaks(train_state: TrainState, sizes: Sequence[int], feature_dim: int) -> list[int]:
    """Return the bytes that parts of some sizes take beyond what is there now, with AdamW's moments."""
    _reset_peak(train_state.ranks.device)
    before = _held(train_state.ranks.device)
    cuda = train_state.ranks.device.type == "cuda"
    moments = 0 if cuda else 8 * sum(p.numel() for p in train_state.model.parameters())  # a GPU's rehearsal has them
    peaks = []

    try:
        for size in (sizes[0], *sizes):  # the first time, libraries take memory that they keep
            _reset_peak(train_state.ranks.device)
            rehearse(train_state, make_batch_buffer(size, feature_dim, shape=train_state.task.shape).batch)
            peaks.append(_peak(train_state.ranks.device) - before + moments)
    except torch.cuda.OutOfMemoryError:
        raise UsageError(NONE_FITS) from None

    return peaks[1:]


def _small(part: int) -> tuple[int, int]:
    """Return the sizes of two batches that are small beside a part, so that trying them takes less than it does."""
    larger = max(2, min(PROBES["cpu"][1], part // 2))
    return larger // 2, larger


def _verified(train_state: TrainState, part: int, feature_dim: int) -> int:
    """Rehearse a part, and with an eighth less as long as it does not fit."""
    while part > 0:
        torch.cuda.empty_cache()
        try:
            rehearse(train_state, make_batch_buffer(part, feature_dim, shape=train_state.task.shape).batch)
            break
        except torch.cuda.OutOfMemoryError:
            train_state.optimizer.zero_grad()
            part = _round(part * 7 // 8)

    return part


def _least(part: int, ranks: Ranks) -> int:
    """Return the smallest of the ranks' numbers."""
    all_parts = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device)
    all_parts[ranks.rank] = part
    return int(ranks.total(all_parts).min())


def _found(total: int, part: int, sizes: Sequence[int], peaks: Sequence[int], free: int, triples: int) -> str:
    """Say what was chosen, and why."""
    took = " and ".join(f"{peak / 1e9:.2f}" for peak in peaks)
    most = ""
    if total > 0.99 * MOST:
        most = f"; more than {MOST} are never chosen"
    elif (total + STEP) * EPOCH > triples:
        most = f"; more than an eighth of the {triples:,} triples are never chosen"

    return (
        f"--batch-size auto: {total} triples a step, {part} at a time; {sizes[0]} and {sizes[1]} took {took} GB, "
        f"{free / 1e9:.2f} GB are free{most}"
    )


def _free(device: torch.device) -> int:
    """Return the bytes that this rank may still fill."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_memory(neighbours())


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
