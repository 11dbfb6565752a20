"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed last."""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from oscar_common.errors import OperationError, UsageError

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
        with suppress(OSError):  # not every file system can
            _sync(path.parent)  # the name, too, outlives a power cut, before anything that relies on it is written
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
    """Hold `folder` (made if absent) for this process alone; nothing stays in it, and a killed owner frees it.

    Raises:
        OperationError: another live process holds it.
        UsageError: nothing can be written there.
    """
    path, made = folder / ".lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = hold(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"{flag} {folder}: cannot be written: {error.strerror}; give another {flag}") from None
    if handle is None:
        raise OperationError(f"{folder}: another process is writing there; wait for it, or give another {flag}")
    try:
        yield
    finally:
        release(handle, path)
        if made and sys.exc_info()[0] is not None:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written there


def hold(path: Path) -> int | None:
    """Open `path` (made if absent) for this process alone and return its handle; None if another process holds it.

    A file system that has no locks is taken at its word that nobody else is there.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its last owner removed it in between


def release(handle: int, path: Path) -> None:
    """Remove a file that `hold` opened, and let it go."""
    path.unlink(missing_ok=True)
    os.close(handle)


def cache_folder(given: str | None) -> Path:
    """Return the folder for what can be made again: the one given, or this user's."""
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "oscar-pretrain")).expanduser()


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
