"""Weights files to a detectron2 model: nothing in them is executed, and every tensor must find its place."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oscar_common.errors import UsageError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")
# Written by some versions of detectron2 and computed from the config by others; batch norm's counter is for training.
COMPUTED = re.compile(r"(anchor_generator\.cell_anchors\.\d+|pixel_mean|pixel_std|num_batches_tracked)$")
SHOWN = 6  # differences listed in an error


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds plain containers and numpy arrays, and refuses everything else."""

    ALLOWED = frozenset(
        {("collections", "OrderedDict"), ("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}; only numpy arrays are allowed")
        return super().find_class(module, name)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a .safetensors, .pth or .pkl file in detectron2's names.

    Raises:
        UsageError: no such file, not a weights file, something other than arrays in it, or tensors that differ from the
            model's (the first few are listed).
    """
    state = {re.sub(r"^module\.", "", name): t for name, t in _tensors(path).items() if not COMPUTED.search(name)}
    wanted = {name: t for name, t in model.state_dict().items() if not COMPUTED.search(name)}
    problems = [
        *(f"missing {n} {list(wanted[n].shape)}" for n in wanted if n not in state),
        *(f"unused {n} {list(state[n].shape)}" for n in state if n not in wanted),
        *(
            f"{n} is {list(state[n].shape)}, not {list(wanted[n].shape)}"
            for n in wanted
            if n in state and state[n].shape != wanted[n].shape
        ),
    ]
    if problems:
        rest = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UsageError(f"--weights {path}: does not fit the --detector config: {'; '.join(problems[:SHOWN])}{rest}")
    model.load_state_dict(state, strict=False)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name, as float32 where they are floating."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--weights {path}: unknown form {path.suffix!r}; allowed: {' '.join(SUFFIXES)}")
    try:
        content = _read(path)
    except FileNotFoundError:
        raise UsageError(f"--weights {path}: no such file; give one of {' '.join(SUFFIXES)}") from None
    except (
        Exception
    ) as error:  # a foreign or hostile file makes the readers raise anything; one line says which file it was
        raise UsageError(f"--weights {path}: cannot be read: {str(error).splitlines()[0]}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UsageError(f"--weights {path}: holds a {type(content).__name__}, not named tensors")
    tensors = {n: torch.as_tensor(t) for n, t in content.items() if isinstance(t, torch.Tensor | np.ndarray)}
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    return torch.load(path, map_location="cpu", weights_only=True)
