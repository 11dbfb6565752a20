"""What a step has to do and what the hardware could do, in floating-point operations (a multiply-add is two)."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from oscar_train.model.packing import Packed

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
SECONDS = 0.3
TRIES = 3  # at least: the first is slow


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the useful work of a step depends on, or that of several: how many tokens, and how many of them are regions
    or masked, in how many triples. Padding is no work."""

    tokens: int = 0
    regions: int = 0
    masked: int = 0
    triples: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def count(parts: Iterable[Packed]) -> Work:
    """Count what is to be done for the parts of a batch: by their shapes, so that no device is waited for.

    Filler does not count.
    """
    whole = Work()
    for part in parts:
        texts, regions, masked = part.filler
        whole += Work(
            tokens=len(part.slots) - texts - regions,
            regions=len(part.features) - regions,
            masked=len(part.masked) - masked,
            triples=len(part.match_labels),
        )

    return whole


def flops(config: Any, work: Work) -> float:
    """Return the operations of the matrix products of training, forward and backward.

    The backward pass has two products for each of the forward pass, but only one for the regions' embedding, as
    features need no gradient. What is computed for padding, or a second time to save memory, is not counted. All
    triples are taken to be as long as the average: attention, which is a few hundredths of the whole, really costs more
    by the square of how much the lengths vary.

    Args:
        config: of the model, with the fields of `oscar_config`.
        work: of the step, or of several.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    length = work.tokens / max(work.triples, 1)
    token = layers * (4 * hidden * hidden + 2 * hidden * config.intermediate_size + 2 * hidden * length)
    masked = hidden * (hidden + config.vocab_size)
    triple = hidden * (hidden + config.num_contrast_classes)
    thrice = token * work.tokens + masked * work.masked + triple * work.triples
    twice = hidden * config.img_feature_dim * work.regions

    return float(2 * (3 * thrice + 2 * twice))


def matrix_ceiling(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of large matrix products, the best of some tries: no model does better.

    Args:
        device: where. A CPU uses as many threads as torch has now.
        precision: one of `oscar_common.settings.PRECISIONS`.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")

    try:
        seconds = _best(SIDE[device.type], dtype, device)
    finally:
        torch.set_float32_matmul_precision(before)

    if device.type == "cuda":
        torch.cuda.empty_cache()

    return 2.0 * SIDE[device.type] ** 3 / seconds


def _best(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return how long a product takes at its fastest."""
    dice = torch.Generator(device).manual_seed(0)  # random numbers: a GPU is faster with simple ones
    left_matrix, other = (torch.randn(side, side, generator=dice, device=device).to(dtype) for _ in range(2))
    out, times, began = torch.empty_like(left_matrix), list[float](), time.monotonic()
    while len(times) < TRIES or time.monotonic() - began < SECONDS:
        times.append(_seconds(left_matrix, other, out))
    return min(times)


def _seconds(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> float:
    """Return how long a product takes."""
    if one.device.type != "cuda":
        began = time.perf_counter()
        torch.mm(one, other, out=out)
        return time.perf_counter() - began

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.mm(one, other, out=out)
    end.record()
    end.synchronize()

    return float(begin.elapsed_time(end)) / 1e3
