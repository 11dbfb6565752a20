"""Weights files: read without executing anything in them, and put into a model, where every tensor finds its place."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oscar_common.errors import UsageError, reason
from oscar_common.weight_files import fault, read_weight_file
from oscar_extract.network.families import Family, convert

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")
# Anchors and means come from the preset and the config, whatever a file holds; batch norm's counter is for training.
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pth, .bin or .pkl file by name, as float32 where they are floating.

    Raises:
        UsageError: no such file, not a weights file, or something other than arrays in it.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--weights {path}: unknown form {path.suffix!r}; allowed: {' '.join(SUFFIXES)}")

    try:
        content = _read(path)
    except FileNotFoundError:
        raise UsageError(f"--weights {path}: no such file; give one of {' '.join(SUFFIXES)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--weights {path}: cannot be read: {reason(error)}") from None

    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]

    if not isinstance(content, dict):
        raise UsageError(f"--weights {path}: holds a {type(content).__name__}, not named tensors")

    tensors = {n: torch.as_tensor(t) for n, t in content.items() if isinstance(t, Tensor | np.ndarray)}
    return {re.sub(r"^module\.", "", n): t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def _read(path: Path) -> Any:
    if path.suffix != ".pkl":
        return read_weight_file(path)

    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a foreign or hostile file makes an unpickler raise anything
        raise ValueError(fault(path, error)) from None


def fill(model: nn.Module, family: Family, preset: str, state: dict[str, Tensor], path: Path) -> None:
    """Put the tensors of `path` into the model.

    Raises:
        UsageError: tensors that differ from the model's; the first few are listed, by the file's names.
    """
    try:
        converted = convert(family, preset, state)
    except ValueError as error:
        raise UsageError(f"--weights {path}: {error}") from None

    tensors = {name: t for name, t in converted.items() if not COMPUTED.search(name)}
    expected = {name: t for name, t in model.state_dict().items() if not COMPUTED.search(name)}
    problems = [
        *(f"missing {family.theirs(n)} {list(expected[n].shape)}" for n in expected if n not in tensors),
        *(f"unused {family.theirs(n)} {list(tensors[n].shape)}" for n in tensors if n not in expected),
        *(
            f"{family.theirs(n)} is {list(tensors[n].shape)}, not {list(expected[n].shape)}"
            for n in expected
            if n in tensors and tensors[n].shape != expected[n].shape
        ),
    ]
    if problems:
        rest = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "; ".join(problems[:SHOWN])
        raise UsageError(
            f"--weights {path}: of family {family.name}, but does not fit the --detector's config: {listed}{rest}"
        )

    model.load_state_dict(tensors, strict=False)
