"""The processes that train together, as torchrun starts them; without it, one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from oscar_common.device import choose_device
from oscar_common.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """rank: this process' number among `size`. device: where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of a tensor over all ranks, which all get the same bits; the tensor itself is overwritten."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self) -> None:
        """Wait until all ranks are here; when one goes, torchrun ends the others."""
        self.total(torch.zeros(1, device=self.device))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other ranks, if there are any: by NCCL on GPUs, by gloo elsewhere.

    Raises:
        UsageError: there is no such device, or there are fewer than ranks.
    """
    kind = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(0, 1, torch.device(kind))
        return

    place = torch.device(kind)
    if kind == "cuda":
        local, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= num_devices:
            raise UsageError(
                f"--nproc-per-node: more than the {num_devices} GPUs that are here; give {num_devices}, or --device cpu"
            )

        place = torch.device(kind, local)
        torch.cuda.set_device(place)

    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), size, place)
    dist.destroy_process_group()  # not after an error: the others would have to come, too
