"""URLs of folders: which are read, which name a local path, and which are refused."""

import re
from pathlib import Path
from urllib.parse import unquote

from oscar_common.errors import UsageError, nearest

HTTP = ("http", "https")
LOCAL = ("file", "local")
INSTALLED = {"s3", "s3a", "gs", "gcs", *HTTP}  # what the extra `remote` brings the drivers of
# Protocols that read files of a store. All else is refused, because fsspec also has those that wrap others or unpack
# (simplecache, zip, dir), read what a file tells them to (reference), read this machine (git, data) or run code there
# (dask, jupyter), and because a driver that nobody has looked at may do any of these.
STORES = INSTALLED | {
    *("abfs", "abfss", "az", "adl", "box", "dropbox", "ftp", "gdrive", "hdfs", "hf", "memory", "oci", "oss", "sftp"),
    *("smb", "ssh", "tos", "webdav", "webhdfs"),
}
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)\s*:(?=(//|:)?)")


def is_url(text: str) -> bool:
    """Whether `text` has the form of a URL, file:// and pipe: included; a folder with such a name is ./NAME."""
    match = _SCHEME.match(text)
    return match is not None and (match[2] is not None or match[1].lower() in STORES | {"pipe", *LOCAL})


def local_path(text: str) -> Path | None:
    """Return the path that `text` names, itself or as a URL (file:///a%20b, local:///a); None if it is elsewhere.

    Raises:
        UsageError: a file:// URL of another machine.
    """
    if not is_url(text):
        return Path(text)

    scheme, _, rest = text.strip().partition(":")
    if scheme.lower() not in LOCAL or "::" in text:
        return None

    path = unquote(rest.removeprefix("//").removeprefix("localhost"))
    if not path.startswith("/"):
        raise UsageError(f"{text}: a URL of local files has three slashes: file:///folder")

    return Path(path)


def folder_url(url: str, flag: str) -> tuple[str, str]:
    """Return the protocol of a folder's URL, and the URL with it in small letters.

    Raises:
        UsageError: it is not read, or not the URL of a folder.
    """
    url = url.strip()
    match = _SCHEME.match(url)
    protocol, rest = (match[1].lower(), url[match.end() :]) if match else ("", url)
    where = f"{flag} {shown(url)}"
    if protocol == "pipe":
        raise UsageError(f"{where}: pipe: runs a shell command, and shards are data; give the URL of their folder")
    if "::" in url:
        raise UsageError(f"{where}: chained URLs (::) are refused; give the URL of the folder itself")
    if protocol not in STORES:
        raise UsageError(f"{where}: {protocol}:// is not read{nearest(protocol, STORES)}")
    if not rest.startswith("//") or not rest.strip("/") or not url.isprintable():
        raise UsageError(f"{where}: is no URL of a folder; write {protocol}://...")
    if rest.endswith((".tar", ".tar/")) or re.search(r"[{}*]", rest):
        raise UsageError(f"{where}: give the URL of the folder of shards; all in it are read")
    if ".." in unquote(rest).split("/"):
        raise UsageError(f"{where}: '..' is refused; write out the folder")
    if protocol in HTTP and re.search("[?#]", rest):
        raise UsageError(f"{where}: a folder's URL has no ? and #")

    return protocol, f"{protocol}:{rest}"


def shown(text: str) -> str:
    """Return a text as messages show it: in one line, without what URLs in it may have before their host (a secret)."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"(https?://|//(?=[^/@\s]*:))[^/@\s]*@", r"\1***@", line)
