"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed last."""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from oscar_common.errors import OperationError, UsageError

LOGS = (".log", ".out", ".err")  # suffixes of what a scheduler writes beside a command's output
_MARGIN = 1 << 16  # bytes at both ends of a file among which its mark lies
TEMPORARY = ".tmp-"  # prefix of everything unfinished; a killed run's leftovers are overwritten by the next run

ASIDE = ".old-"  # prefix of a folder whose place another one takes


def temporary(path: Path) -> Path:
    """Return the name under which `path` is written until it is whole (same folder, so that the rename is atomic)."""
    return path.with_name(TEMPORARY + path.name)


def aside(path: Path) -> Path:
    """Return the name that `path` has while another folder takes its place."""
    return path.with_name(ASIDE + path.name)


@contextmanager
def unfinished(path: Path) -> Iterator[BinaryIO]:
    """Open `temporary(path)` for writing; it is on disk when the block ends, and gone if an exception ends it."""
    try:
        with temporary(path).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary(path).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary(path))):
            error.filename = str(path)  # the name that the user knows; "no space left" alone has none
        raise


def check_output_file(
    path: Path, flag: str, *, mark: bytes, overwrite: bool = False, makes_folder: bool = False
) -> None:
    """Refuse a file of output that cannot be written, or that would replace a file of the user's.

    Args:
        path: the file.
        flag: the option that names it.
        mark: bytes near the beginning or the end of all files that this command writes, by which it knows its own.
        overwrite: replace a file of any kind.
        makes_folder: whether the command makes the folder of the file.

    Raises:
        UsageError: in one line, before any work.
    """
    if path.is_dir():
        raise UsageError(f"{flag} {path}: a folder; give a file to write")
    if not makes_folder and not path.parent.exists():
        raise UsageError(f"{flag} {path}: no such folder: {path.parent}; make it, or give another {flag}")

    check_writable(path.parent, f"{flag} {path}", flag)
    if path.exists() and not overwrite and not _has_mark(path, mark):
        raise UsageError(
            f"{flag} {path}: the file exists and this command did not write it; give another {flag}, or --overwrite"
        )


def check_output_folder(folder: Path, flag: str, marks: Iterable[str]) -> None:
    """Refuse a folder of output that cannot be written, or that holds files of anything but this command.

    Args:
        folder: it need not exist.
        flag: the option that names it.
        marks: patterns of names; a folder that has one of them is the command's own. Hidden files and logs, which a
            scheduler may put there, are in no folder's way.

    Raises:
        UsageError: in one line, before any work.
    """
    check_writable(folder, f"{flag} {folder}", flag)
    if not folder.exists() or any(next(folder.glob(mark), None) for mark in marks):
        return

    strangers = (path.name for path in folder.iterdir() if not path.name.startswith(".") and path.suffix not in LOGS)
    if (stranger := next(strangers, None)) is not None:
        raise UsageError(
            f"{flag} {folder}: the folder holds {stranger!r}, which this command did not write; give a new folder, "
            "or an empty one"
        )


def check_writable(folder: Path, place: str, flag: str) -> None:
    """Refuse a folder in which nothing can be written, or made if it is not there yet; `place` begins the message.

    Raises:
        UsageError: in one line.
    """
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UsageError(f"{place}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        reason = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
        raise UsageError(f"{place}: cannot be written: {os.strerror(reason)}; give another {flag}")


def _has_mark(path: Path, mark: bytes) -> bool:
    """Whether the first or the last bytes of a file have a mark."""
    try:
        with path.open("rb") as file:
            head = file.read(_MARGIN)
            file.seek(max(0, path.stat().st_size - _MARGIN))
            return mark in head or mark in file.read()
    except OSError:
        return False


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only if the block ends without an exception."""
    with unfinished(path) as file:
        yield file

    try:
        rename(path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def rename(*paths: Path) -> None:
    """Give files that `unfinished` wrote their final names, in this order."""
    for path in paths:
        temporary(path).replace(path)
    _sync(paths[0].parent)  # the names, too, outlive a power cut, before anything that relies on them is written


def move(source: Path, path: Path) -> None:
    """Give a file, which must be on disk, the name `path`, in any folder of the same file system."""
    source.replace(path)
    _sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` only if the block ends without an exception.

    A folder that already has the name is moved aside before and deleted after. If the process is killed in between,
    `restore_folder` gives the name to the new one.
    """
    path = path.resolve() if path.is_symlink() else path
    unfinished = temporary(path)
    restore_folder(path)
    remove(unfinished)

    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for content in [*unfinished.rglob("*"), unfinished]:
            _sync(content)

        if path.exists():
            path.replace(aside(path))

        unfinished.replace(path)
    except BaseException:
        if aside(path).exists() and not path.exists():
            aside(path).replace(path)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise

    _sync(path.parent)  # the new name outlives a power cut before the old content goes
    with suppress(OSError):  # what is left goes the next time
        remove(aside(path))


def restore_folder(path: Path) -> None:
    """End what a process that was killed in `replacing_folder` had begun, so that `path` is whole: new, else old."""
    if not aside(path).exists():
        return
    if not path.exists():
        (temporary(path) if temporary(path).exists() else aside(path)).replace(path)
    remove(aside(path))


def restore_folders(parent: Path, prefix: str = "") -> None:
    """Do `restore_folder` for all folders in `parent` whose names begin with `prefix`."""
    for leftover in parent.glob(f"{ASIDE}{prefix}*"):
        restore_folder(parent / leftover.name.removeprefix(ASIDE))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def hold(path: Path, surely: bool = False) -> int | None:
    """Open `path` (made if absent) for this process alone and return its handle; None if another process holds it.

    A file system that has no locks is taken at its word that nobody else is there; with `surely` the answer is None.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            if surely:
                os.close(handle)
                return None
            return handle

        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle

        os.close(handle)  # its last owner removed it in between


def release(handle: int, path: Path) -> None:
    """Remove a file that `hold` opened, and let it go."""
    path.unlink(missing_ok=True)
    os.close(handle)


def cache_folder(given: str | Path | None) -> Path:
    """Return the folder for what can be made again: the one given, or this user's."""
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "oscar-pretrain")).expanduser()


def no_folder(path: Path) -> str:
    """Say what a path is that should be a folder and is not, as part of a message."""
    return "a file, not a folder" if path.exists() else "no such folder"


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file to disk, or the names in a folder, which not every file system can."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def digest(value: object) -> str:
    """Return a name for a value by what `repr` says of it."""
    return str(xxhash.xxh3_128_hexdigest(repr(value).encode()))
