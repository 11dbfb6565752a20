"""The learning rate of a step."""

import math

from oscar_common.settings import Train


def rate(settings: Train, step: int) -> float:
    """Return the learning rate of a step counted from 1."""
    return settings.lr * schedule(step - 1, settings.warmup_steps, settings.steps, settings.schedule)


def schedule(step: int, warmup: int, total: int, shape: str = "linear") -> float:
    """Return the factor of the learning rate at a step counted from 0.

    It rises linearly to 1 in `warmup` steps. Then it falls to reach 0 after the last step, on a line or half a cosine,
    or stays.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = (total - step) / (total - warmup)
    return {"linear": remaining, "cosine": (1 - math.cos(math.pi * remaining)) / 2, "constant": 1.0}[shape]
