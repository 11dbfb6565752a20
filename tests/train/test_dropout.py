"""Dropout belongs to the triple: the same mask in whatever company, and as random as torch's."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from oscar_train.model.dropout import Tokens, TripleDropout, by_head, keep, set_tokens, token_bits

SHAPE = torch.Size((64, 85, 32))
P = 0.1


@pytest.fixture(scope="module")
def seeds() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 2**32, len(range(SHAPE[0]))))


def hashed(seed: int, place: int, site: int, number: int, head: int = 0) -> int:
    """The 32 bits of a number of a token, in Python's whole numbers."""

    def mixed(bits: int) -> int:
        bits &= 0xFFFFFFFF
        bits ^= bits >> 16
        bits = bits * 0x7FEB352D & 0xFFFFFFFF
        bits ^= bits >> 15
        bits = bits * 0x846CA68B & 0xFFFFFFFF
        return bits ^ bits >> 16

    token = mixed(mixed(seed + 2**31) + place * 0xC2B2AE35) + head * 0x85EBCA6B
    bits = mixed(token + site * 0x9E3779B1) + mixed(number) & 0xFFFFFFFF
    bits = bits * 0x7FEB352D & 0xFFFFFFFF
    bits ^= bits >> 15
    return bits * 0x846CA68B & 0xFFFFFFFF


def stays(bits: int) -> bool:
    return (bits + 2**31) % 2**32 - 2**31 >= -(2**31) + round(P * 2**32)


def test_masks_are_the_hash_written_out_slowly(seeds: torch.Tensor):
    tokens = token_bits(seeds[:3], 9)
    kept, weights = keep(tokens, 7, 50, P), keep(by_head(tokens, 4), 7, 50, P)
    assert (kept.shape, weights.shape) == ((3, 9, 50), (3, 4, 9, 50))
    for row, seed in enumerate(seeds[:3].tolist()):
        for place, number in itertools.product(range(9), range(50)):
            assert bool(kept[row, place, number]) == stays(hashed(seed, place, 7, number))
            assert bool(weights[row, 3, place, number]) == stays(hashed(seed, place, 7, number, head=3))


def masks(seeds: torch.Tensor, site: int, shape: torch.Size = SHAPE) -> torch.Tensor:
    return keep(token_bits(seeds, shape[1]), site, shape[2], P)


def test_a_triples_mask_depends_neither_on_its_company_nor_on_padding(seeds: torch.Tensor):
    whole = masks(seeds, 2)
    parts = [masks(seeds[part], 2) for part in (slice(9), slice(9, 64))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(masks(seeds, 2, torch.Size((64, 40, 20))), whole[:, :40, :20])


def test_masks_are_independent_between_triples_places_and_sites(seeds: torch.Tensor):
    """Every share and correlation is within five of its own standard deviations."""
    z = (masks(seeds, 0).float().reshape(SHAPE[0], -1) - (1 - P)) / math.sqrt(P * (1 - P))
    other = (masks(seeds, 1).float().reshape(SHAPE[0], -1) - (1 - P)) / math.sqrt(P * (1 - P))
    n = z.numel()
    assert abs(z.sum()) < 5 * math.sqrt(n)
    assert abs((z * other).sum()) < 5 * math.sqrt(n)
    for step in (1, 32, 85):
        assert abs((z[:, step:] * z[:, :-step]).sum()) < 5 * math.sqrt(n)
    between = (z @ z.T).fill_diagonal_(0) / math.sqrt(z.shape[1])
    assert between.abs().max() < 5


def test_heads_and_tokens_have_masks_of_their_own(seeds: torch.Tensor):
    kept = keep(by_head(token_bits(seeds[:2], 85), 12), 3, 85, P).reshape(-1, 85)
    assert len(kept.unique(dim=0)) > 0.99 * len(kept)


@pytest.mark.parametrize("in_rows", [False, True])
def test_what_stays_is_larger_and_eval_changes_nothing(seeds: torch.Tensor, in_rows: bool):
    shared, bits = Tokens(), token_bits(seeds, SHAPE[1])
    shape = (SHAPE[0], 2, SHAPE[1], SHAPE[1]) if in_rows else (1, SHAPE[0] * SHAPE[1], SHAPE[2])
    dropout, ones = TripleDropout(P, shared, 0, shape[-1]), torch.ones(shape, requires_grad=True)
    set_tokens(shared, [dropout], bits, bits.flatten())
    hidden = dropout(ones)
    assert hidden.unique().tolist() == pytest.approx([0, 1 / (1 - P)])
    hidden.sum().backward()
    assert torch.equal(ones.grad, hidden)
    assert dropout.eval()(ones) is ones
    assert TripleDropout(0.0, shared, 0, shape[-1])(ones) is ones


def test_a_model_has_no_dropout_but_this_and_each_has_a_site_of_its_own():
    from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config

    model = OscarForPreTraining(oscar_config(random_config("tiny", 100), 24))
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
    sites = [m.site for m in model.modules() if isinstance(m, TripleDropout)]
    assert sorted(sites) == list(range(1 + 3 * 2))  # text and regions; attention and two outputs of each layer


@pytest.mark.parametrize(("asked", "expected"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_attention_has_the_dropout_that_is_asked_for_and_the_rest_keeps_its_own(asked: float | None, expected: float):
    from oscar_train.checkpoints.init import build, open_init

    model, _ = build(open_init("random:tiny"), 24, 1, attention_dropout=asked)
    shares = {name: m.p for name, m in model.named_modules() if isinstance(m, TripleDropout)}
    assert {p for name, p in shares.items() if ".self." in name} == {expected}
    assert {p for name, p in shares.items() if ".self." not in name} == {0.1}
    assert model.config.attention_probs_dropout_prob == expected  # its checkpoints say so
