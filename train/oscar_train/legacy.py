"""The form of file that torch had before 1.6, which microsoft/Oscar's torch 1.2 reads."""

import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import INT_SIZE, LONG_SIZE, MAGIC_NUMBER, PROTOCOL_VERSION, SHORT_SIZE

PICKLE = 2  # the protocol
SIZES = {"short": SHORT_SIZE, "int": INT_SIZE, "long": LONG_SIZE}


def write_tensors(path: Path, tensors: "OrderedDict[str, Tensor]") -> None:
    """Write contiguous float32 tensors; those that share memory are written once.

    `torch.save` writes this form, too, but with the tensors' addresses in it: here the same tensors are the same bytes.

    Raises:
        OSError: they cannot be written.
    """
    stored = {tensor.data_ptr(): tensor for tensor in tensors.values()}
    keys = {address: str(number) for number, address in enumerate(stored)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> tuple[object, ...] | None:
            if not isinstance(thing, torch.TypedStorage):
                return None
            address = thing._untyped_storage.data_ptr()  # that of TypedStorage warns
            return "storage", torch.FloatStorage, keys[address], "cpu", stored[address].numel(), None

    machine = {"protocol_version": PROTOCOL_VERSION, "little_endian": sys.byteorder == "little", "type_sizes": SIZES}
    with path.open("wb") as file:
        for head in (MAGIC_NUMBER, PROTOCOL_VERSION, machine):
            pickle.dump(head, file, PICKLE)
        Pickler(file, PICKLE).dump(tensors)
        pickle.dump(list(keys.values()), file, PICKLE)
        for tensor in stored.values():
            file.write(struct.pack("=q", tensor.numel()))
            file.write(tensor.numpy().data)
