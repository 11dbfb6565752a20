"""One clear line of whatever a library raises, and of whatever a file holds that is no settings."""

import errno
from pathlib import Path

import pyarrow as pa
import pytest
from support import error_line, train

from oscar_common.errors import reason, shorten


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (EOFError(), "EOFError"),
        (MemoryError(), "MemoryError"),
        (pa.ArrowException(""), "ArrowException"),
        (ValueError("\n\n"), "ValueError"),
        (RuntimeError("\n  CUDA error: an illegal address\nCompile with DSA"), "CUDA error: an illegal address"),
        (KeyError("weight_map"), "KeyError: 'weight_map'"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "Permission denied"),
        (OSError("cannot identify\timage file"), "cannot identify image file"),
        (ValueError("x" * 1000), "x" * 200 + "..."),
    ],
)
def test_an_exception_becomes_one_short_line_that_is_never_empty(error: Exception, line: str):
    assert reason(error) == line


def test_no_message_is_made_of_an_exceptions_lines_without_a_look_whether_there_are_any():
    root = Path(__file__).parents[2]
    places = [p for part in ("common", "shards", "extract", "train") for p in root.glob(f"{part}/**/*.py")]
    assert len(places) > 100
    assert [p.name for p in places if "(error).splitlines()[" in p.read_text()] == []


def test_a_short_text_stays_as_it_is():
    assert shorten("a b") == "a b"
    assert shorten("a" * 200) == "a" * 200


def test_a_file_that_holds_no_settings_is_not_printed(tmp_path: Path):
    captions = tmp_path / "captions.csv"
    captions.write_text("".join(f"{n}.jpg,a dog number {n}\n" for n in range(3000)))
    done = train("--recipe", captions)
    assert done.returncode == 2
    assert f"{captions}: '0.jpg,a dog number 0 1.jpg" in error_line(done)
    assert error_line(done).endswith("... is no mapping of train settings")
    assert len(error_line(done)) < 300

    captions.write_bytes(b"a" * (1 << 21))
    assert "--recipe" in error_line(train("--recipe", captions))
    assert error_line(train("--recipe", captions)).endswith(
        "2,097,152 bytes are too many for a file of settings; give a YAML file"
    )
