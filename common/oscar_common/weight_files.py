"""Files of weights, as people have them: read without executing anything, with one clear line where that fails."""

import re
import warnings
from pathlib import Path
from typing import Any

from oscar_common.errors import reason
from oscar_common.memory import lacks_memory

FOREIGN = {  # how files begin that are often taken for weights
    b"<": "it is a web page; download the file itself",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file; run: git lfs pull",
}
SAFETENSORS = ".safetensors"


def read_weight_file(path: Path) -> Any:
    """Return what a .safetensors file holds, or a file that torch saved. Imports torch.

    Raises:
        OSError: no such file, or it may not be read.
        ValueError: it is not such a file, it is damaged, or it holds more than tensors and plain containers.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == SAFETENSORS:
            return load_file(path)
        with warnings.catch_warnings():  # about old pickles; whether it can be read is what counts
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises is not documented by either library
        if lacks_memory(error):
            raise
        raise ValueError(fault(path, error)) from None


def fault(path: Path, error: Exception) -> str:
    """Return in one line why a file could not be read as weights."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip()

    if not begin:
        return "it is empty; download it again"

    for magic, line in FOREIGN.items():
        if begin.startswith(magic):
            return line

    if "weights_only" in str(error):  # torch's own words advise to execute what is in the file
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it holds a {match[1]}; only tensors are read" if match else "it is not a file of tensors, or damaged"

    return reason(error)
