"""The loop: its schedule, its optimiser, what it logs, and that it learns."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from oscar_common.errors import OperationError, UsageError
from oscar_common.settings import Train
from oscar_train.loop import make_optimizer, schedule, stop_signals, update
from oscar_train.metrics import COLUMNS, Row, open_log
from oscar_train.model import OscarForPreTraining
from oscar_train.stream import Stream
from oscar_train.weights import build, open_init


@pytest.fixture
def model() -> OscarForPreTraining:
    return build(open_init("random:tiny"), feature_dim=24, seed=1)[0]


def test_both_losses_of_one_batch_fall_to_nothing(model: OscarForPreTraining, stream: Stream):
    optimizer = make_optimizer(model, Train(lr=2e-3))
    small = Stream(stream.corpus, stream.reader, seed=42, batch_size=8)
    batch = small.batch(0, small.room())
    torch.manual_seed(0)
    outcomes = [update(model, optimizer, batch, 10.0, step) for step in range(50)]
    assert outcomes[0].mlm_loss.item() == pytest.approx(math.log(30522), abs=0.3)
    assert outcomes[0].match_loss.item() == pytest.approx(math.log(2), abs=0.1)
    assert outcomes[-1].mlm_loss.item() < 2
    assert outcomes[-1].match_loss.item() < 0.2


def test_the_learning_rate_rises_and_falls_linearly():
    factors = [schedule(step, 4, 12) for step in range(12)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert schedule(0, 0, 10) == 1


def test_biases_and_layer_norms_are_not_decayed(model: OscarForPreTraining):
    decayed, free = make_optimizer(model, Train(weight_decay=0.01)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    free_names = {names[id(p)] for p in free["params"]}
    assert free_names == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}
    assert len(free["params"]) + len(decayed["params"]) == len(names)


def test_a_loss_that_is_no_number_stops_before_the_model_changes(model: OscarForPreTraining, stream: Stream):
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = stream.batch(0, stream.room())
    batch.features[3, 0, 0] = math.inf
    with pytest.raises(OperationError, match=r"step 7: loss nan .* damaged features"):
        update(model, make_optimizer(model, Train()), batch, 10.0, 7)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_first_signal_waits_for_the_step_and_the_second_does_not():
    with stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    assert whole[0] == "step,epoch,loss,mlm_loss,match_loss,mlm_accuracy,match_accuracy,lr,skipped,samples_per_second"
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
