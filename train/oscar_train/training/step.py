"""One step: the gradient of a global batch, whatever the ranks and parts it is spread over, and the update.

A step is only enqueued: nothing in it asks a GPU for a value, so the host is free to prepare the next one meanwhile.
What a step came to is read from its `Report`, later.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from oscar_common.errors import UsageError
from oscar_common.settings import Train
from oscar_train.batch import IGNORED, Batch
from oscar_train.model.losses import outcome
from oscar_train.model.packing import Packed, grid_for, pack
from oscar_train.ranks import Ranks
from oscar_train.tasks import pretraining
from oscar_train.tasks.task import Task
from oscar_train.training.graphs import Recorder
from oscar_train.training.loss_guard import Guard


@dataclass(frozen=True)
class TrainState:
    """A model (a `Network` of a task) and what trains it.

    network: the model, or what spreads it over the ranks. recorder: of CUDA graphs.
    """

    model: Any
    network: nn.Module
    optimizer: AdamW
    guard: Guard
    settings: Train
    ranks: Ranks
    task: Task
    recorder: Recorder | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank does of a step, on its device. waited: seconds for which the stream was waited for."""

    parts: list[Packed]
    waited: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the global batch came to, the same numbers on all ranks.

    Losses are means over all its masked tokens, and over all its triples. norm: of the gradient, before it is clipped.
    usual: the loss that the guard compares with. fault: whether the update was left out. masked, triples, tokens: how
    many there were, the skipped triples' one token each among the last. stopped: how many ranks were told to stop.
    """

    loss: float
    mlm_loss: float
    match_loss: float
    mlm_accuracy: float
    match_accuracy: float
    norm: float
    usual: float
    fault: bool
    masked: int
    triples: int
    tokens: int
    stopped: int


class Report:
    """What a step came to, on its way to the host.

    finite: bool [B / R] on the device, which triples of this rank have scores that are numbers. waited: see `Share`.
    ended: when the step was seen to have ended, by `time.monotonic`.
    """

    def __init__(self, numbers: Tensor, finite: Tensor, waited: float) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._copied = torch.cuda.current_stream().record_event() if numbers.is_cuda else None
        self.finite, self.waited, self.ended = finite, waited, time.monotonic()

    def read(self) -> Result:
        """Wait for the step's end."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied, self.ended = None, time.monotonic()
        whole = {"fault": bool, "masked": int, "triples": int, "tokens": int, "stopped": int}
        named = zip(fields(Result), self._numbers.tolist(), strict=True)
        return Result(**{f.name: whole.get(f.name, float)(number) for f, number in named})


def make_train_state(model: Any, settings: Train, ranks: Ranks, task: Task | None = None) -> TrainState:
    """Set a model up for training, for pre-training unless another task is given; it is on its device already."""
    torch.set_float32_matmul_precision("highest" if settings.precision == "fp32" else "high")
    model.bert.recompute = settings.activation_checkpointing
    if settings.compile:
        for layer in model.bert.encoder.layer:  # one is compiled, and all are alike
            layer.compile(dynamic=True)  # no two batches have as many tokens

    network: nn.Module = model
    if ranks.size > 1:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    guard = Guard(settings.spike, settings.max_skipped, ranks.device)
    optimizer, task = make_optimizer(model, settings), task or pretraining.make_task(settings)
    train_state = TrainState(model, network, optimizer, guard, settings, ranks, task)
    if settings.cuda_graphs:
        train_state = replace(
            train_state, recorder=Recorder(lambda part, stopping: _enqueue(train_state, [part], stopping))
        )

    return train_state


def check_graphs(settings: Train, ranks: Ranks) -> None:
    """Refuse `--cuda-graphs` where no step can be recorded.

    Raises:
        UsageError: in one line.
    """
    if not settings.cuda_graphs:
        return
    if ranks.device.type != "cuda":
        raise UsageError(f"--cuda-graphs: --device is {ranks.device.type}; they need cuda")
    if ranks.size > 1 or settings.accumulate > 1:
        raise UsageError(
            f"--cuda-graphs: {ranks.size} ranks and --accumulate {settings.accumulate}; they need one rank and one part"
        )


def make_optimizer(model: nn.Module, settings: Train) -> AdamW:
    """Return AdamW without weight decay on biases and LayerNorms (every parameter with one dimension)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if settings.cuda_graphs:
        for group in optimizer.param_groups:  # a recorded step reads its rate from a tensor
            group["capturable"] = True
            group["lr"] = torch.tensor(settings.lr, device=parameters[0].device)

    return optimizer


def share(train_state: TrainState, batch: Batch, waited: float = 0.0) -> Share:
    """Return a rank's share of a step, on its device; copies from pinned memory may still be under way."""
    size = len(batch.triples) // train_state.settings.accumulate
    parts = [batch.part(begin, begin + size) for begin in range(0, size * train_state.settings.accumulate, size)]
    grid = grid_for(size) if train_state.recorder is not None else None
    return Share(parts=[pack(part, train_state.ranks.device, grid) for part in parts], waited=waited)


