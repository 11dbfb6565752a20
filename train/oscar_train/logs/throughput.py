"""How fast a run is: what is measured from one row of its log to the next."""

import time

import psutil
import torch
from transformers import BertConfig

from oscar_train.model.flops import Work, flops


class Meter:
    """Adds up what this rank does; the others do as much of it, but for a token here and there.

    Args:
        config: of the model.
        device: where it is.
        ceiling: what the device can do, FLOP/s; see `matrix_ceiling`.
        ranks: how many there are.
    """

    def __init__(self, config: BertConfig, device: torch.device, ceiling: float, ranks: int = 1) -> None:
        self._config, self._device, self._ceiling, self._ranks = config, device, ceiling, ranks
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of what was there before
        self._clear()
        self.rested()

    def rested(self) -> None:
        """Leave the time since the last step out: a checkpoint or an evaluation is no part of the pace."""
        self._lap = time.monotonic()

    def add(self, work: Work, waited: float, ended: float) -> None:
        """Add a step.

        Args:
            work: what there was to do.
            waited: seconds for which the host waited for the stream.
            ended: when the step was over, by `time.monotonic`.
        """
        self._work += work
        self._waited += waited
        self._seconds += ended - self._lap
        self._lap = ended

    def measured(self) -> dict[str, float]:
        """Return the columns `metrics.MEASURED` of the steps since the last call, and start counting again."""
        seconds = max(self._seconds, 1e-9)
        values = {
            "samples_per_second": self._ranks * self._work.triples / seconds,
            "tokens_per_second": self._ranks * self._work.tokens / seconds,
            "of_ceiling": flops(self._config, self._work) / seconds / self._ceiling,
            "memory_gb": memory(self._device) / 1e9,
            "data_wait": min(1.0, self._waited / seconds),  # of a step that may have been made ahead of the others
        }
        self._clear()
        return values

    def _clear(self) -> None:
        self._work, self._waited, self._seconds = Work(), 0.0, 0.0


def memory(device: torch.device) -> int:
    """Return the bytes of a GPU that were allocated at the most, or those that this process has on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
