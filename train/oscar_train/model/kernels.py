"""The Triton kernels of `fused.py`.

They are tried on a CPU in Triton's interpreter (TRITON_INTERPRET=1, before this module is imported): see
tests/train/test_fused.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from oscar_train.model.dropout import threshold

# What `dropout.py` has as numbers, as Triton wants them
_HEAD = tl.constexpr(0x85EBCA6B - 2**32)
_FIRST = tl.constexpr(0x7FEB352D)
_SECOND = tl.constexpr(0x846CA68B - 2**32)


@triton.jit
def _mixed(bits):
    """lowbias32, as `dropout._mixed`."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * _FIRST
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * _SECOND
    return bits ^ ((bits >> 16) & 0xFFFF)


@triton.jit
def _kept(tokens, site, numbers, least):
    """`dropout.keep`: bool [T, W] for the bits of T tokens and the places of W numbers."""
    bits = _mixed(tokens + site)[:, None] + _mixed(numbers)[None, :]
    bits = bits * _FIRST
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * _SECOND
    return bits >= least


@triton.jit
def _addresses(at, head, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Where the numbers of a head of tokens are in [N, HEADS, SIZE]: int64 [T, SIZE]."""
    return (at.to(tl.int64) * HEADS + head)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def _weights(query, key, sees, scaling, PRECISION: tl.constexpr):
    """Attention weights, float32 [Q, K], of which those of keys that a query does not see are 0."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
    scores = tl.where(sees, scores, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _sees(groups, row, lines, columns, at_queries, at_keys, length, GROUPED: tl.constexpr):
    """Which keys the queries of a row see: bool [Q, K], or [1, K] where all see the same ones.

    An absent query sees all, so that none of its weights is no number.
    """
    sees = (at_keys >= 0)[None, :]
    if GROUPED:
        of_queries = groups + row * length
        of_keys = of_queries + tl.num_programs(0) * length
        query = tl.load(of_queries + lines, mask=lines < length, other=0)[:, None]
        key = tl.load(of_keys + columns, mask=columns < length, other=0)[None, :]
        itself = lines[:, None] == columns[None, :]
        sees = sees & (((query & key) != 0) | itself | (at_queries < 0)[:, None])

    return sees


@triton.jit
def _forward(
    query, key, value, out, places, bits, site, groups, scaling, scale, least, length,
    HEADS: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """One program has QUERIES queries of one row and head, and all of the row's keys."""
    row, head = tl.program_id(0), tl.program_id(1)
    columns, lines = tl.arange(0, KEYS), tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    at_keys = tl.load(places + row * length + columns, mask=columns < length, other=-1)
    at_queries = tl.load(places + row * length + lines, mask=lines < length, other=-1)
    tokens = tl.load(bits + row * length + lines, mask=lines < length, other=0) + head * _HEAD

    keys, queries = _addresses(at_keys, head, HEADS, SIZE), _addresses(at_queries, head, HEADS, SIZE)
    some, every = (at_queries >= 0)[:, None], (at_keys >= 0)[:, None]
    q, k = tl.load(query + queries, mask=some, other=0.0), tl.load(key + keys, mask=every, other=0.0)
    v = tl.load(value + keys, mask=every, other=0.0)

    sees = _sees(groups, row, lines, columns, at_queries, at_keys, length, GROUPED)
    weights = _weights(q, k, sees, scaling, PRECISION)
    weights = tl.where(_kept(tokens, tl.load(site), columns, least), weights * scale, 0.0)
    hidden = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    tl.store(out + queries, hidden.to(out.dtype.element_ty), mask=some)


@triton.jit
def _backward(
    gradient, query, key, value, to_query, to_key, to_value, places, bits, site, groups, scaling, scale, least, length,
    HEADS: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    GROUPED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program has all of a row and head: it adds up what keys and values get, over BLOCKS blocks of queries."""
    row, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, KEYS)
    at_keys = tl.load(places + row * length + columns, mask=columns < length, other=-1)
    keys, every = _addresses(at_keys, head, HEADS, SIZE), (at_keys >= 0)[:, None]
    k, v = tl.load(key + keys, mask=every, other=0.0), tl.load(value + keys, mask=every, other=0.0)
    of_site = tl.load(site)

    of_key = tl.zeros([KEYS, SIZE], dtype=tl.float32)
    of_value = tl.zeros([KEYS, SIZE], dtype=tl.float32)

    for block in range(BLOCKS):
        lines = block * QUERIES + tl.arange(0, QUERIES)
        at_queries = tl.load(places + row * length + lines, mask=lines < length, other=-1)
        tokens = tl.load(bits + row * length + lines, mask=lines < length, other=0) + head * _HEAD
        queries, some = _addresses(at_queries, head, HEADS, SIZE), (at_queries >= 0)[:, None]
        q = tl.load(query + queries, mask=some, other=0.0)
        g = tl.load(gradient + queries, mask=some, other=0.0)

        sees = _sees(groups, row, lines, columns, at_queries, at_keys, length, GROUPED)
        weights = _weights(q, k, sees, scaling, PRECISION)
        kept = _kept(tokens, of_site, columns, least)
        dropped = tl.where(kept, weights * scale, 0.0)
        of_value += tl.dot(tl.trans(dropped.to(g.dtype)), g, input_precision=PRECISION)

        of_weights = tl.where(kept, tl.dot(g, tl.trans(v), input_precision=PRECISION) * scale, 0.0)
        mean = tl.sum(weights * of_weights, 1)[:, None]
        of_scores = (weights * (of_weights - mean) * scaling).to(q.dtype)
        of_query = tl.dot(of_scores, k, input_precision=PRECISION)
        tl.store(to_query + queries, of_query.to(to_query.dtype.element_ty), mask=some)
        of_key += tl.dot(tl.trans(of_scores), q, input_precision=PRECISION)

    tl.store(to_key + keys, of_key.to(to_key.dtype.element_ty), mask=every)
    tl.store(to_value + keys, of_value.to(to_value.dtype.element_ty), mask=every)


@triton.jit
def _dropout(hidden, out, bits, site, scale, least, width, BLOCK: tl.constexpr):
    """One program has one token."""
    token, numbers = tl.program_id(0), tl.arange(0, BLOCK)
    tokens = tl.load(bits + token + tl.zeros([1], dtype=tl.int32))
    kept = _kept(tokens, tl.load(site), numbers, least)
    at = token.to(tl.int64) * width + numbers[None, :]
    values = tl.load(hidden + at, mask=numbers[None, :] < width, other=0.0)
    tl.store(out + at, tl.where(kept, values * scale, 0.0).to(values.dtype), mask=numbers[None, :] < width)


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
    """Do what `fused.attention` says."""
    out = torch.empty_like(query)
    rows, length = places.shape
    blocks = _blocks(query, length)
    grid = (rows, query.shape[1], triton.cdiv(length, blocks["QUERIES"]))
    numbers = (scaling, 1 / (1 - p), threshold(p), length)
    _forward[grid](
        query, key, value, out, places, bits, site, groups, *numbers, **blocks, **_grouped(groups), num_warps=4
    )

    return out


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
    """Do what `fused.attention_backward` says."""
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    rows, length = places.shape
    numbers = (scaling, 1 / (1 - p), threshold(p), length)
    blocks = _blocks(query, length)
    if blocks["PRECISION"] != "ieee":
        blocks["QUERIES"] = blocks["KEYS"]  # all at once: 0.22 ms for [21760, 12, 64] on an H200; 0.48 ms by 64

    blocks["BLOCKS"] = triton.cdiv(length, blocks["QUERIES"])
    _backward[rows, query.shape[1]](
        gradient, query, key, value, *gradients, places, bits, site, groups, *numbers,
        **blocks, **_grouped(groups), num_warps=8, num_stages=1,
    )  # fmt: skip
    return gradients


def dropout(hidden: Tensor, bits: Tensor, site: Tensor, p: float) -> Tensor:
    """Do what `fused.dropout` says."""
    out = torch.empty_like(hidden)
    tokens, width = hidden.shape
    block = triton.next_power_of_2(width)
    _dropout[(tokens,)](hidden, out, bits, site, 1 / (1 - p), threshold(p), width, BLOCK=block, num_warps=4)
    return out


def _grouped(groups: Tensor) -> dict[str, bool]:
    """Return whether the kernels are compiled for tokens that do not all see the same ones."""
    return {"GROUPED": groups.shape[2] > 0}


def _blocks(query: Tensor, length: int) -> dict[str, int | str]:
    """Return what the kernels are compiled for: the shapes of a program's matrices, and how it multiplies float32."""
    keys = max(16, triton.next_power_of_2(length))
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "HEADS": query.shape[1],
        "SIZE": query.shape[2],
        "QUERIES": 16 if exact else min(keys, 64),  # exact products take long to compile, the longer the more there are
        "KEYS": keys,
        "PRECISION": "ieee" if exact else "tf32",
    }
