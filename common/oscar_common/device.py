"""Where the heavy work runs."""

from oscar_common.errors import UsageError


def choose_device(asked: str) -> str:
    """Resolve `auto` to `cuda` or `cpu`. Imports torch, so it is called after the arguments are checked.

    Raises:
        UsageError: `cuda` is asked for and there is none.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device; give --device cpu or auto")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
