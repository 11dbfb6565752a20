"""A batch without padding: filler changes nothing, and small tensors go to a GPU as one buffer."""

import pytest
import torch

from oscar_common.settings import Train
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.stream import Stream
from oscar_train.model import packing
from oscar_train.model.flops import count
from oscar_train.model.packing import Grid, pack
from oscar_train.ranks import Ranks
from oscar_train.training.step import Share, gradient, make_train_state

CPU = torch.device("cpu")


def test_tensors_of_every_type_and_shape_fit_into_one_buffer():
    tensors = {
        "flags": torch.rand(3, 5) > 0.5,
        "ids": torch.randint(2**40, (7,)),
        "nothing": torch.zeros(0, dtype=torch.int64),
        "z": torch.randn(4, 6),
        "rows": torch.randint(99, (2, 3), dtype=torch.int32),
    }
    buffer = torch.empty(sum(map(packing._room, tensors.values())), dtype=torch.uint8)
    for part, tensor in zip(packing._parts(buffer, tensors), tensors.values(), strict=True):
        part.copy_(tensor)

    for part, tensor in zip(packing._parts(buffer.clone(), tensors), tensors.values(), strict=True):
        assert part.dtype == tensor.dtype
        assert part.data_ptr() % packing.ALIGNMENT == 0 or tensor.numel() == 0
        assert torch.equal(part, tensor)


@pytest.mark.parametrize("grid", [Grid(tokens=64, masked=64), Grid(tokens=7, masked=1), Grid(tokens=500, masked=90)])
def test_filler_changes_neither_losses_nor_gradients_nor_dropout(stream: Stream, grid: Grid):
    model, _ = build(open_init("random:tiny"), feature_dim=24, seed=1)
    train_state = make_train_state(model, Train(), Ranks(0, 1, CPU))
    batch = stream.batch(0, stream.buffer())
    plain, filled = pack(batch, CPU), pack(batch, CPU, grid)
    assert len(filled.input_ids) % grid.tokens == len(filled.features) % grid.tokens == 0
    assert len(filled.masked) % grid.masked == 0
    assert sum(filled.filler) > 0
    assert count([filled]) == count([plain])

    results = []
    for part in (plain, filled):
        means, numbers, _ = gradient(train_state, Share(parts=[part]))
        results.append((means, numbers, *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_batches_on_a_grid_have_few_shapes(stream: Stream):
    grid, buffer = packing.grid_for(stream.size), stream.buffer()
    parts = [pack(stream.batch(number, buffer), CPU, grid) for number in range(40)]
    shapes = {tuple(tensor.shape for tensor in part.tensors().values()) for part in parts}
    assert len(shapes) <= 12
