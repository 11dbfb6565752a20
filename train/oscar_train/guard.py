"""Steps that would do harm: those whose loss or gradient is no number, and those whose loss leaps up."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from oscar_common.errors import OperationError
from oscar_train.sources import warn

MEMORY, FEW = 100, 5  # steps that the median is of, and without so many of which there is none
NAMES = 64  # images that a message names


class Guard:
    """Judges each step by the losses before it. spike: how many times their median is a leap; 0: none is."""

    def __init__(self, spike: float, max_skipped: int) -> None:
        self.spike, self.max_skipped = spike, max_skipped
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=MEMORY)

    def fault(self, loss: float, norm: float) -> str:
        """Say what is wrong with a step, by its loss and its gradient's norm; "" if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:.4g} and gradient norm {norm:.4g} are not both finite"
        if self.spike and len(self._losses) >= FEW and loss > self.spike * (usual := median(self._losses)):
            return f"loss {loss:.4g} is more than {self.spike:g} times the usual {usual:.4g}"
        self._losses.append(loss)
        return ""

    def skip(self, step: int, fault: str, keys: Sequence[str], aloud: bool) -> None:
        """Count a step that is skipped.

        Args:
            step: counted from 1.
            fault: what `fault` said.
            keys: of the images to look at.
            aloud: whether to say so.

        Raises:
            OperationError: it is one too many.
        """
        self.skipped += 1
        more = f" and {len(keys) - NAMES} more" if len(keys) > NAMES else ""
        said = f"step {step}: {fault}; images: {', '.join(keys[:NAMES])}{more}"
        if self.skipped > self.max_skipped:
            raise OperationError(
                f"{said}; {self.skipped} steps were skipped, --max-skipped allows {self.max_skipped}; try a smaller "
                "--lr or more --warmup-steps, or look for damaged features in --shards"
            )
        if aloud:
            warn(f"{said}; the step is skipped ({self.skipped} so far, --max-skipped {self.max_skipped})")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self.skipped = int(state["skipped"])
        self._losses = deque(map(float, state["losses"]), maxlen=MEMORY)
