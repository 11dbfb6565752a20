"""How a command can end early: bad input (exit 2), trouble while working (exit 1), a signal (128 and its number)."""

import difflib
import signal
from collections.abc import Iterable

import click


class UsageError(click.ClickException):
    """Bad input. The message names the value, what is allowed, and the flag or key to change; exit code 2."""

    exit_code = 2


class OperationError(click.ClickException):
    """Good input, but the work failed (disk full, too many rejects, NaN loss); exit code 1."""

    exit_code = 1


class Stopped(BaseException):
    """A signal ended the work; the exit code is the one that a shell gives a process that the signal killed.

    No Exception, so that nothing that deals with errors takes it for one.
    """

    def __init__(self, message: str, cause: signal.Signals) -> None:
        super().__init__(f"stopped by {cause.name} {message}")
        self.exit_code = 128 + cause


def nearest(value: str, known: Iterable[str], others: int = 0) -> str:
    """Return `" (did you mean 'x'? known: x, y)"`, the tail of a message about an unknown name.

    `others` says how many more are known that are not listed.
    """
    known = sorted(known)
    close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {others:,} more" if others > 0 else ""
    return f" ({guess}known: {', '.join(known) or 'none'}{more})"


def reason(error: BaseException) -> str:
    """Return what a library's exception says, its first line, as a short one that is never empty."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = shorten(next((line for line in str(error).splitlines() if line.strip()), ""))
    if not text or isinstance(error, LookupError | AssertionError | MemoryError):  # these hold a key, or nothing
        return f"{type(error).__name__}: {text}".removesuffix(": ")
    return text


def shorten(text: str, length: int = 200) -> str:
    """Return a text as part of a message: in one line, and cut where it is too long."""
    line = " ".join(text[: 2 * length].split())
    return line if len(line) <= length and len(text) <= 2 * length else f"{line[:length]}..."
