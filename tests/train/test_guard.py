"""The guard lets what is usual pass, and nothing that would do harm."""

import math

import pytest

from oscar_common.errors import OperationError
from oscar_train.guard import FEW, NAMES, Guard


def test_a_leap_is_a_fault_once_there_is_something_usual():
    guard = Guard(spike=3, max_skipped=5)
    assert [guard.fault(loss, 1) for loss in (2.0, 1e6, *[11.0] * (FEW - 2))] == [""] * FEW  # nothing is known yet
    for loss in (10.0, 9.0, 8.0, *[2.0] * 20):
        assert guard.fault(loss, 1) == ""
    assert guard.fault(5.9, 1) == ""
    assert guard.fault(6.1, 1) == "loss 6.1 is more than 3 times the usual 2"
    assert guard.fault(6.1, 1) != ""  # what was a fault is not what becomes usual
    assert Guard(spike=0, max_skipped=5).fault(1e9, 1) == ""


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)])
def test_no_number_is_a_fault_at_once(loss: float, norm: float):
    assert "not both finite" in Guard(spike=0, max_skipped=5).fault(loss, norm)


def test_skipped_steps_are_said_and_counted_until_it_is_enough(capsys: pytest.CaptureFixture[str]):
    guard = Guard(spike=3, max_skipped=2)
    guard.skip(4, "loss nan", ["a", "b"], aloud=True)
    guard.skip(5, "loss nan", ["c"], aloud=False)
    assert capsys.readouterr().err == (
        "warning: step 4: loss nan; images: a, b; the step is skipped (1 so far, --max-skipped 2)\n"
    )
    with pytest.raises(OperationError, match=r"step 6: loss nan; images: k0, .*k63 and 36 more; 3 steps were skipped"):
        guard.skip(6, "loss nan", [f"k{n}" for n in range(NAMES + 36)], aloud=True)


def test_its_memory_is_in_checkpoints():
    guard, again = Guard(3, 9), Guard(3, 9)
    for loss in range(1, 150):
        guard.fault(1 + loss / 1000, 1)
    guard.skip(1, "", [], aloud=False)
    again.restore(guard.state())
    assert again.state() == guard.state()
    assert again.skipped == 1
    assert [again.fault(loss, 1) for loss in (3.0, 3.4)] == [guard.fault(loss, 1) for loss in (3.0, 3.4)]
