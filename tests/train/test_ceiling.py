"""What a step costs and how fast it was: counted as torch counts it, and averaged from row to row."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from oscar_common.settings import Train
from oscar_train.batch import IGNORED
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.batch_buffer import make_batch_buffer
from oscar_train.data.stream import Stream
from oscar_train.logs.log import MEASURED
from oscar_train.logs.throughput import Meter
from oscar_train.model.flops import Work, count, flops, matrix_ceiling
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.ranks import Ranks
from oscar_train.training.step import Share, TrainState, gradient, make_train_state, share

CPU = torch.device("cpu")
FULL = Work(tokens=4 * 85, regions=4 * 50, masked=4 * 5, triples=4)


@pytest.fixture(scope="module")
def model() -> OscarForPreTraining:
    return build(open_init("random:tiny"), feature_dim=2048, seed=1)[0]


def make_state(model: OscarForPreTraining, **settings: object) -> TrainState:
    return make_train_state(model, Train(**settings), Ranks(0, 1, CPU))


def full(train_state: TrainState) -> Share:
    """Four triples without any padding, of each of which five tokens are masked."""
    batch = make_batch_buffer(4, 2048).batch
    for mask in (batch.attention_mask, batch.region_mask):
        mask.fill_(True)
    batch.mlm_labels.fill_(IGNORED)[:, 3:8] = 7
    return share(train_state, batch)


def counted(train_state: TrainState, work: Share) -> int:
    with FlopCounterMode(display=False) as counter:
        gradient(train_state, work)
    return counter.get_total_flops()


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"precision": "bf16"}])
def test_operations_are_those_that_torch_counts(model: OscarForPreTraining, settings: dict[str, object]):
    train_state = make_state(model, **settings)
    work = full(train_state)
    assert count(work.parts) == FULL
    assert flops(model.config, FULL) == pytest.approx(counted(train_state, work), rel=1e-6)


def test_what_is_computed_twice_counts_once(model: OscarForPreTraining):
    train_state = make_state(model, activation_checkpointing=True)
    assert flops(model.config, FULL) < 0.9 * counted(train_state, full(train_state))


def test_padding_is_no_work_and_the_average_length_is_good_enough(stream: Stream):
    train_state = make_state(build(open_init("random:tiny"), feature_dim=24, seed=1)[0])
    batch = stream.batch(0, stream.buffer())
    work = share(train_state, batch)
    found = count(work.parts)
    assert found == Work(
        tokens=int(batch.attention_mask.sum() + batch.region_mask.sum()),
        regions=int(batch.region_mask.sum()),
        masked=int((batch.mlm_labels != IGNORED).sum()),
        triples=16,
    )
    done = counted(train_state, work)  # attention is among rows as long as the longest
    assert 0.9 * done < flops(train_state.model.config, found) < done


def test_work_adds_up():
    assert Work(tokens=1, regions=2) + Work(tokens=3, masked=4, triples=5) == Work(
        tokens=4, regions=2, masked=4, triples=5
    )


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_ceiling_is_found_in_less_than_a_second_and_changes_nothing(precision: str):
    torch.manual_seed(7)
    random, before, began = torch.get_rng_state(), torch.get_float32_matmul_precision(), time.monotonic()
    assert 1e8 < matrix_ceiling(CPU, precision) < 1e15
    assert time.monotonic() - began < (60 if precision == "bf16" else 10)  # on a busy machine, or one without bf16
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_row_has_the_averages_since_the_last_one(model: OscarForPreTraining, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("oscar_train.logs.throughput.time.monotonic", lambda: now)
    meter = Meter(model.config, CPU, ceiling=flops(model.config, FULL), ranks=2)
    meter.add(FULL, waited=0.5, ended=101)
    now = 150.0  # after a checkpoint
    meter.rested()
    meter.add(FULL, waited=1.5, ended=153)
    found = meter.measured()
    assert tuple(found) == MEASURED
    assert found["memory_gb"] > 0.05
    del found["memory_gb"]
    assert found == pytest.approx(
        {"samples_per_second": 4, "tokens_per_second": 340, "of_ceiling": 0.5, "data_wait": 0.5}
    )
    meter.add(FULL, waited=0.0, ended=154)
    found = meter.measured()
    assert (found["samples_per_second"], found["of_ceiling"], found["data_wait"]) == pytest.approx((8, 1, 0))
