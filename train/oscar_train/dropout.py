"""Dropout whose masks belong to the triple: the same however a batch is split among ranks and parts, or continued.

A mask is a hash of (the triple's seed, the place in the network, the place in the tensor), so no generator has a state
to save. The hash is lowbias32 (Chris Wellons, "Prospecting for Hash Functions", 2018).
"""

import torch
from torch import Tensor, nn

_LOW, _SPAN = -(2**31), 2**32


class Seeds:
    """The seeds of the triples that a model is working on, int64 [B] in [0, 2^32); all its dropouts look here."""

    of_batch: Tensor


class TripleDropout(nn.Module):
    """Dropout of tensors [B, ...] whose rows are triples. site: the place in the network."""

    def __init__(self, p: float, seeds: Seeds, site: int) -> None:
        super().__init__()
        self.p, self.site = p, site
        self._seeds = seeds

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden` with a share p of its numbers 0 and the others larger by 1 / (1 - p); as it is in eval."""
        if not self.training or self.p == 0:
            return hidden
        kept = keep(self._seeds.of_batch, self.site, hidden.shape, self.p)
        return torch.where(kept, hidden * (1 / (1 - self.p)), 0.0)


def keep(seeds: Tensor, site: int, shape: torch.Size, p: float) -> Tensor:
    """Return which numbers of a tensor [B, ...] stay, bool; each of the B rows depends on its own seed alone."""
    places = torch.arange(shape[1:].numel(), dtype=torch.int32, device=seeds.device)
    bits = _mixed(places + _signed(site * 0x9E3779B1))[None] + _mixed((seeds + _LOW).to(torch.int32))[:, None]
    # Both are random bits already, and of the result the high ones count: half of lowbias32 is enough, in place
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= _signed(0x846CA68B)
    return (bits >= _LOW + round(p * _SPAN)).view(shape)


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
