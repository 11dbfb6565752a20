"""The guard lets what is usual pass, and nothing that would do harm."""

import math
from statistics import median

import numpy as np
import pytest
import torch

from oscar_common.errors import OperationError
from oscar_common.settings import Train
from oscar_train.ranks import Ranks
from oscar_train.tasks import pretraining
from oscar_train.training.loss_guard import FEW, NAMES, Guard
from oscar_train.training.step import TrainState, make_optimizer, set_rate, update


def judge(guard: Guard, loss: float, norm: float = 1.0) -> str:
    """What is said of a step; "" if nothing."""
    fault, usual = guard.judge(torch.tensor(loss), torch.tensor(norm))
    return guard.reason(loss, norm, usual.item()) if fault else ""


def test_a_leap_is_a_fault_once_there_is_something_usual():
    guard = Guard(spike=3, max_skipped=5)
    assert [judge(guard, loss) for loss in (2.0, 1e6, *[11.0] * (FEW - 2))] == [""] * FEW  # nothing is known yet
    for loss in (10.0, 9.0, 8.0, *[2.0] * 20):
        assert judge(guard, loss) == ""
    assert judge(guard, 5.9) == ""
    assert judge(guard, 6.1) == "loss 6.1 is more than 3 times the usual 2"
    assert judge(guard, 6.1) != ""  # what was a fault is not what becomes usual
    assert judge(Guard(spike=0, max_skipped=5), 1e9) == ""


def test_the_usual_is_the_median_of_the_last_hundred_good_steps():
    guard, losses = Guard(spike=3, max_skipped=5), []
    for loss in np.random.default_rng(5).uniform(1, 2, 130).astype(np.float32).tolist():
        usual = guard.judge(torch.tensor(loss), torch.tensor(1.0))[1].item()
        assert usual == pytest.approx(median(losses[-100:]) if len(losses) >= FEW else math.inf)
        judge(guard, math.nan)
        losses.append(loss)
    assert guard.state()["losses"] == losses[-100:]


@pytest.mark.parametrize("spike", [0, 3])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)])
def test_no_number_is_a_fault_at_once(loss: float, norm: float, spike: float):
    assert "not both finite" in judge(Guard(spike, max_skipped=5), float(loss), float(norm))


def test_skipped_steps_are_said_and_counted_until_it_is_enough(capsys: pytest.CaptureFixture[str]):
    guard = Guard(spike=3, max_skipped=2)
    guard.skip(4, "loss nan", ["a", "b"], warns=True)
    guard.skip(5, "loss nan", ["c"], warns=False)
    assert capsys.readouterr().err == (
        "warning: step 4: loss nan; images: a, b; the step is skipped (1 so far, --max-skipped 2)\n"
    )
    with pytest.raises(OperationError, match=r"step 6: loss nan; images: k0, .*k63 and 36 more; 3 steps were skipped"):
        guard.skip(6, "loss nan", [f"k{n}" for n in range(NAMES + 36)], warns=True)


def test_its_memory_is_in_checkpoints():
    guard, again = Guard(3, 9), Guard(3, 9)
    for loss in range(1, 150):
        judge(guard, 1 + loss / 1000)
    guard.skip(1, "", [], warns=False)
    again.restore(guard.state())
    assert again.state() == guard.state()
    assert again.skipped == 1
    assert [judge(again, loss) for loss in (3.0, 3.4)] == [judge(guard, loss) for loss in (3.0, 3.4)]


def test_a_fault_leaves_weights_moments_and_counts_as_they_are():
    """For this AdamW looks at `found_inf`, an attribute that torch's GradScaler sets, and nobody else is promised."""
    model = torch.nn.Linear(3, 2)
    train_state = TrainState(
        model=model,  # type: ignore[arg-type]  # an update asks for parameters alone
        network=model,
        optimizer=make_optimizer(model, Train()),
        guard=Guard(0, 0),
        settings=Train(),
        ranks=Ranks(0, 1, torch.device("cpu")),
        task=pretraining.make_task(Train()),
    )

    def state() -> list[torch.Tensor]:
        moments = [moment for of_one in train_state.optimizer.state.values() for moment in of_one.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rate(train_state, 1e-2)
    update(train_state)
    before = state()
    update(train_state, fault=torch.tensor(True))
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))

    update(train_state, fault=torch.tensor(False))
    assert not any(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
