"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed last."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from oscar_common.errors import OperationError

TEMPORARY = ".tmp-"  # prefix of everything unfinished; a killed run's leftovers are overwritten by the next run


def temporary(path: Path) -> Path:
    """Return the name under which `path` is written until it is whole (same folder, so that the rename is atomic)."""
    return path.with_name(TEMPORARY + path.name)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only if the block ends without an exception."""
    unfinished = temporary(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # "no space left" alone does not say where
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` only if the block ends without an exception.

    A folder that already has the name is replaced.
    """
    unfinished = temporary(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.rglob("*"):
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        unfinished.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Hold `folder` (made if absent) for this process alone; nothing is left in it, and a killed owner frees it.

    Raises:
        OperationError: another live process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OperationError(
            f"{folder}: another process is writing there; wait for it, or give another {flag}"
        ) from None
    except OSError:
        pass  # some network file systems cannot lock a folder
    try:
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
