"""A folder of shards behind a URL: listed, and its files fetched with retries, through fsspec's drivers.

What a server says is not believed: no name that could leave a folder, no byte beyond the size that was asked for, no
silence for ever. A URL names data only: what fsspec can run, unpack or wrap is refused.
"""

import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.registry import known_implementations

from oscar_common.errors import OperationError, UsageError
from oscar_shards import retries
from oscar_shards.retries import Gone, RemoteError, explained, retried
from oscar_shards.url import INSTALLED, folder_url, shown

T = TypeVar("T")

TIMEOUT = 60.0  # seconds of silence from a server after which a try has failed
SLOWEST = 16 << 10  # bytes a second: a server that trickles less has failed, too
PIECE = 8 << 20  # bytes fetched and written at once

# What tells that a file has changed, best first; each driver has its own name for it
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "Digest", "xet_hash", "blob_id", "oid", "crc32c"),
    *("generation", "VersionId", "LastModified", "Last-Modified", "last_modified", "mtime", "modified", "updated"),
    *("created",),
)


class Stamp(NamedTuple):
    """What a store says of a file: its bytes, and something that changes with its content ("" if it says nothing)."""

    size: int | None
    version: str


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that `open_remote` opened; many threads may use it at once.

    url: as messages show it, without a password and a slash at the end.
    fs: fsspec's driver.
    path: the folder, as the driver calls it.
    """

    url: str
    fs: Any
    path: str

    def listing(self) -> dict[str, Stamp]:
        """Return the files directly in the folder by name; those with unsafe names are left out.

        A web server's listing is a page with links, which gives names alone, if there is one at all.

        Raises:
            RemoteError: it cannot be listed, after several tries.
        """
        path = f"{self.path}/" if self._is_http else self.path

        def attempt() -> dict[str, Stamp]:
            with explained(self.url):
                self.fs.invalidate_cache(self.path)
                entries = self._call("ls", path, detail=True)
            files = ((self._name(entry["name"]), entry) for entry in entries if entry["type"] == "file")
            return {name: _stamp(entry) for name, entry in sorted(files, key=lambda f: f[0]) if _is_safe(name)}

        return retried(attempt, self.url)

    def stamp(self, name: str) -> Stamp:
        """Return what the store says of one file.

        Raises:
            RemoteError: it is not there (Gone), or does not answer, after several tries.
        """
        return retried(lambda: self._stamp(name), self.at(name))

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small file.

        Raises:
            RemoteError: it is not there (Gone), or cannot be read, after several tries.
            OperationError: it has more than `limit` bytes; hardly more are read.
        """
        return retried(lambda: self._read(name, limit), self.at(name))

    def parsed(self, name: str, limit: int, parse: Callable[[bytes], T]) -> T:
        """Return what `parse` makes of a small file. What it refuses is read again: the way may have damaged it.

        Raises:
            RemoteError, OperationError: see `read`.
            ValueError, UsageError: `parse` refused it, and it came a second time as it was.
        """
        before, tries = None, 0
        while True:
            content, tries = self.read(name, limit), tries + 1
            try:
                return parse(content)
            except (ValueError, UsageError):
                if content == before or tries == retries.TRIES:
                    raise

            print(f"warning: {self.at(name)}: it is damaged; reading it again", file=sys.stderr, flush=True)
            before = content

    def download(self, name: str, target: Path, size: int) -> None:
        """Fetch a file of `size` bytes, in one try: see `retried`.

        Args:
            name: of the file.
            target: written from its beginning; if it is there it keeps its length. After an error it may hold anything.
            size: bytes that there have to be; not one more is written.

        Raises:
            RemoteError: it is not there (Gone), or not of this size, or cannot be read.
            OSError: `target` cannot be written.
        """
        count = 0
        with target.open("r+b" if target.exists() else "wb") as file, closing(self._pieces(name, size)) as pieces:
            for piece in pieces:
                count += len(piece)
                if count > size:
                    raise RemoteError(self.at(name), f"it has more than the {size:,} bytes expected")
                file.write(piece)

        if count < size:
            raise RemoteError(self.at(name), f"{count:,} bytes came instead of {size:,}")

    def at(self, name: str) -> str:
        """Return the URL of a file, as messages show it."""
        return f"{self.url}/{name}"

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    @property
    def _has_ranges(self) -> bool:
        """Whether any part can be asked for: every object store can, not every web server."""
        return isinstance(self.fs, AsyncFileSystem) and not self._is_http

    def _path(self, name: str) -> str:
        return f"{self.path}/{quote(name) if self._is_http else name}"

    def _name(self, path: str) -> str:
        """Return the name of a listed file; one with a slash if it lies elsewhere."""
        name = path.strip("/").removeprefix(self.path.strip("/") + "/")
        if not self._is_http:
            return name
        return "/" if "?" in name or "#" in name else unquote(name)

    def _call(self, method: str, *args: Any, size: int = 0, **options: Any) -> Any:
        """Call the driver, and if it can be interrupted, no longer than `size` bytes may take."""
        if isinstance(self.fs, AsyncFileSystem):
            return sync(self.fs.loop, getattr(self.fs, f"_{method}"), *args, timeout=_seconds(size), **options)
        return getattr(self.fs, method)(*args, **options)

    def _stamp(self, name: str) -> Stamp:
        with explained(self.at(name)):
            self.fs.invalidate_cache(self.path)
            info = self._call("info", self._path(name))
        if info["type"] != "file":
            raise Gone(self.at(name), "it is a folder, not a file")
        return _stamp(info)

    def _read(self, name: str, limit: int) -> bytes:
        expected = self._stamp(name).size if self._has_ranges else None
        content = bytearray()
        with closing(self._pieces(name, min(limit, limit if expected is None else expected))) as pieces:
            for piece in pieces:
                content += piece
                if len(content) > limit:
                    raise OperationError(f"{self.at(name)}: it has more than {limit:,} bytes, the most that are read")

        if expected is not None and len(content) != expected:
            raise RemoteError(self.at(name), f"{len(content):,} bytes came instead of {expected:,}")

        return bytes(content)

    def _pieces(self, name: str, size: int) -> Generator[bytes, None, None]:
        """Yield the bytes of a file, some of those after `size`, too, if there are more."""
        with explained(self.at(name)):
            yield from (
                self._ranges(self._path(name), size) if self._has_ranges else self._stream(self._path(name), size)
            )

    def _ranges(self, path: str, size: int) -> Iterator[bytes]:
        for begin in range(0, size, PIECE):
            end = begin + PIECE if begin + PIECE < size else size + 1
            piece = self._call("cat_file", path, start=begin, end=end, size=end - begin)
            yield piece
            if len(piece) < size - begin and len(piece) < PIECE:
                return  # the file is shorter than that

    def _stream(self, path: str, size: int) -> Iterator[bytes]:
        options = {"block_size": 0} if self._is_http or self.url.startswith("hf:") else {}  # one request for it all
        if self._is_http:
            options["size"] = size  # else it asks before it reads

        began, count = time.monotonic(), 0
        with self.fs.open(path, "rb", **options) as file:
            while piece := file.read(PIECE):
                yield piece
                count += len(piece)
                if time.monotonic() - began > _seconds(count):
                    raise TimeoutError(f"it sends fewer than {SLOWEST:,} bytes a second")


