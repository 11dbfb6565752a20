"""Steps that a GPU records once and then replays (CUDA graphs), so that the host enqueues one call and not thousands.

Only a step of the same shapes can be replayed: `packing.Grid` sees to it that few come. The first step of a shape is
taken as always, and then recorded, which computes nothing. A replay launches the same kernels on the same shapes, so it
computes the same bits, and a run that goes on from a checkpoint ends as one that was never stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oscar_train.model.packing import Packed

Shape = tuple[torch.Size, ...]
Step = Callable[[Packed, Tensor], tuple[Tensor, Tensor]]  # of a batch, and of 1.0 if the run is to stop, float32 [1]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A step of one shape. inputs: where it reads its batch. numbers, finite: where it leaves what `Step` returns."""

    graph: torch.cuda.CUDAGraph
    inputs: Packed
    numbers: Tensor
    finite: Tensor


class Recorder:
    """Takes steps on one GPU, and records those of a new shape. All of them share the memory of the largest."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._recorded: dict[Shape, Recorded] = {}
        self._stream = torch.cuda.Stream()
        self._memory = torch.cuda.MemPool()
        self._features: Tensor | None = None
        self._stopping = torch.zeros(1, device="cuda")

    @property
    def shapes(self) -> int:
        """How many shapes are recorded."""
        return len(self._recorded)

    def take(self, part: Packed, stopping: bool) -> tuple[Tensor, Tensor]:
        """Take a step on a batch with filler, which is on the GPU. What it returns may be kept."""
        self._stopping.fill_(float(stopping))
        shape = tuple(tensor.shape for tensor in part.tensors().values())
        recorded = self._recorded.get(shape)

        if recorded is None:
            results = self._take_first(part)
            self._recorded[shape] = self._record(part)
            return results

        torch._foreach_copy_(list(recorded.inputs.tensors().values()), list(part.tensors().values()))
        recorded.graph.replay()
        return recorded.numbers.clone(), recorded.finite.clone()

    def _take_first(self, part: Packed) -> tuple[Tensor, Tensor]:
        """Take a step as always, in the memory that recorded ones have, too."""
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)

        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._memory):
            numbers, finite = self._step(part, self._stopping)

        caller.wait_stream(self._stream)
        return numbers.clone(), finite.clone()

    def _record(self, part: Packed) -> Recorded:
        inputs = self._inputs(part)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()

        # Other threads, which copy batches, may go on meanwhile
        memory = self._memory.id

        with torch.cuda.graph(graph, memory, self._stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            numbers, finite = self._step(inputs, self._stopping)

        return Recorded(graph=graph, inputs=inputs, numbers=numbers, finite=finite)

    def _inputs(self, part: Packed) -> Packed:
        """Return tensors for a batch of this shape. Features are large, so that all shapes share one tensor of them."""
        count = len(part.features)
        if self._features is None or len(self._features) < count:
            rows = len(part.first) * part.seen.shape[1]  # no batch has as many regions
            self._features = part.features.new_zeros(max(rows, count), part.features.shape[1])

        tensors = part.tensors()
        del tensors["features"]
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return Packed(filler=part.filler, features=self._features[:count], **copies)
