"""Training on a GPU is training on a CPU: the same losses, and nothing that the host waits for."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import ENVIRONMENT, finish, has_row, launch_fresh, rows, wait
from small_shards import P, make_samples, write_folder

from oscar_common.settings import Train
from oscar_train.data.stream import Stream, open_stream
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.model.packing import pack
from oscar_train.ranks import Ranks
from oscar_train.training.step import TrainState, gradient, make_train_state, share, shares, take

pytestmark = pytest.mark.gpu

STEPS, BATCH = 20, 32
TINY = ("--init", "random:tiny", "--device", "cuda")
COMMAND = (*TINY, "--batch-size", "16", "--steps", "300", "--checkpoint-every", "100")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("gpu") / "shards", make_samples(60))


@pytest.fixture(scope="module")
def stream(shards: Path) -> Iterator[Stream]:
    with open_stream([str(shards)], batch_size=BATCH, pin=True) as opened:
        yield opened


def make_state(device: str, **settings: object) -> TrainState:
    torch.manual_seed(0)
    model = OscarForPreTraining(oscar_config(random_config("tiny", 30522), P))
    place = torch.device(device)
    return make_train_state(model.to(place), Train(batch_size=BATCH, **settings), Ranks(0, 1, place))


def curve(stream: Stream, device: str, **settings: object) -> list[float]:
    """Return the losses of some steps."""
    train_state, buffer = make_state(device, **settings), stream.buffer()
    losses = []
    for number in range(STEPS):
        batch = stream.batch(number, buffer)
        losses.append(take(train_state, share(train_state, batch), 1e-3).read().loss)
    return losses


@pytest.fixture(scope="module")
def plain(stream: Stream) -> list[float]:
    """The losses of the CPU, in fp32."""
    return curve(stream, "cpu")


def worst(losses: list[float], others: list[float]) -> float:
    return max(abs(loss - other) for loss, other in zip(losses, others, strict=True))


def test_the_gpu_has_the_losses_of_the_cpu(stream: Stream, plain: list[float]):
    assert plain[-1] < plain[0] - 1
    assert worst(curve(stream, "cuda"), plain) < 1e-4 * plain[0]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"compile": True}, 1e-4),
        ({"precision": "bf16"}, 5e-3),
        ({"precision": "bf16", "compile": True}, 5e-3),
        ({"accumulate": 2}, 1e-4),
        ({"cuda_graphs": True}, 1e-4),
        ({"cuda_graphs": True, "activation_checkpointing": True}, 1e-4),
        ({"precision": "bf16", "compile": True, "cuda_graphs": True}, 5e-3),
    ],
)
def test_other_ways_follow(stream: Stream, plain: list[float], settings: dict[str, object], allowed: float):
    assert worst(curve(stream, "cuda", **settings), plain) < allowed * plain[0]


def test_the_kernels_change_nothing_beside_attention_written_out(
    stream: Stream, plain: list[float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("oscar_train.model.fused.fits", lambda *_: False)
    assert worst(curve(stream, "cuda"), plain) < 1e-4 * plain[0]


def test_recomputed_activations_give_the_same_gradients(stream: Stream):
    gradients = []
    for recompute in (False, True):
        train_state = make_state("cuda", activation_checkpointing=recompute)
        gradient(train_state, share(train_state, stream.batch(0, stream.buffer())))
        gradients.append([p.grad for p in train_state.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_replayed_step_computes_the_bits_of_the_first_one(stream: Stream):
    losses = []
    for _ in range(2):
        train_state, buffer = make_state("cuda", cuda_graphs=True, precision="bf16"), stream.buffer()
        assert train_state.recorder is not None
        losses.append(
            [take(train_state, share(train_state, stream.batch(0, buffer)), 0.0).read().loss for _ in range(6)]
        )
        assert train_state.recorder.shapes == 1
    assert len({*losses[0], *losses[1]}) == 1


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16"}, {"accumulate": 2}, {"precision": "bf16", "cuda_graphs": True}]
)
def test_no_step_waits_for_the_gpu(stream: Stream, settings: dict[str, object]):
    train_state = make_state("cuda", **settings)
    work = [share(train_state, stream.batch(number, stream.buffer())) for number in range(4)]
    for one in work:  # steps are recorded, if they are
        take(train_state, one, 1e-3).read()
    take(train_state, work[0], 1e-3).read()  # the optimizer makes its moments, the kernels are compiled
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        reports = [take(train_state, one, 1e-3) for one in work[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < report.read().loss < 20 for report in reports)


def test_batches_copied_ahead_are_the_batches(stream: Stream):
    train_state = make_state("cuda")
    ahead = shares(train_state, stream.batches(0, 6))
    for number, work in enumerate(ahead):
        expected = pack(stream.batch(number, stream.buffer()), torch.device("cpu"))
        (part,) = work.parts
        for name, tensor in expected.tensors().items():
            assert torch.equal(getattr(part, name).cpu(), tensor), (number, name)
    assert number == 5


def final_weights(run: Path) -> bytes:
    return (run / "checkpoint-000300" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(launch_fresh("--shards", shards, "--out", out, *COMMAND))
    return out


def test_a_run_that_was_stopped_ends_with_the_same_bytes(shards: Path, undisturbed: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = launch_fresh("--shards", shards, "--out", out, *COMMAND)
    wait(process, lambda: has_row(out, 60))
    process.send_signal(signal.SIGTERM)
    finish(process, 143)

    finish(launch_fresh("--resume", out))
    assert rows(out) == rows(undisturbed)
    assert final_weights(out) == final_weights(undisturbed)


def test_a_run_with_graphs_that_was_stopped_ends_with_the_same_bytes(shards: Path, tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(launch_fresh("--shards", shards, "--out", whole, *COMMAND, "--cuda-graphs"))
    process = launch_fresh("--shards", shards, "--out", out, *COMMAND, "--cuda-graphs")
    wait(process, lambda: has_row(out, 60))
    process.send_signal(signal.SIGTERM)
    finish(process, 143)

    finish(launch_fresh("--resume", out))
    assert rows(out) == rows(whole)
    assert final_weights(out) == final_weights(whole)


def test_a_rank_of_nccl_does_the_same(shards: Path, undisturbed: Path, tmp_path: Path):
    out = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    line = [sys.executable, *torchrun, "-m", "oscar_train", "--shards", str(shards), "--out", str(out), *COMMAND]
    subprocess.run(line, check=True, capture_output=True, timeout=120, env=ENVIRONMENT)
    assert final_weights(out) == final_weights(undisturbed)


def test_the_largest_batch_is_one_that_fits(shards: Path, tmp_path: Path):
    out = tmp_path / "run"
    line = ("--shards", shards, "--out", out, *TINY, "--batch-size", "auto", "--steps", "3")
    printed = "".join(finish(launch_fresh(*line)))
    assert has_row(out, 3), printed
