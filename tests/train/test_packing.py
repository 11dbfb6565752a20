"""Small tensors go to a GPU as one buffer, and come out of it as they were."""

import torch

from oscar_train import packing


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
