"""The loop: its schedule, its optimiser, what it logs, and that it learns."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from oscar_common.errors import Stopped, UsageError
from oscar_common.settings import Train
from oscar_train.metrics import COLUMNS, Row, open_log
from oscar_train.model import OscarForPreTraining
from oscar_train.ranks import Ranks
from oscar_train.signals import watched_signals
from oscar_train.step import Workshop, gradient, make_optimizer, open_workshop, rate, rehearse, schedule, update
from oscar_train.stream import Stream
from oscar_train.weights import build, open_init


@pytest.fixture
def model() -> OscarForPreTraining:
    return build(open_init("random:tiny"), feature_dim=24, seed=1)[0]


def workshop(model: OscarForPreTraining, **settings: object) -> Workshop:
    return open_workshop(model, Train(**settings), Ranks(0, 1, torch.device("cpu")))


def test_both_losses_of_one_batch_fall_to_nothing(model: OscarForPreTraining, stream: Stream):
    shop = workshop(model)
    small = Stream(stream.corpus, stream.reader, seed=42, batch_size=8)
    batch = small.batch(0, small.room())
    results = []
    for _ in range(50):
        results.append(gradient(shop, batch))
        update(shop, 2e-3)
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
    batch, ends = stream.batch(0, stream.room()), []
    for settings in ({}, {"accumulate": 4, "activation_checkpointing": True, "compile": compile}):
        shop = workshop(build(open_init("random:tiny"), 24, 1)[0], **settings)
        result = gradient(shop, batch)
        ends.append((result, [p.grad for p in shop.model.parameters()]))
    (one, plain), (other, parts) = ends
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.norm == pytest.approx(one.norm, rel=1e-4)
    for a, b in zip(plain, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)


def test_bf16_keeps_weights_and_losses_in_float32(model: OscarForPreTraining, stream: Stream):
    batch = stream.batch(0, stream.room())
    exact = gradient(workshop(model), batch)
    rounded = gradient(workshop(model, precision="bf16"), batch)
    assert rounded.loss == pytest.approx(exact.loss, rel=5e-3)
    assert rounded.loss != exact.loss
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_what_is_no_number_is_seen_with_its_triple(model: OscarForPreTraining, stream: Stream):
    batch = stream.batch(0, stream.room())
    batch.features[3, 0, 0] = math.inf
    result = gradient(workshop(model), batch)
    assert not math.isfinite(result.loss)
    assert [n for n, finite in enumerate(result.finite) if not finite] == [3]


def test_the_rehearsal_leaves_no_trace_and_runs_the_most_that_can_come(model: OscarForPreTraining, stream: Stream):
    before = {name: p.clone() for name, p in model.named_parameters()}
    shop, most = workshop(model, accumulate=2), []
    shop.model.cls.predictions.register_forward_pre_hook(lambda head, inputs: most.append(len(inputs[0])))
    rehearse(shop, stream.room().batch)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not shop.optimizer.state
    for batch in stream.batches(0, 10):
        gradient(shop, batch)
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


def row(step: int) -> Row:
    values = {name: step / 7 for name in COLUMNS if name not in ("step", "epoch")}
    return Row(step=step, epoch=step // 3, **values)


def lines(out: Path) -> list[str]:
    return (out / "metrics.csv").read_text().splitlines()


def test_logs_have_the_columns_promised_and_are_cut_where_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with open_log(tmp_path, 0, 10, 1) as log:
        for step in range(1, 7):
            log.add(row(step))
    whole = lines(tmp_path)
    assert whole[0] == (
        "step,epoch,loss,mlm_loss,match_loss,mlm_accuracy,match_accuracy,lr,grad_norm,skipped,skipped_steps,"
        "samples_per_second"
    )
    assert whole[3].startswith("3,1,0.428571429,")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("7,2,0.99")  # a row cut by a kill
    with open_log(tmp_path, 4, 10, 1) as log:
        assert lines(tmp_path) == whole[:5]
        log.add(row(5))
    assert lines(tmp_path) == whole[:6]
    assert capsys.readouterr().err == ""


def test_rows_that_somebody_cut_are_said_to_be_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with open_log(tmp_path, 0, 10, 2) as log:
        log.add(row(2))
    with open_log(tmp_path, 3, 10, 2):
        pass
    assert capsys.readouterr().err == ""
    with open_log(tmp_path, 6, 10, 2):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/metrics.csv ends at step 2; the rows from there to step 6 are lost\n"
    )


def test_a_foreign_metrics_csv_is_left_alone(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("time,value\n1,2\n")
    with pytest.raises(UsageError, match=r"metrics\.csv is not a file of oscar-train's"), open_log(tmp_path, 0, 10, 1):
        pass
    assert (tmp_path / "metrics.csv").read_text() == "time,value\n1,2\n"
