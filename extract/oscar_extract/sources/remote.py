"""Tars of images behind a URL: named as paths like all others, and fetched into the cache when they are opened.

A root that is a URL is kept as a `Path`, which writes one slash where the URL has two (`https:/host/cc3`); `url_of`
puts it back. No local path looks so: a folder that is called `https:` is refused where it is given.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from braceexpand import braceexpand
from xxhash import xxh3_64_hexdigest

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import cache_folder
from oscar_common.settings import Extract
from oscar_shards.cache import ShardCache
from oscar_shards.remote import RemoteFolder, Stamp, open_remote
from oscar_shards.retries import retried
from oscar_shards.url import STORES, shown

FLAG = "--images"
MOST = 1_000_000  # tars that braces may stand for
ASKERS = 16  # threads that ask a server for the sizes of tars
_URL = re.compile(rf"({'|'.join(sorted(STORES))}):/(?=[^/])")


@dataclass(frozen=True, kw_only=True)
class RemoteTar:
    """A tar in a folder behind a URL, and what the server says of it."""

    name: str
    stamp: Stamp


def url_of(path: str | os.PathLike[str]) -> str | None:
    """Return the URL that a path stands for; None if it is a local one."""
    found = _URL.match(str(path))
    return f"{found[1]}://{str(path)[found.end() :]}" if found else None


def name_of(path: Path) -> str:
    """Return a root as people know it: without the password that a URL may have."""
    url = url_of(path)
    return str(path) if url is None else shown(url)


def tars_of(given: str) -> tuple[Path, tuple[str, ...]]:
    """Return the root of `--images URL`, and the tars that it names; none of a folder, all of whose tars are meant.

    Raises:
        UsageError: it is not a URL of tars of one folder, nor of a folder.
    """
    url = given.strip()
    try:
        urls = [expanded for expanded, _ in zip(braceexpand(url), range(MOST), strict=False)]
    except ValueError as error:
        raise UsageError(f"{FLAG} {shown(url)}: its braces cannot be read: {error}") from None
    if not any(one.endswith(".tar") for one in urls):
        if len(urls) > 1 or re.search(r"\.(jsonl|csv|tsv|parquet)$", url):
            raise UsageError(
                f"{FLAG} {shown(url)}: of a URL only tars are read; give a folder of tars, or "
                "URL/{00000..00331}.tar; fetch a list of images, and give the file"
            )
        return _root(url), ()
    folders = {one.rpartition("/")[0] for one in urls}
    if len(folders) > 1 or not all(one.endswith(".tar") for one in urls):
        raise UsageError(f"{FLAG} {shown(url)}: give tars of one folder")
    return _root(folders.pop()), tuple(one.rpartition("/")[2] for one in urls)


def _root(url: str) -> Path:
    """Return a folder's URL as a path; the scheme in small letters."""
    open_remote(url, FLAG)
    scheme, _, rest = url.partition("://")
    return Path(f"{scheme.lower()}://{rest}")


def list_tars(root: Path, names: tuple[str, ...]) -> list[RemoteTar]:
    """Return the tars of a folder behind a URL, those `names` or else all, with what the server says of each.

    Raises:
        UsageError: there is none.
        RemoteError: the server does not answer.
    """
    folder = _folder(str(root.parent / root.name))
    listed = {} if names else folder.listing()
    names = names or tuple(name for name in listed if name.endswith(".tar"))
    if not names:
        raise UsageError(
            f"{FLAG} {folder.url}: no tar is listed there; of a server without listings, or with tars elsewhere, name "
            f"them: {folder.url}/{{00000..00331}}.tar"
        )

    def ask(name: str) -> RemoteTar:
        stamp = listed.get(name)
        return RemoteTar(name=name, stamp=_sized(folder, name) if stamp is None or stamp.size is None else stamp)

    with ThreadPoolExecutor(ASKERS) as pool:
        return list(pool.map(ask, names))


def _sized(folder: RemoteFolder, name: str) -> Stamp:
    stamp = folder.stamp(name)
    if stamp.size is None:
        raise OperationError(f"{folder.at(name)}: the server does not say how long it is; fetch it, and give the file")
    return stamp


@lru_cache
def _folder(path: str) -> RemoteFolder:
    url = url_of(path)
    assert url is not None
    return open_remote(url, FLAG)


@cache
def _stamp(path: str, name: str) -> Stamp:
    return _sized(_folder(path), name)


@dataclass(frozen=True)
class Cache:
    """Where fetched tars are kept, and how many bytes of them."""

    folder: Path
    limit: int


_cache = Cache(cache_folder(None), 100 * 10**9)


def cache_in(where: Cache) -> None:
    """Have this process keep fetched tars there, and ask servers anew."""
    global _cache
    _cache = where
    _stamp.cache_clear()


def cache_in_use() -> Cache:
    """Return where this process keeps them."""
    return _cache


def cache_of(settings: Extract) -> Cache:
    """Return the cache that settings name."""
    return Cache(cache_folder(settings.cache), round(settings.cache_size * 1e9))


@lru_cache
def _open_cache(where: Cache) -> ShardCache:
    return ShardCache(where.folder, where.limit)


@contextmanager
def here(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a local path to read a file at, while the block lasts: itself, or the copy of a tar behind a URL.

    Raises:
        RemoteError, OperationError: it cannot be fetched.
    """
    path = os.fspath(path)
    if url_of(path) is None:
        yield Path(path)
        return
    place, name = str(Path(path).parent), Path(path).name
    folder, stamp = _folder(place), _stamp(place, name)
    assert stamp.size is not None
    size = stamp.size

    def fetch(target: Path) -> None:
        retried(lambda: folder.download(name, target, size), folder.at(name))

    kept_as = f"{xxh3_64_hexdigest(f'{folder.at(name)} {size} {stamp.version}'.encode())}-{name}"
    with _open_cache(_cache).hold(kept_as, size, fetch) as held:
        yield Path(str(held.file.name))
