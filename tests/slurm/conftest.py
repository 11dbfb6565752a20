"""A real SLURM of three nodes on this machine."""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
NODES = 3


def tool(name: str) -> ModuleType:
    """A script under tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def slurm() -> Iterator[ModuleType]:
    """The cluster, up; its folder is short, as names of sockets must be, and goes if nothing failed."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        pytest.skip("SLURM is not installed: make slurm")
    local_slurm = tool("local_slurm")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    local_slurm.up(folder, NODES)
    yield local_slurm
    local_slurm.down(folder)
    shutil.rmtree(folder, ignore_errors=True)
