"""What the tests share: photos, and the commands as a user runs them."""

import io
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import warm
from PIL import Image

import oscar_extract.__main__
import oscar_shards.__main__
import oscar_train.__main__
from oscar_common import cli

EXTRACT = oscar_extract.__main__.command
SHARDS = oscar_shards.__main__.command
TRAIN = oscar_train.__main__.command


def photo(name: str) -> Image.Image:
    """A photo that scikit-image carries: astronaut, camera, coffee, chelsea (a cat) or rocket."""
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def slow_jpeg(side: int = 4000, scans: int = 2000) -> bytes:
    """A JPEG file that takes half a minute to decode although it has 0.2 MB: all scans but the first few do nothing.

    Each is the last one of a progressive JPEG again, 53 bytes that refine every coefficient of the image (all are 0).
    """
    buffer = io.BytesIO()
    Image.new("L", (side, side), 99).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xc4")  # its Huffman table
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def later_wins(command: click.Command, *arguments: object) -> list[str]:
    """Arguments as words, of a flag given more than once the last only: tests add to what they share."""
    words = [str(argument) for argument in arguments]
    if isinstance(command, click.Group):
        command = command.commands.get(words[0], command) if words else command
    single = {
        name: not param.is_flag
        for param in command.params
        if isinstance(param, click.Option) and not param.multiple
        for name in param.opts
    }
    for place in reversed(range(len(words))):
        if words[place] in single and words[place] in words[place + 1 :]:
            del words[place : place + 1 + single[words[place]]]
    return words


def oscar(*arguments: object, timeout: float = 300, **keywords: Any) -> "subprocess.CompletedProcess[str]":
    """Run `oscar-extract ...` or `oscar-train ...` in a process of its own."""
    process = start(*arguments, **keywords)
    printed, errors = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def start(*arguments: object, **keywords: Any) -> warm.Process:
    """Begin `oscar-extract ...` or `oscar-train ...` in a process of its own."""
    command = str(arguments[0])
    commands = {"oscar-extract": EXTRACT, "oscar-train": TRAIN, "oscar-shards": SHARDS}
    return warm.Process(command.replace("-", "_"), *later_wins(commands[command], *arguments[1:]), **keywords)


def run_here(command: click.Command, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command in this process, which spares the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
        cli.run(command, later_wins(command, *arguments))
    code = left.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess([str(command.name), *map(str, arguments)], code, out.getvalue(), err.getvalue())


def shards(subcommand: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `oscar-shards ...` in this process; it starts others, each of which takes seconds, if told how many."""
    several = any(option.name == "workers" for option in SHARDS.commands[subcommand].params)
    return run_here(SHARDS, subcommand, *(("--workers", 1) if several else ()), *arguments)


extract = partial(run_here, EXTRACT)
train = partial(run_here, TRAIN)


def error_line(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line on stderr of a command that failed; fails if there is more than progress around it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines, done.stdout
    assert sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[-1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rejects(folder: Path) -> list[dict[str, str]]:
    """The rejects of all shards of a folder."""
    return [row for p in sorted(folder.glob("*.rejects.parquet")) for row in pq.read_table(p).to_pylist()]


def until(reached: Callable[[], Any], process: "warm.Process | subprocess.Popen[str]", seconds: float = 120) -> Any:
    """Wait for `reached` to say something true, and return that; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found
