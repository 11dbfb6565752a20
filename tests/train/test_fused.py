"""The GPU's kernels against attention in float64: on a GPU, or else in Triton's interpreter (see conftest.py)."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from oscar_train.model.dropout import Tokens, TripleDropout, by_head, keep, token_bits

SITE, HEADS, SIZE = 4, 2, 16
SCALING = SIZE**-0.5


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")
    from oscar_train.model import kernels

    return kernels


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Which token stands where in three rows of different lengths, and their random bits."""
    torch.manual_seed(0)
    there = torch.arange(21) < torch.tensor([21, 9, 15])[:, None]
    places = torch.full(there.shape, -1, dtype=torch.int32)
    places[there] = torch.randperm(int(there.sum())).to(torch.int32)
    return places.to(DEVICE), token_bits(torch.tensor([5, 77, 2**31 + 9]), 21).to(DEVICE)


def written_out(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, bits: Tensor, groups: Tensor, p: float
) -> Tensor:
    """Attention of packed tokens, one row after the other."""
    hidden = torch.zeros_like(query)
    for number, (row, of_row) in enumerate(zip(places, bits, strict=True)):
        tokens = row[row >= 0].long()
        length = len(tokens)
        scores = torch.einsum("ihd,jhd->hij", query[tokens], key[tokens]) * SCALING
        if groups.shape[2]:
            sees = [
                [i == j or bool(groups[0, number, i] & groups[1, number, j]) for j in range(length)]
                for i in range(length)
            ]
            scores = scores.masked_fill(~torch.tensor(sees, device=scores.device), -torch.inf)
        kept = keep(by_head(of_row[None], HEADS), SITE, len(row), p)[0, :, :length, :length]
        weights = torch.where(kept, scores.softmax(-1) / (1 - p), 0.0)
        hidden = hidden.index_add(0, tokens, torch.einsum("hij,jhd->ihd", weights, value[tokens]))
    return hidden


@pytest.mark.parametrize("grouped", [False, True], ids=["all see all", "in groups"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_attention_and_its_gradients_are_those_written_out(
    kernels: ModuleType, rows: tuple[Tensor, Tensor], p: float, grouped: bool
):
    """Groups are random: some tokens see themselves alone, and bits above the 32nd count."""
    places, bits = rows
    groups = (torch.randint(8, (2, *places.shape)) << 31).to(DEVICE) if grouped else places.new_zeros(2, 3, 0).long()
    site = TripleDropout(p, Tokens(), SITE, 24).to(DEVICE).offset
    tokens = int(places.max()) + 1
    query, key, value, gradient = (torch.randn(tokens, HEADS, SIZE, device=DEVICE) for _ in range(4))

    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    expected = written_out(*exact, places, bits, groups, p)
    expected.backward(gradient.double())

    hidden = kernels.attention(query, key, value, places, bits, site, groups, p, SCALING)
    torch.testing.assert_close(hidden, expected.float(), rtol=1e-5, atol=1e-5)

    gradients = kernels.attention_backward(gradient, query, key, value, places, bits, site, groups, p, SCALING)
    for ours, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours, reference.grad.float(), rtol=1e-5, atol=1e-5)


def test_dropout_has_the_masks_of_the_plain_one(kernels: ModuleType, rows: tuple[Tensor, Tensor]):
    bits = rows[1].flatten()
    dropout = TripleDropout(0.1, Tokens(), SITE, 24).to(DEVICE)
    hidden = torch.randn(len(bits), 24, device=DEVICE)
    expected = torch.where(keep(bits, SITE, 24, 0.1), hidden * (1 / 0.9), 0.0)
    assert torch.equal(kernels.dropout(hidden, bits, dropout.offset, 0.1), expected)
