"""One step: the gradient of a global batch, whatever the ranks and parts it is spread over, and the update."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from oscar_common.settings import Train
from oscar_train.losses import counts, outcome, sums
from oscar_train.model import OscarForPreTraining
from oscar_train.objectives import choose_objective
from oscar_train.ranks import Ranks
from oscar_train.sampling.triples import IGNORED, MASK_RATE, MAX_TOKENS
from oscar_train.stream import Batch


@dataclass(frozen=True)
class Workshop:
    """A model and what trains it. network: the model, or what spreads it over the ranks."""

    model: OscarForPreTraining
    network: nn.Module
    optimizer: AdamW
    settings: Train
    ranks: Ranks


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the global batch came to, the same numbers on all ranks.

    Losses are means over all its masked tokens, and over all its triples. norm: of the gradient, before it is clipped.
    stopped: how many ranks were told to stop. finite: bool [B], which triples of this rank have scores that are
    numbers.
    """

    loss: float
    mlm_loss: float
    match_loss: float
    mlm_accuracy: float
    match_accuracy: float
    norm: float
    triples: int
    stopped: int
    finite: npt.NDArray[np.bool_]


def open_workshop(model: OscarForPreTraining, settings: Train, ranks: Ranks) -> Workshop:
    """Set a model up for training; it is on its device already."""
    torch.set_float32_matmul_precision("highest" if settings.precision == "fp32" else "high")
    model.bert.recompute = settings.activation_checkpointing
    if settings.compile:
        model.bert.compile(dynamic=False)
    network: nn.Module = model
    if ranks.size > 1:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return Workshop(model, network, make_optimizer(model, settings), settings, ranks)


def make_optimizer(model: nn.Module, settings: Train) -> AdamW:
    """Return AdamW without weight decay on biases and LayerNorms (every parameter with one dimension)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def gradient(shop: Workshop, batch: Batch, stopping: bool = False) -> Result:
    """Leave in the model the clipped gradient of the global batch, of which `batch` is this rank's share.

    The losses are means over the masked tokens and triples of the global batch (not of means, as in the release), so
    neither ranks nor parts change them. A `max_grad_norm` of 0 does not clip.
    """
    ranks, settings = shop.ranks, shop.settings
    shop.network.train()
    shop.optimizer.zero_grad()
    said = torch.cat([counts(batch), torch.tensor([float(stopping)])]).to(ranks.device)
    numbers = ranks.total(said)
    totals = torch.zeros(4, device=ranks.device)
    size = len(batch.triples) // settings.accumulate
    finite = []
    for number in range(settings.accumulate):
        part = batch.part(number * size, (number + 1) * size).to(ranks.device)
        last = number == settings.accumulate - 1
        with nullcontext() if last or ranks.size == 1 else shop.network.no_sync():  # type: ignore[operator]
            found, pairs = _backward(shop, part, numbers)
        totals += found
        finite.append(pairs.isfinite().all(1))
    ranks.total(totals)
    norm = nn.utils.clip_grad_norm_(shop.model.parameters(), settings.max_grad_norm or math.inf)
    means = outcome(totals, numbers[:2])
    values = torch.stack([*(getattr(means, f.name) for f in fields(means)), norm]).tolist()
    names = [*(f.name for f in fields(means)), "norm"]
    return Result(
        **dict(zip(names, values, strict=True)),
        triples=int(numbers[1]),
        stopped=int(numbers[2]),
        finite=torch.cat(finite).cpu().numpy(),
    )


def _backward(shop: Workshop, part: Batch, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Add the gradient of a part; return its sums, and its scores of pairs."""
    device, bf16 = shop.ranks.device.type, shop.settings.precision == "bf16"
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        words, pairs = shop.network(part)
    found = sums(words, pairs, part)
    loss = (found[:2] / numbers[:2].clamp(min=1)).sum()
    (loss * shop.ranks.size).backward()  # of which the ranks' mean is taken
    return found.detach(), pairs.detach()


def update(shop: Workshop, rate: float) -> None:
    """Let AdamW take a step along the gradient that is there."""
    for group in shop.optimizer.param_groups:
        group["lr"] = rate
    shop.optimizer.step()


def rate(settings: Train, step: int) -> float:
    """Return the learning rate of a step counted from 1."""
    return settings.lr * schedule(step - 1, settings.warmup_steps, settings.steps, settings.schedule)


def schedule(step: int, warmup: int, total: int, shape: str = "linear") -> float:
    """Return the factor of the learning rate at a step counted from 0.

    It rises linearly to 1 in `warmup` steps. Then it falls to reach 0 after the last step, on a line or half a cosine,
    or stays.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (total - step) / (total - warmup)
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[shape]


def rehearse(shop: Workshop, room: Batch) -> None:
    """Run the largest part that can come, before the first step, so that a lack of memory shows at once.

    Args:
        room: of a batch; what is in it is lost.
    """
    part = room.part(0, len(room.triples) // shop.settings.accumulate)
    for each in (part.attention_mask, part.region_mask):
        each.fill_(True)
    for each in (part.input_ids, part.token_type_ids, part.mlm_labels, part.match_labels, part.features, part.z):
        each.zero_()
    part.mlm_labels[:, _most_masked(shop.settings, len(part.triples)) :] = IGNORED
    shop.model.train()
    moments = None
    if not shop.optimizer.state:  # it makes them at its first step
        size = 2 * sum(p.numel() for p in shop.model.parameters())
        moments = torch.empty(size, device=shop.ranks.device if shop.ranks.device.type == "cuda" else "meta")
    alone = replace(shop, network=shop.model)  # nothing is exchanged
    _backward(alone, part.to(shop.ranks.device), torch.ones(2, device=shop.ranks.device))
    shop.optimizer.zero_grad()
    del moments


def _most_masked(settings: Train, rows: int) -> int:
    """Return how many tokens of each row are masked at most, or so rarely more that nobody will see it."""
    maskable, objective = MAX_TOKENS - 2, choose_objective(settings)
    if objective.exact and not objective.whole_words:
        return math.ceil(MASK_RATE * maskable)
    deviation = math.sqrt(maskable * MASK_RATE * (1 - MASK_RATE) / rows) * (2 if objective.whole_words else 1)
    return min(maskable, math.ceil(MASK_RATE * maskable + 6 * deviation))
