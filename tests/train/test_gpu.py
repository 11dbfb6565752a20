"""What can be known of a GPU without one: a step mixes no devices, and asks for no value.

A fake tensor has a shape and a device, but no values: what the host would have to wait for, raises. Torch's backward
pass needs a GPU's driver even for these; hence it is replaced there, and its own turn is with fake tensors of a CPU.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from oscar_common.settings import Train
from oscar_train.batch import Batch
from oscar_train.data.stream import Stream
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.model.packing import Packed, pack
from oscar_train.ranks import Ranks
from oscar_train.training import step
from oscar_train.training.step import Result, Share, TrainState, enqueue, make_train_state

CPU = torch.device("cpu")
SETTINGS = [{}, {"activation_checkpointing": True}, {"max_grad_norm": 0.0, "spike": 0.0}, {"precision": "tf32"}]


@pytest.fixture(params=["cuda", "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def part(stream: Stream, device: torch.device) -> Iterator[Packed]:
    """A batch as it comes to the device, of tensors without values; and everything after it is fake."""
    real = pack(stream.batch(0, stream.buffer()), CPU).tensors()
    with FakeTensorMode():
        yield Packed(**{name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in real.items()})


@pytest.fixture
def train_state(part: Packed, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainState]:
    def make(**settings: object) -> TrainState:
        torch.set_default_device(device)  # fake parameters cannot be moved there
        try:
            model = OscarForPreTraining(oscar_config(random_config("tiny", 30522), 24))
        finally:
            torch.set_default_device(None)

        def backward(loss: Tensor) -> None:
            assert loss.device.type == "cuda"
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)

        if device.type == "cuda":
            monkeypatch.setattr(Tensor, "backward", backward)
        return make_train_state(model, Train(**settings), Ranks(0, 1, device))

    return make


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_asks_for_nothing(part: Packed, train_state: Callable[..., TrainState], settings: dict[str, object]):
    made, device = train_state(**settings), part.slots.device.type
    for _ in range(2):  # the optimizer makes its moments in the first
        numbers, finite = enqueue(made, Share(parts=[part, part]), 1e-4)
    assert (numbers.device.type, numbers.shape) == (device, (len(Result.__dataclass_fields__),))
    assert (finite.device.type, finite.shape) == (device, (2 * len(part.match_labels),))
    state = [tensor for moments in made.optimizer.state.values() for tensor in moments.values()]
    assert len(state) == 3 * len(list(made.model.parameters()))
    assert {tensor.device.type for tensor in [*made.model.parameters(), *state]} == {device}


def test_an_evaluation_asks_for_nothing(part: Packed, train_state: Callable[..., TrainState]):
    words, pairs = train_state().model.eval()(part)
    assert (words.device, len(words)) == (part.slots.device, len(part.masked))
    assert (pairs.device, len(pairs)) == (part.slots.device, len(part.match_labels))


class Waiting(nn.Module):
    """A head that does something to hidden states before it scores them."""

    def __init__(self, head: nn.Module, waits: Callable[[Tensor], Tensor]):
        super().__init__()
        self.head, self.waits = head, waits

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.waits(hidden))


@pytest.mark.parametrize(
    ("waits", "error"),
    [
        (lambda hidden: hidden[hidden[:, 0] > 0], DynamicOutputShapeException),
        (lambda hidden: hidden if hidden.sum() > 0 else -hidden, DataDependentOutputException),
    ],
)
def test_these_tests_would_notice_a_wait(
    part: Packed, train_state: Callable[..., TrainState], waits: Callable[[Tensor], Tensor], error: type[Exception]
):
    made = train_state()
    made.model.cls.predictions.transform = Waiting(made.model.cls.predictions.transform, waits)
    with pytest.raises(error):
        enqueue(made, Share(parts=[part]), 1e-4)


class Cuda:
    """What `step.shares` uses of torch.cuda, and what it does with it, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.Stream = self.current_stream = lambda: self

    def stream(self, stream: object) -> torch.autograd.profiler.record_function:
        return torch.autograd.profiler.record_function("")  # anything that is a context

    def record_event(self) -> "Cuda":
        self.said.append("copying")
        return self

    def synchronize(self) -> None:
        self.said.append("copied")

    def wait_event(self, event: object) -> None:
        self.said.append("the GPU waits")


def test_batches_are_copied_one_ahead_and_their_memory_is_left_alone_until_then(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
):
    cuda, batch = Cuda(), stream.batch(0, stream.buffer())
    monkeypatch.setattr(step.torch, "cuda", cuda)
    monkeypatch.setattr(step, "pack", lambda part, device, grid: pack(part, CPU))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, on: None)

    def batches() -> Iterator[Batch]:
        for number in range(3):
            cuda.said.append(f"batch {number}")
            yield batch

    model = OscarForPreTraining(oscar_config(random_config("tiny", 30522), 24))
    made = make_train_state(model, Train(), Ranks(0, 1, CPU))
    on_gpu = TrainState(**{**vars(made), "ranks": Ranks(0, 1, torch.device("cuda"))})
    for number, _ in enumerate(step.shares(on_gpu, batches())):
        cuda.said.append(f"step {number}")
    assert cuda.said == [
        *("batch 0", "copying", "copied"),
        *("batch 1", "copying", "the GPU waits", "step 0", "copied"),
        *("batch 2", "copying", "the GPU waits", "step 1", "copied"),
        *("the GPU waits", "step 2"),
    ]
