"""Dropout belongs to the triple: the same mask in whatever company, and as random as torch's."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from oscar_train.dropout import Seeds, TripleDropout, keep

SHAPE = torch.Size((64, 85, 32))
P = 0.1


@pytest.fixture(scope="module")
def seeds() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 2**32, len(range(SHAPE[0]))))


def hashed(seed: int, site: int, place: int) -> int:
    """The 32 bits of a number, in Python's whole numbers."""

    def mixed(bits: int) -> int:
        bits ^= bits >> 16
        bits = bits * 0x7FEB352D & 0xFFFFFFFF
        bits ^= bits >> 15
        bits = bits * 0x846CA68B & 0xFFFFFFFF
        return bits ^ bits >> 16

    bits = mixed(place + site * 0x9E3779B1 & 0xFFFFFFFF) + mixed((seed + 2**31) & 0xFFFFFFFF) & 0xFFFFFFFF
    bits = bits * 0x7FEB352D & 0xFFFFFFFF
    bits ^= bits >> 15
    return bits * 0x846CA68B & 0xFFFFFFFF


def test_masks_are_the_hash_written_out_slowly(seeds: torch.Tensor):
    kept = keep(seeds[:3], 7, torch.Size((3, 4, 50)), P).reshape(3, -1)
    for row, seed in enumerate(seeds[:3].tolist()):
        for place in range(200):
            signed = (hashed(seed, 7, place) + 2**31) % 2**32 - 2**31
            assert bool(kept[row, place]) == (signed >= -(2**31) + round(P * 2**32))


def test_a_triples_mask_does_not_depend_on_its_company(seeds: torch.Tensor):
    whole = keep(seeds, 2, SHAPE, P)
    parts = [keep(seeds[part], 2, torch.Size((len(seeds[part]), *SHAPE[1:])), P) for part in (slice(9), slice(9, 64))]
    assert torch.equal(torch.cat(parts), whole)


def test_masks_are_independent_between_triples_places_and_sites(seeds: torch.Tensor):
    """Every share and correlation is within five of its own standard deviations."""
    z = (keep(seeds, 0, SHAPE, P).float().reshape(SHAPE[0], -1) - (1 - P)) / math.sqrt(P * (1 - P))
    other = (keep(seeds, 1, SHAPE, P).float().reshape(SHAPE[0], -1) - (1 - P)) / math.sqrt(P * (1 - P))
    n = z.numel()
    assert abs(z.sum()) < 5 * math.sqrt(n)
    assert abs((z * other).sum()) < 5 * math.sqrt(n)
    for step in (1, 32, 85):
        assert abs((z[:, step:] * z[:, :-step]).sum()) < 5 * math.sqrt(n)
    between = (z @ z.T).fill_diagonal_(0) / math.sqrt(z.shape[1])
    assert between.abs().max() < 5


def test_what_stays_is_larger_and_eval_changes_nothing(seeds: torch.Tensor):
    shared = Seeds()
    shared.of_batch = seeds
    dropout, ones = TripleDropout(P, shared, 0), torch.ones(SHAPE, requires_grad=True)
    hidden = dropout(ones)
    assert hidden.unique().tolist() == pytest.approx([0, 1 / (1 - P)])
    hidden.sum().backward()
    assert torch.equal(ones.grad, hidden)
    assert dropout.eval()(ones) is ones
    assert TripleDropout(0.0, shared, 0)(ones) is ones


def test_a_model_has_no_dropout_but_this_and_each_has_a_site_of_its_own():
    from oscar_train.model import OscarForPreTraining, oscar_config, random_config

    model = OscarForPreTraining(oscar_config(random_config("tiny", 100), 24))
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
    sites = [m.site for m in model.modules() if isinstance(m, TripleDropout)]
    assert sorted(sites) == list(range(2 + 3 * 2))  # embeddings, regions; attention and two outputs of each layer
