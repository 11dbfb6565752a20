"""Files that are no weights: one line says what they are, and nothing in them is executed."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from oscar_common.errors import UsageError
from oscar_common.weight_files import read_weight_file
from oscar_extract.network.weights import read_weights as read_detector
from oscar_train.checkpoints.tensor_names import read_weights as read_model

TENSORS = {"weight": torch.arange(100.0)}


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def saved(path: Path, content: Any = TENSORS) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


FILES: dict[str, Any] = {
    "it is empty": lambda path: b"",
    "it is a web page; download the file itself": lambda path: b"\n<!DOCTYPE html>\n<html></html>",
    "it is a Git LFS pointer": lambda path: b"version https://git-lfs.github.com/spec/v1\nsize 12",
    "it holds a torch.nn.modules.linear.Linear; only tensors": lambda path: saved(path, torch.nn.Linear(2, 2)),
    "; only tensors are read": lambda path: saved(path, {"a": Hostile()}),
    "it is not a file of tensors, or damaged": lambda path: pickle.dumps(Hostile()),
    "failed finding central directory": lambda path: saved(path)[:-50],
}


@pytest.mark.parametrize("said", FILES)
def test_one_line_says_what_a_file_is(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(FILES[said](path))
    for read in (read_weight_file, read_detector, lambda path: read_model("--init x", path.parent)):
        with pytest.raises((ValueError, UsageError)) as raised:
            read(path)
        line = str(getattr(raised.value, "message", raised.value))
        assert said in line
        assert "\n" not in line
        assert "weights_only" not in line
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pth", ".pt", ".bin"])
def test_an_empty_file_of_every_form_is_said_to_be_empty(suffix: str, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    path.touch()
    with pytest.raises(UsageError, match=f"--weights {path}: cannot be read: it is empty; download it again"):
        read_detector(path)


def test_tensors_are_read(tmp_path: Path):
    saved(tmp_path / "x.pth")
    assert torch.equal(read_weight_file(tmp_path / "x.pth")["weight"], TENSORS["weight"])
    with pytest.raises(FileNotFoundError):
        read_weight_file(tmp_path / "y.pth")