def shares(train_state: TrainState, batches: Iterator[Batch]) -> Iterator[Share]:
    """Yield the shares of steps. Those for a GPU are copied one ahead, while it works on the one before."""
    timed = _timed(batches)
    if train_state.ranks.device.type != "cuda":
        yield from (share(train_state, batch, waited) for batch, waited in timed)
        return

    copies, coming = torch.cuda.Stream(), None
    for batch, waited in timed:
        with torch.cuda.stream(copies):
            made = share(train_state, batch, waited), copies.record_event()
        if coming is not None:
            yield _handed_over(*coming)
        coming = made
        made[1].synchronize()  # the batch's memory is used again

    if coming is not None:
        yield _handed_over(*coming)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yield batches, with the seconds for which each was waited for."""
    began = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - began
        began = time.perf_counter()


def _handed_over(work: Share, copied: torch.cuda.Event) -> Share:
    """Return what was copied on another stream than the one that will work on it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for part in work.parts:
        for tensor in part.tensors().values():
            tensor.record_stream(stream)
    return work


def take(train_state: TrainState, work: Share, rate: float, stopping: bool = False) -> Report:
    """Take a step, unless its loss or gradient would do harm. stopping: whether this rank was told to stop."""
    return Report(*enqueue(train_state, work, rate, stopping), work.waited)


def enqueue(train_state: TrainState, work: Share, rate: float, stopping: bool = False) -> tuple[Tensor, Tensor]:
    """Do what `take` does; return the numbers of `Result`, float32, and `Report.finite`."""
    set_rate(train_state, rate)
    if train_state.recorder is not None:
        return train_state.recorder.take(work.parts[0], stopping)
    return _enqueue(train_state, work.parts, torch.full((1,), float(stopping), device=train_state.ranks.device))


def _enqueue(train_state: TrainState, parts: list[Packed], stopping: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step with the rate that is set. stopping: float32 [1], 1 if this rank was told to stop."""
    means, numbers, finite = _gradient(train_state, parts, stopping)
    fault, usual = train_state.guard.judge(means[0], means[-1])
    update(train_state, fault)
    return torch.cat([means, torch.stack([usual, fault.float()]), numbers]), finite


def gradient(train_state: TrainState, work: Share) -> tuple[Tensor, Tensor, Tensor]:
    """Leave in the model the clipped gradient of the global batch, of which `work` is this rank's share.

    The losses are means over the masked tokens and triples of the global batch (not of means, as in the release), so
    neither ranks nor parts change them. A `max_grad_norm` of 0 does not clip.

    Returns:
        float32 [6] and [4], the numbers of `Result` before and after the guard's; and `Report.finite`.
    """
    return _gradient(train_state, work.parts, torch.zeros(1, device=train_state.ranks.device))


def _gradient(train_state: TrainState, parts: list[Packed], stopping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    train_state.network.train()
    train_state.optimizer.zero_grad()
    counts = torch.stack([part.counts for part in parts]).sum(0)
    numbers = train_state.ranks.total(torch.cat([counts, stopping]))
    totals, finite = numbers.new_zeros(4), []

    for part in parts:
        last = part is parts[-1]
        with nullcontext() if last or train_state.ranks.size == 1 else train_state.network.no_sync():  # type: ignore[operator]
            losses, finite_of_part = _backward(train_state, part, numbers)
        totals += losses
        finite.append(finite_of_part)

    means = outcome(train_state.ranks.total(totals), numbers)
    norm = nn.utils.clip_grad_norm_(train_state.model.parameters(), train_state.settings.max_grad_norm or math.inf)
    return torch.stack([*vars(means).values(), norm]), numbers, torch.cat(finite)


def _backward(train_state: TrainState, part: Packed, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Add the gradient of a part; return its sums, and which of its triples have scores that are numbers."""
    device, bf16 = train_state.ranks.device.type, train_state.settings.precision == "bf16"
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        scores = train_state.network(part)

    losses, finite = train_state.task.criterion(scores, part)
    loss = (losses[:2] / numbers[:2].clamp(min=1)).sum()
    (loss * train_state.ranks.size).backward()  # of which the ranks' mean is taken
    return losses.detach(), finite


def set_rate(train_state: TrainState, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in train_state.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def update(train_state: TrainState, fault: Tensor | None = None) -> None:
    """Let AdamW take a step along the gradient that is there, unless `fault`, a bool scalar on the device."""
    # Where torch's own GradScaler says that a step is to be left out, and its moments and count with it
    train_state.optimizer.found_inf = None if fault is None else fault.float()  # type: ignore[attr-defined]
    train_state.optimizer.step()


def rehearse(train_state: TrainState, buffer: Batch) -> None:
    """Run the largest part that can come, before the first step, so that a lack of memory shows at once.

    Args:
        room: of a batch; what is in it is lost.
    """
    part = buffer.part(0, len(buffer.triples) // train_state.settings.accumulate)
    for each in (part.attention_mask, part.region_mask):
        each.fill_(True)

    for each in (part.input_ids, part.token_type_ids, part.mlm_labels, part.match_labels, part.features, part.z):
        each.zero_()

    part.mlm_labels[:, train_state.task.most_masked(len(part.triples)) :] = IGNORED
    train_state.model.train()
    kept_tensors = [torch.empty(size, device=train_state.ranks.device) for size in _kept(train_state, buffer)]
    alone = replace(train_state, network=train_state.model)  # nothing is exchanged
    _backward(alone, pack(part, train_state.ranks.device), torch.ones(2, device=train_state.ranks.device))
    train_state.optimizer.zero_grad()
    del kept_tensors


def _kept(train_state: TrainState, buffer: Batch) -> Iterator[int]:
    """Yield how many float32 there must be room for on a GPU beside what a part takes."""
    if train_state.ranks.device.type != "cuda":
        return
    if not train_state.optimizer.state:  # it makes them at its first step
        yield 2 * sum(p.numel() for p in train_state.model.parameters())
    yield 3 * buffer.features.nbytes // 4  # the next batch, and the one after it, with and without padding