def open_remote(url: str, flag: str = "--shards") -> RemoteFolder:
    """Return the folder behind a URL; that it is there is seen when it is read.

    What the user has set for fsspec (its configuration files, FSSPEC_...) and for the driver (AWS_...) holds.

    Raises:
        UsageError: it is no URL of a folder in a store that is known, or the store's driver is not installed.
    """
    protocol, url = folder_url(url, flag)
    name = shown(url).rstrip("/")
    try:
        driver = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):
        package = '"oscar-pretrain[remote]"' if protocol in INSTALLED else ""
        how = f"run: pip install {package}" if package else known_implementations.get(protocol, {}).get("err", "")
        raise UsageError(f"{flag} {name}: the driver of {protocol}:// is not installed; {how}") from None

    with explained(name):
        fs, path = fsspec.url_to_fs(url, **_options(driver))
        if hasattr(fs, "retries"):
            fs.retries = 1  # `retried` is enough, and warns
        if hasattr(fs, "set_session"):
            sync(fs.loop, fs.set_session)  # several threads would each make one

    return RemoteFolder(name, fs, path.rstrip("/"))


def _options(driver: Any) -> dict[str, Any]:
    """Return what a driver is to be made with: fresh answers, timeouts, no retries of its own; the user's first."""
    protocols = (driver.protocol,) if isinstance(driver.protocol, str) else driver.protocol
    ours: dict[str, dict[str, Any]] = {}
    if "s3" in protocols:
        once = {"total_max_attempts": 1}
        ours = {"config_kwargs": {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": once}}
    elif "http" in protocols:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        ours = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # as other programs use proxies and .netrc

    users = {key: value for protocol in protocols for key, value in fsspec.config.conf.get(protocol, {}).items()}
    merged = {key: {**ours[key], **users.get(key, {})} for key in ours}
    return {**merged, "skip_instance_cache": True, "use_listings_cache": False}


def _seconds(size: int) -> float:
    return TIMEOUT + size / SLOWEST


def _is_safe(name: str) -> bool:
    return name.isprintable() and name[:1] not in ("", ".") and not re.search(r"[/\\]", name)


def _stamp(info: dict[str, Any]) -> Stamp:
    changed = next((info[key] for key in _VERSIONS if info.get(key)), "")
    version = changed.timestamp() if isinstance(changed, datetime) else changed  # listings may have it as a number
    return Stamp(info.get("size"), str(version).strip('"'))
