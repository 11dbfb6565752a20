"""How much memory there is: of the machine, of a control group, and of an address space; and how a lack shows."""

import resource
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import psutil
import pytest
import torch
from support import error_line, run_here

from oscar_common import cli, memory
from oscar_common.memory import free_memory, lacks_memory

GB = 10**9


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def free_in(root: Path, line: str) -> list[int]:
    (root / "membership").write_text(f"{line}\n")
    return list(memory._free_in_groups(root / "membership", root))


def test_a_control_group_and_its_parents_limit_what_is_free(tmp_path: Path):
    stat = "anon 5\ninactive_file 2000000000\nactive_file 7"
    group(tmp_path / "job", memory__max=12 * GB, memory__current=5 * GB, memory__stat=stat)
    group(tmp_path / "job" / "step", memory__max="max", memory__current=GB, memory__stat=stat)
    assert free_in(tmp_path, "0::/job/step") == [9 * GB]  # a file in the cache is given up
    assert free_in(tmp_path, "0::/other") == []


def test_so_does_one_of_version_1(tmp_path: Path):
    stat = "cache 5\ntotal_inactive_file 1000000000"
    files = {"memory__usage_in_bytes": 3 * GB, "memory__stat": stat}
    group(tmp_path / "memory" / "job", memory__limit_in_bytes=8 * GB, **files)
    group(tmp_path / "memory" / "free", memory__limit_in_bytes=2**63 - 4096, **files)
    assert free_in(tmp_path, "4:memory:/job") == [6 * GB]
    assert free_in(tmp_path, "4:memory:/free") == free_in(tmp_path, "3:cpu,cpuacct:/job") == []


def test_the_limit_of_address_space_counts():
    code = (
        "import resource, psutil; vms = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (vms + 10**9, vms + 10**9))\n"
        "from oscar_common.memory import free_memory; print(free_memory(), free_memory(4))"
    )
    printed = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    assert all(0.9 * GB < int(free) <= GB for free in printed.split())


def test_processes_share_what_the_machine_has():
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert free_memory(4) < free_memory() / 3


def test_every_library_s_lack_of_memory_is_known():
    errors: list[Exception] = [OSError(12, "Cannot allocate memory"), RuntimeError("CUDA error: out of memory")]
    for take in (lambda: np.zeros(1 << 56), lambda: torch.zeros(1 << 58), lambda: torch.empty(1 << 50).zero_()):
        with pytest.raises((MemoryError, RuntimeError)) as raised:
            take()
        errors.append(raised.value)
    assert [error for error in errors if not lacks_memory(error)] == []
    assert not lacks_memory(RuntimeError("shapes differ"))
    assert not lacks_memory(OSError(2, "No such file"))


def test_a_command_says_so_in_one_line():
    @click.command()
    @click.option("--batch-size", type=int)
    def hungry(batch_size: int) -> None:
        torch.zeros(1 << 58)

    done = run_here(hungry)
    assert done.returncode == 1
    assert error_line(done).startswith("error: memory is lacking (")
    assert error_line(done).endswith("); give a smaller --batch-size")


@pytest.mark.parametrize(("continues", "what"), [(False, "starts over"), (True, "continues")])
def test_only_commands_that_continue_say_so_after_ctrl_c(
    capsys: pytest.CaptureFixture[str], continues: bool, what: str
):
    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        cli.run(interrupted, [], continues=continues)
    assert left.value.code == 130
    assert capsys.readouterr().err.strip() == f"error: interrupted; the same command again {what}"
