"""Files are whole or absent."""

import shutil
from pathlib import Path

import pytest
from kills import is_killed

from oscar_common.errors import OperationError
from oscar_common.files import locked, replacing, replacing_folder, restore_folder


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


def replace_folder(place: Path, content: bytes) -> None:
    with replacing_folder(place) as folder:
        (folder / "x").write_bytes(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "y").write_bytes(content)


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path):
    for after in range(100):
        place = tmp_path / "a"
        replace_folder(place, b"old")
        killed = is_killed(lambda place=place: replace_folder(place, b"new"), after)
        restore_folder(place)
        content = {path.read_bytes() for path in place.rglob("[xy]")}
        assert content in ([{b"old"}, {b"new"}] if killed else [{b"new"}])
        assert len(list(place.rglob("[xy]"))) == 2

        replace_folder(place, b"again")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        if not killed:
            break
        shutil.rmtree(place)
    assert after > 8


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place, replace = tmp_path / "a", Path.replace
    replace_folder(place, b"old")

    def fails(path: Path, name: Path) -> Path:
        if path.name == ".tmp-a":
            raise OSError("no")
        return replace(path, name)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no"):
        replace_folder(place, b"new")
    assert (place / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to("disk")
    replace_folder(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "x").read_bytes() == b"new"


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
