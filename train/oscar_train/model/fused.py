"""Attention and dropout of packed tokens on a GPU: one kernel each way, with the very masks of `dropout.py`.

Written out, a step of base at batch 256 moves the scores of [256, 12, 85, 85] pairs and their masks through memory a
dozen times. Here a program keeps the scores of one row and head on the chip, and computes the masks where it needs
them, once forward and once backward.

These are operators of torch, so that `torch.compile` and fake tensors see them as a whole. The kernels are in
`kernels.py`, which needs Triton; nothing else does.
"""

import torch
from torch import Tensor

LARGEST = 128  # tokens in a row: what a program can hold
HEAD_SIZES = (16, 32, 64, 128)


def fits(device: torch.device, length: int, size: int) -> bool:
    """Tell whether `attention` serves rows of at most `length` tokens, and heads of `size` numbers."""
    return device.type == "cuda" and length <= LARGEST and size in HEAD_SIZES


@torch.library.custom_op("oscar::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    bits: Tensor,
    site: Tensor,
    groups: Tensor,
    p: float,
    scaling: float,
) -> Tensor:
    """Return softmax(query key^T scaling) value within each row, its weights under dropout.

    Args:
        query: [N, heads, D] of packed tokens, contiguous; key and value are like it.
        places: int32 [B, L], which of the N tokens stands where in a row; -1 where there is none.
        bits: int32 [B, L], random bits of the tokens in rows (`Tokens.in_rows`).
        site: int32 scalar, the dropout's (`TripleDropout.offset`).
        groups: int64 [2, B, L] or [2, B, 0], which tokens see each other (`Packed.groups`), contiguous.
        p: the share of weights that dropout sets to 0.
        scaling: of the scores.

    Returns:
        [N, heads, D].
    """
    from oscar_train.model import kernels

    return kernels.attention(query, key, value, places, bits, site, groups, p, scaling)


@torch.library.custom_op("oscar::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    bits: Tensor,
    site: Tensor,
    groups: Tensor,
    p: float,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, for that of the output [N, heads, D]; see `attention`."""
    from oscar_train.model import kernels

    return kernels.attention_backward(gradient, query, key, value, places, bits, site, groups, p, scaling)


@torch.library.custom_op("oscar::dropout", mutates_args=())
def dropout(hidden: Tensor, bits: Tensor, site: Tensor, p: float) -> Tensor:
    """Return packed tokens [N, H] with a share p of their numbers 0, and the others larger by 1 / (1 - p).

    Args:
        hidden: contiguous.
        bits: int32 [N] (`Tokens.packed`).
        site: int32 scalar (`TripleDropout.offset`).
        p: in [0, 1).
    """
    from oscar_train.model import kernels

    return kernels.dropout(hidden, bits, site, p)


@attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(query)


@attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@dropout.register_fake
def _(hidden: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(hidden)


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.numbers = inputs[len(tensors) :]  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


def _attention_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    gradients = attention_backward(gradient.contiguous(), *saved, *ctx.numbers)  # type: ignore[attr-defined]
    return (*gradients, None, None, None, None, None, None)


def _dropout_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    _, bits, site, p = inputs
    ctx.save_for_backward(bits, site)  # type: ignore[arg-type]
    ctx.p = p  # type: ignore[attr-defined]


def _dropout_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    bits, site = ctx.saved_tensors  # type: ignore[attr-defined]
    return dropout(gradient.contiguous(), bits, site, ctx.p), None, None, None  # type: ignore[attr-defined]


attention.register_autograd(_attention_gradient, setup_context=_keep_inputs)
dropout.register_autograd(_dropout_gradient, setup_context=_dropout_setup)
