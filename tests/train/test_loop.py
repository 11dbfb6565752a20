"""The loop: its schedule, its optimiser, and that it learns."""

import copy
import math
import os
import shutil
import signal
import time

import pytest
import torch

from oscar_common.errors import Stopped
from oscar_common.settings import Train
from oscar_train.batch import IGNORED, Batch
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.stream import Stream
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.ranks import Ranks
from oscar_train.training.schedule import rate, schedule
from oscar_train.training.signals import watched_signals
from oscar_train.training.step import (
    TrainState,
    gradient,
    make_optimizer,
    make_train_state,
    rehearse,
    share,
    shares,
    take,
)


@pytest.fixture
def model() -> OscarForPreTraining:
    return build(open_init("random:tiny"), feature_dim=24, seed=1)[0]


def make_state(model: OscarForPreTraining, **settings: object) -> TrainState:
    return make_train_state(model, Train(**settings), Ranks(0, 1, torch.device("cpu")))


def loss(train_state: TrainState, batch: Batch) -> float:
    return gradient(train_state, share(train_state, batch))[0][0].item()


def test_both_losses_of_one_batch_fall_to_nothing(model: OscarForPreTraining, stream: Stream):
    train_state = make_state(model)
    small = Stream(stream.corpus, stream.reader, seed=42, batch_size=8)
    batch = small.batch(0, small.buffer())
    results = []
    for _ in range(50):
        results.append(take(train_state, share(train_state, batch), 2e-3).read())
    assert results[0].mlm_loss == pytest.approx(math.log(30522), abs=0.3)
    assert results[0].match_loss == pytest.approx(math.log(2), abs=0.1)
    assert results[-1].mlm_loss < 2
    assert results[-1].match_loss < 0.2


def test_the_learning_rate_rises_and_falls_linearly():
    factors = [schedule(step, 4, 12) for step in range(12)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert schedule(0, 0, 10) == 1
    assert [schedule(step, 0, 4, "cosine") for step in range(4)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    assert [schedule(step, 1, 4, "constant") for step in range(4)] == [0.5, 1, 1, 1]
    assert rate(Train(lr=1e-3, steps=12, warmup_steps=4, schedule="cosine"), 1) == pytest.approx(2e-4)


def test_biases_and_layer_norms_are_not_decayed(model: OscarForPreTraining):
    decayed, free = make_optimizer(model, Train(weight_decay=0.01)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    free_names = {names[id(p)] for p in free["params"]}
    assert free_names == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}
    assert len(free["params"]) + len(decayed["params"]) == len(names)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_and_recomputing_change_only_the_rounding(stream: Stream, compile: bool):
    if compile and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    batch, ends = stream.batch(0, stream.buffer()), []
    for settings in ({}, {"accumulate": 4, "activation_checkpointing": True, "compile": compile}):
        train_state = make_state(build(open_init("random:tiny"), 24, 1)[0], **settings)
        rehearse(train_state, stream.buffer().batch)
        with torch._dynamo.config.patch(error_on_recompile=True):  # though no part is as long as another
            means, counts, _ = gradient(train_state, share(train_state, batch))
        ends.append((means, counts, [p.grad for p in train_state.model.parameters()]))
    (one, numbers, plain), (other, others, parts) = ends
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert torch.equal(numbers, others)
    for a, b in zip(plain, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)


def test_bf16_keeps_weights_and_losses_in_float32(model: OscarForPreTraining, stream: Stream):
    batch = stream.batch(0, stream.buffer())
    exact, rounded = (loss(make_state(model, precision=precision), batch) for precision in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_no_number_is_not_taken_and_its_triple_is_known(
    model: OscarForPreTraining, stream: Stream, first: bool
):
    train_state, batch = make_state(model, accumulate=2), stream.batch(0, stream.buffer())
    if not first:
        assert not take(train_state, share(train_state, batch), 1e-3).read().fault
    before = copy.deepcopy((model.state_dict(), train_state.optimizer.state_dict()["state"], train_state.guard.state()))
    batch.features[3, 0, 0] = math.inf
    report = take(train_state, share(train_state, batch), 1e-3)
    assert not math.isfinite(report.read().loss)
    assert report.read().fault
    assert report.finite.logical_not().nonzero().flatten().tolist() == [3]
    weights, moments, guard = model.state_dict(), train_state.optimizer.state_dict()["state"], train_state.guard.state()
    assert guard == before[2]
    assert all(torch.equal(weights[name], was) for name, was in before[0].items())
    for number, moment in moments.items():
        for name, now in moment.items():
            assert torch.equal(now, torch.zeros_like(now) if first else before[1][number][name])


def test_a_step_says_what_its_batch_was(model: OscarForPreTraining, stream: Stream):
    batch = stream.batch(0, stream.buffer())
    result = take(
        make_state(model, accumulate=4), share(make_state(model, accumulate=4), batch), 1e-4, stopping=True
    ).read()
    assert result.tokens == batch.attention_mask.sum() + batch.region_mask.sum()
    assert result.masked == (batch.mlm_labels != IGNORED).sum()
    assert (result.triples, result.stopped, result.fault, result.usual) == (16, 1, False, math.inf)


def test_shares_are_the_batches_and_say_how_long_they_were_waited_for(model: OscarForPreTraining, stream: Stream):
    def slow():
        for batch in stream.batches(0, 3):
            time.sleep(0.1)
            yield batch

    found = []
    for work in shares(make_state(model, accumulate=2), slow()):
        assert len(work.parts) == 2
        found.append((work.waited, sum(part.counts[2].item() for part in work.parts)))
        time.sleep(0.2)  # is not counted
    assert all(0.1 <= waited < 0.2 for waited, _ in found)
    buffer = stream.buffer()
    seen = [
        stream.batch(step, buffer) and int(buffer.batch.attention_mask.sum() + buffer.batch.region_mask.sum())
        for step in range(3)
    ]
    assert [tokens for _, tokens in found] == seen


def test_the_rehearsal_leaves_no_trace_and_runs_the_most_that_can_come(model: OscarForPreTraining, stream: Stream):
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_state, most = make_state(model, accumulate=2), []
    train_state.model.cls.predictions.register_forward_pre_hook(lambda head, inputs: most.append(len(inputs[0])))
    rehearse(train_state, stream.buffer().batch)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not train_state.optimizer.state
    for batch in stream.batches(0, 10):
        gradient(train_state, share(train_state, batch))
    assert len(most) == 21
    assert most[0] == 8 * 5 >= max(most[1:])


def test_signals_wait_for_the_step_and_the_second_ctrl_c_does_not():
    before = signal.getsignal(signal.SIGUSR1)
    with watched_signals() as stop:
        with stop.deferred():
            for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), each)
            assert stop.cause == signal.SIGUSR1
            with pytest.raises(Stopped, match="stopped by SIGUSR1 at once") as stopped:
                os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.exit_code == 138
        with pytest.raises(Stopped, match="before the first step"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGUSR1) == before
