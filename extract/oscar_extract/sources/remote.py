"""Tars of images behind a URL: which there are, and each fetched into the cache for as long as it is read."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from braceexpand import braceexpand

from oscar_common.errors import OperationError, UsageError, reason
from oscar_common.files import cache_folder
from oscar_common.settings import Extract
from oscar_shards.cache import Held, ShardCache
from oscar_shards.remote import RemoteFolder, Stamp, open_remote
from oscar_shards.retries import Gone, retried
from oscar_shards.url import HTTP, folder_url, shown

THREADS = 16  # they wait for the server
MANY = 1_000_000  # tars in one list


@dataclass(frozen=True)
class Cache:
    """Where fetched tars lie, and the most bytes of them."""

    folder: Path
    limit: int


@dataclass(frozen=True)
class RemoteTars:
    """The tars of a folder behind a URL, and the tables that img2dataset wrote beside them.

    url: of the folder, without a slash at the end; it may hold a password, so it is not for messages.
    files: what the store says of each, by name.
    """

    url: str = field(repr=False)
    files: dict[str, Stamp]
    cache: Cache = field(repr=False)

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def path(self) -> Path:
        """A path that stands for the folder where paths are compared; nothing lies there."""
        return Path(str(self))


@dataclass(frozen=True)
class RemoteFile:
    """A file of `tars`."""

    tars: RemoteTars
    name: str

    @property
    def beside(self) -> "RemoteFile | None":
        """The table beside a tar, if there is one."""
        table = str(Path(self.name).with_suffix(".parquet"))
        return RemoteFile(self.tars, table) if table in self.tars.files else None

    def hold(self) -> Held:
        """Return the whole file, fetched if the cache does not have it; the caller closes it.

        Raises:
            OperationError: it is gone, has changed since it was listed, or cannot be fetched or written.
        """
        stamp, url = self.tars.files[self.name], self.tars.url
        assert stamp.size is not None
        digest = hashlib.sha256(f"{url}/{self.name} {stamp}".encode()).hexdigest()[:32]

        def fetch(target: Path) -> None:
            folder = _folder(url)
            if folder.stamp(self.name) != stamp:
                raise OperationError(
                    f"{folder.at(self.name)}: it has changed since the plan was made; give another --out, or "
                    "--overwrite"
                )

            retried(lambda: folder.download(self.name, target, stamp.size or 0), folder.at(self.name))

        try:
            return _cache(self.tars.cache).hold(f"{digest}-{self.name}", stamp.size, fetch)
        except OSError as error:  # the disk's fault, which is never the image's
            raise OperationError(f"--cache {self.tars.cache.folder}: {reason(error)}") from None


Root = Path | RemoteTars
File = Path | RemoteFile


@contextmanager
def opened(file: File) -> Iterator[str]:
    """Yield a path at which a file can be read; one behind a URL stays in the cache meanwhile.

    Raises:
        OperationError: see `RemoteFile.hold`.
    """
    if isinstance(file, Path):
        yield str(file)
        return
    with file.hold() as held:
        yield f"/dev/fd/{held.fd}"


def cache_of(settings: Extract) -> Cache:
    """Return the cache that settings name."""
    return Cache(cache_folder(settings.cache).absolute(), round(settings.cache_size * 1e9))


def find_tars(text: str, cache: Cache, flag: str) -> RemoteTars:
    """Return the tars that a URL names: of a folder, one tar, or several as {00000..00331}.tar.

    Raises:
        UsageError: it is no such URL, names no tar, or the server does not list folders.
        OperationError: the server does not answer, after several tries.
    """
    text = text.strip()
    url, names = _split(text, flag)
    protocol, url = folder_url(url, flag)
    url = url.rstrip("/")
    open_remote(url, flag)
    folder = _folder(url)
    files = _stamps(folder, names, flag) if names else _listed(folder, protocol, flag)

    return RemoteTars(url, files, cache)


def _split(text: str, flag: str) -> tuple[str, list[str]]:
    """Return the URL of a folder, and the names of the tars in it that are asked for; none for all."""
    url, _, last = text.partition("{")[0].rpartition("/")
    last = text[len(url) + 1 :]
    if not last.endswith(".tar"):
        return text, []
    if "/" in last:
        raise UsageError(f"{flag} {shown(text)}: braces stand in the file's name alone: {{00000..00331}}.tar")

    try:
        names = [name for name, _ in zip(braceexpand(last), range(MANY), strict=False)]
    except ValueError:
        raise UsageError(f"{flag} {shown(text)}: a brace is missing; write {{00000..00331}}.tar") from None

    return url, sorted(set(names))


def _listed(folder: RemoteFolder, protocol: str, flag: str) -> dict[str, Stamp]:
    hint = "; name the tars with braces, like /{00000..00331}.tar" if protocol in HTTP else ""
    try:
        entries = folder.listing()
    except Gone as error:
        raise UsageError(f"{flag} {folder.url}: it cannot be listed ({error.cause}){hint}") from None

    files = {name: stamp for name, stamp in entries.items() if name.endswith((".tar", ".parquet"))}
    if not any(name.endswith(".tar") for name in files):
        raise UsageError(f"{flag} {folder.url}: no .tar is listed there, and images behind a URL lie in tars{hint}")

    unknown = [name for name, stamp in files.items() if stamp.size is None or not stamp.version]
    return files | _stamps(folder, unknown, flag)


def _stamps(folder: RemoteFolder, names: list[str], flag: str) -> dict[str, Stamp]:
    """Ask for what is known of files, and of the tables beside tars."""
    tables = [str(Path(name).with_suffix(".parquet")) for name in names if name.endswith(".tar")]
    unique_names = list(dict.fromkeys([*names, *tables]))

    def ask(name: str) -> Stamp | None:
        try:
            stamp = folder.stamp(name)
        except Gone as error:
            if name not in names:
                return None
            raise UsageError(f"{flag} {folder.at(name)}: {error.cause}") from None

        if stamp.size is None:
            raise OperationError(f"{folder.at(name)}: the server does not say how long it is")

        return stamp

    with ThreadPoolExecutor(THREADS) as pool:
        stamps = list(pool.map(ask, unique_names))

    return {name: stamp for name, stamp in sorted(zip(unique_names, stamps, strict=True)) if stamp is not None}


@lru_cache(maxsize=16)
def _folder(url: str) -> RemoteFolder:
    return open_remote(url, "--images")


@lru_cache(maxsize=4)
def _cache(cache: Cache) -> ShardCache:
    return ShardCache(cache.folder, cache.limit)
