"""Steps that would do harm: those whose loss or gradient is no number, and those whose loss leaps up."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oscar_common.errors import OperationError
from oscar_common.progress import warn

MEMORY, FEW = 100, 5  # steps that the median is of, and without so many of which there is none
NAMES = 64  # images that a message names


class Guard:
    """Judges each step by the losses before it, on the device, so that the host need not wait for the verdict.

    spike: how many times their median is a leap; 0: none is. skipped: the steps reported to `skip`.
    """

    def __init__(self, spike: float, max_skipped: int, device: torch.device | str = "cpu") -> None:
        self.spike, self.max_skipped = spike, max_skipped
        self.skipped = 0
        self._losses = torch.full((MEMORY,), math.inf, device=device)  # the newest last; inf: none yet

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Judge a step by its loss and its gradient's norm, float32 scalars, and remember the loss of a good one.

        Returns:
            bool scalar: whether something is wrong; float32 scalar: the usual loss, inf if there is none yet.
        """
        usual = self._usual()
        fault = ~(loss.isfinite() & norm.isfinite())
        if self.spike:
            fault = fault | (loss > self.spike * usual)

        # In place, as a recorded step (graphs.py) goes on from where the losses were when it was recorded
        self._losses.copy_(torch.where(fault, self._losses, torch.cat([self._losses[1:], loss[None]])))
        return fault, usual

    def _usual(self) -> Tensor:
        num_finite, ordered = self._losses.isfinite().sum(), self._losses.sort().values
        middle = torch.stack([num_finite - 1, num_finite]).clamp(min=0).div(2, rounding_mode="floor")
        return ordered.index_select(0, middle).mean().where(num_finite >= FEW, math.inf)

    def reason(self, loss: float, norm: float, usual: float) -> str:
        """Say what is wrong with a step that was found faulty."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:.4g} and gradient norm {norm:.4g} are not both finite"
        return f"loss {loss:.4g} is more than {self.spike:g} times the usual {usual:.4g}"

    def skip(self, step: int, fault: str, keys: Sequence[str], warns: bool) -> None:
        """Count a step that is skipped.

        Args:
            step: counted from 1.
            fault: what `reason` said.
            keys: of the images to look at.
            warns: whether to print a warning.

        Raises:
            OperationError: it is one too many.
        """
        self.skipped += 1
        more = f" and {len(keys) - NAMES} more" if len(keys) > NAMES else ""
        message = f"step {step}: {fault}; images: {', '.join(keys[:NAMES])}{more}"
        if self.skipped > self.max_skipped:
            raise OperationError(
                f"{message}; {self.skipped} steps were skipped, --max-skipped allows {self.max_skipped}; try a smaller "
                "--lr or more --warmup-steps, or look for damaged features in --shards"
            )

        if warns:
            warn(f"{message}; the step is skipped ({self.skipped} so far, --max-skipped {self.max_skipped})")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"skipped": self.skipped, "losses": [loss for loss in self._losses.tolist() if loss < math.inf]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self.skipped = int(state["skipped"])
        losses = [math.inf] * MEMORY + [float(loss) for loss in state["losses"]]
        self._losses = torch.tensor(losses[-MEMORY:], device=self._losses.device)
