"""Files are whole or absent."""

import pytest

from oscar_common.errors import OperationError
from oscar_common.files import locked, replacing, replacing_folder


def test_a_file_takes_its_name_only_when_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half") / 0
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_name_only_when_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "a") as folder:
        (folder / "x").write_bytes(b"half") / 0
    assert list(tmp_path.iterdir()) == []
    with replacing_folder(tmp_path / "a") as folder:
        (folder / "x").write_bytes(b"whole")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "x"]


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    with (
        locked(tmp_path / "out", "--out"),
        pytest.raises(OperationError, match="another process"),
        locked(tmp_path / "out", "--out"),
    ):
        pass
    with locked(tmp_path / "out", "--out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []
