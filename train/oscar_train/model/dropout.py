"""Dropout whose masks belong to the triple: the same however a batch is split among ranks and parts, or continued.

A mask is a hash of (the triple's seed, the token's place in its row, the place in the network, the place in the token's
numbers), so no generator has a state to save, and neither padding nor the other rows matter. The hash is lowbias32
(Chris Wellons, "Prospecting for Hash Functions", 2018).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oscar_train.model import fused

_LOW, _SPAN = -(2**31), 2**32
_SITE, _HEAD, _PLACE = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd numbers that are far from each other's multiples


class Tokens:
    """Random bits of the tokens that a model is working on; all its dropouts look here.

    in_rows: int32 [B, L]. packed: int32 [N], the same as the model has its tokens.
    """

    in_rows: Tensor
    packed: Tensor


class TokensAtSite:
    """Random bits of the packed tokens for one place in the network: int32 [N]."""

    packed: Tensor


class TripleDropout(nn.Module):
    """Dropout of packed tokens [1, N, H] and of attention weights [B, heads, L, L].

    Args:
        p: the share of numbers that are set to 0.
        tokens: where the model puts the bits of its tokens.
        site: the place in the network.
        width: the numbers of a packed token, H.
    """

    def __init__(self, p: float, tokens: Tokens, site: int, width: int) -> None:
        super().__init__()
        self.p, self.site = p, site
        self._tokens, self._at_site = tokens, TokensAtSite()
        # A tensor, as compiled code would be compiled again for each number
        self.register_buffer("offset", torch.tensor(_signed(site * _SITE), dtype=torch.int32), persistent=False)
        # Made once: what a compiler would have to compute for each number, it cannot fuse with what is around
        self.register_buffer("columns", _columns(width, torch.device("cpu")), persistent=False)

    offset: Tensor
    columns: Tensor

    @property
    def tokens(self) -> Tokens:
        """The bits of the tokens that the model is working on."""
        return self._tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden` with a share p of its numbers 0 and the others larger by 1 / (1 - p); as it is in eval."""
        if not self.training or self.p == 0:
            return hidden

        packed = hidden.dim() == 3
        if packed and hidden.is_cuda and not torch.compiler.is_compiling():  # a compiler fuses it with what is around
            dropped: Tensor = fused.dropout(hidden.flatten(0, 1), self._tokens.packed, self.offset, self.p)
            return dropped[None]

        if packed:
            is_kept = _kept(self._at_site.packed[None], self.columns, self.p)
        else:
            is_kept = keep(by_head(self._tokens.in_rows, hidden.shape[1]), self.offset, hidden.shape[-1], self.p)

        return torch.where(is_kept, hidden * (1 / (1 - self.p)), 0.0)


def set_tokens(tokens: Tokens, dropouts: Sequence[TripleDropout], in_rows: Tensor, packed: Tensor) -> None:
    """Tell the dropouts of a model which tokens it is working on.

    Args:
        tokens: theirs.
        dropouts: those of packed tokens.
        in_rows: int32 [B, L], of `token_bits`.
        packed: int32 [N], the same as the model has its tokens.
    """
    tokens.in_rows, tokens.packed = in_rows, packed
    offsets = torch.stack([dropout.offset for dropout in dropouts])
    bits = _mixed(packed + offsets[:, None])
    for dropout, at_site in zip(dropouts, bits.unbind(), strict=True):
        dropout._at_site.packed = at_site.clone()  # with memory of its own, else code is compiled for each offset in it


def token_bits(seeds: Tensor, length: int) -> Tensor:
    """Return random bits for the tokens of rows: int32 [B, L] for seeds int64 [B] in [0, 2^32)."""
    return _mixed(_mixed((seeds + _LOW).to(torch.int32))[:, None] + _multiples(_PLACE, length, seeds.device))


def by_head(tokens: Tensor, heads: int) -> Tensor:
    """Return bits for each head of a token: int32 [B, heads, L] for [B, L]."""
    return tokens[:, None] + _multiples(_HEAD, heads, tokens.device)[:, None]


def keep(tokens: Tensor, site: int | Tensor, width: int, p: float) -> Tensor:
    """Return which of the numbers of tokens stay, bool [..., width] for bits [...]; each token's depend on its own.

    Args:
        tokens: int32 [...].
        site: a number, or `TripleDropout.offset`.
        width: how many numbers a token has.
        p: the share that does not stay.
    """
    offset = site if isinstance(site, Tensor) else _signed(site * _SITE)
    return _kept(_mixed(tokens + offset), _columns(width, tokens.device), p)


def _kept(tokens: Tensor, columns: Tensor, p: float) -> Tensor:
    """Return which numbers stay, bool [..., W], for bits of tokens at a place [...] and of a token's numbers [W]."""
    bits = tokens[..., None] + columns
    # Both are random bits already, and of the result the high ones count: half of lowbias32 is enough, in place
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= _signed(0x846CA68B)
    return bits >= threshold(p)


def _columns(width: int, device: torch.device) -> Tensor:
    """Return random bits for the numbers of a token, int32 [width]."""
    return _mixed(_multiples(1, width, device))


def threshold(p: float) -> int:
    """Return the least int32 of 2^32 equally likely ones that stays."""
    return _LOW + round(p * _SPAN)


def _multiples(factor: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device) * _signed(factor)


def _mixed(bits: Tensor) -> Tensor:
    """Return other 32 bits for 32 bits (int32, whose shifts keep the sign: hence the masks)."""
    bits = bits ^ (bits >> 16 & 0xFFFF)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15 & 0x1FFFF)
    bits = bits * _signed(0x846CA68B)
    return bits ^ (bits >> 16 & 0xFFFF)


def _signed(number: int) -> int:
    """Return the int32 with the same bits."""
    return (number + _SPAN // 2) % _SPAN - _SPAN // 2
