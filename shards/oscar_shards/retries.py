"""What goes wrong with a store, as errors of one line: those that another try may mend, and those it cannot."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from oscar_common.errors import OperationError, UsageError
from oscar_shards.url import shown

T = TypeVar("T")

TRIES = 5
DELAY = 0.5  # seconds before the second try; twice as many before each further one


class RemoteError(OperationError):
    """A try that failed: `cause` in one line, at `url`. Another try may help."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"{url}: {cause}")
        self.url, self.cause = url, cause

    def __reduce__(self) -> tuple[type["RemoteError"], tuple[str, str]]:
        return type(self), (self.url, self.cause)  # it has to come whole out of another process


class Gone(RemoteError):
    """There is no such file, folder or bucket; asking again does not help."""


class Denied(RemoteError):
    """It may not be read with these credentials, or without any; asking again does not help."""


def retried(attempt: Callable[[], T], what: str) -> T:
    """Return what `attempt` returns, tried again after each RemoteError that is not Gone or Denied, with a warning.

    Raises:
        RemoteError: the last one of several, at the URL `what`.
    """
    tries = 1
    while True:
        try:
            return attempt()
        except (Gone, Denied):
            raise
        except RemoteError as error:
            if tries == TRIES:
                raise RemoteError(what, f"{error.cause}; gave up after {TRIES} tries") from error

            delay = DELAY * 2 ** (tries - 1)
            again = f"trying again in {delay:g} s ({tries} of {TRIES})"
            print(f"warning: {what}: {error.cause}; {again}", file=sys.stderr, flush=True)
            time.sleep(delay)
            tries += 1


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn whatever a driver raises into a RemoteError."""
    try:
        yield
    except (OperationError, UsageError):
        raise
    except Exception as error:
        raise _explain(url, error) from error


def _explain(url: str, error: BaseException) -> RemoteError:
    if url.startswith("http") and isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # fsspec says so of all that goes wrong

    status, message = _status(error), _said(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        return Gone(url, "there is no such file or folder")

    missing = "Credentials" in type(error).__name__ or str(error).startswith("Forbidden")
    if status in (401, 403, 407) or isinstance(error, PermissionError) or missing:
        public = """; for a public bucket set FSSPEC_S3='{"anon": true}'""" if url.startswith("s3") else ""
        return Denied(
            url, f"access is denied ({message}); its driver's credentials are missing or do not allow it{public}"
        )

    return RemoteError(url, message)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that a driver's exception carries in one way or another."""
    codes: list[Any] = [getattr(error, "status" if hasattr(error, "status") else "code", None)]
    for response in (getattr(e, "response", None) for e in (error, error.__cause__)):
        if isinstance(response, dict):  # botocore
            codes.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        else:
            codes.append(getattr(response, "status_code", None))

    return next((int(s) for s in codes if str(s).isdigit()), None)


def _said(error: BaseException) -> str:
    """Return what went wrong as one short line."""
    status = _status(error)
    if status in set(HTTPStatus):
        return f"{status} {HTTPStatus(status).phrase}"

    kind = type(error).__name__
    line = (str(error).splitlines() or [""])[0]
    if "Timeout" in kind and type(error) is not TimeoutError:
        return f"no answer in time ({kind})"

    line = line if line and isinstance(error, OSError) else f"{kind}: {line}".removesuffix(": ")
    return shown(line[:200])
