"""The files of a job: every image under its folders and in the tars there, found once, before anything reads them."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.errors import UsageError, reason
from oscar_common.tables import Ints, array, columns, find, last, reading, stems, table, without_extension
from oscar_common.text_files import NotText, decode
from oscar_extract.images import EXTENSIONS
from oscar_extract.sources.remote import File, RemoteFile, RemoteTars, opened
from oscar_extract.sources.tables import FILES
from oscar_shards.tar import Member, TarFault, Window, members

ANNOTATIONS = frozenset({".json", ".jsonl", ".tsv", ".csv", ".txt", ".token", ".parquet"})
WINDOW = 4096  # bytes of a tar that are read at once: a header, and often the small files after it
SIDECAR_BYTES = 1 << 20  # a caption or the metadata of one image is smaller
FAMILIES = {  # folder names that tell the image sets of a shared root apart
    "coco": r"(?i)(^|/)((ms)?coco([-_]?20(14|15|17)|[-_]?images)?|(train|val|test|unlabeled)20(14|15|17))(/|$)",
    "vg": r"(?i)(^|/)(vg_100k(_2)?|(vg|gqa|visual[-_]?genome)([-_]?images)?)(/|$)",
    "flickr30k": r"(?i)(^|/)flick[er]r[-_]?(8|30)k([-_]?images|_dataset)?(/|$)",
    "sbu": r"(?i)(^|/)sbu[^/]*(/|$)",
    "cc": r"(?i)(^|/)(cc(3m|12m)?([-_][^/]*)?|[^/]*gcc[^/]*|conceptual[^/]*)(/|$)",
}
Bools = npt.NDArray[np.bool_]
# Rows of img2dataset's tables: what it tried to download. `image` is the folder of its shard, a slash, and the key.
DOWNLOADS = pa.schema(
    [("root", pa.int32()), *((name, pa.string()) for name in ("image", "url", "text", "status", "message"))]
)


DOWNLOADED = {"key", "url", "status", "caption"}


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What is wrong with a tar. lost: about how many images it has, or had, that cannot be used."""

    tar: str
    fault: str
    lost: int


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a tar holds. files: its images that can be used, of the schema FILES. fault: what is wrong with it, or "".

    read, unread: bytes before the damage and behind it. images: how many lie before it, those that cannot be used too.
    listed: how many the table beside it lists, 0 without one.
    """

    files: pa.Table
    fault: str
    read: int
    unread: int
    images: int
    listed: int


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """`files`: a table of the schema FILES. `annotations`: other files that may say something of them.

    `dead`: what img2dataset's tables say was not to be had, of the schema DOWNLOADS. `others`: how many files are
    neither.
    """

    roots: list[Path]
    files: pa.Table
    annotations: list[Path]
    dead: pa.Table
    damaged: list[Damage]
    others: int

    @property
    def damage(self) -> str:
        """Damaged tars, as the end of a message about images that are not there, or ""."""
        more = f", and {len(self.damaged) - 1} more tars are damaged" if self.damaged[1:] else ""
        return f"; {self.damaged[0].tar}: {self.damaged[0].fault}{more}" if self.damaged else ""

    @cached_property
    def paths(self) -> pa.Array:
        """The column `path`, string [F]."""
        return array(self.files["path"])

    @cached_property
    def names(self) -> pa.Array:
        """The last part of every path, string [F]."""
        return last(self.paths)

    @cached_property
    def stems(self) -> pa.Array:
        """The last part of every path without its extension, string [F]."""
        return stems(self.paths)

    @cached_property
    def family(self) -> npt.NDArray[np.str_]:
        """The image set that a file's folders under its root speak of, or "", [F]."""
        folder = pc.replace_substring_regex(self.paths, r"[^/]*$", "").dictionary_encode()
        families = np.full(len(folder.dictionary), "", dtype="U9")
        for name, pattern in FAMILIES.items():
            families[pc.match_substring_regex(folder.dictionary, pattern).to_numpy(zero_copy_only=False)] = name
        inner: npt.NDArray[np.str_] = families[folder.indices.to_numpy()]
        return inner

    @cached_property
    def outer_family(self) -> npt.NDArray[np.str_]:
        """The same, and where those say nothing, what the root's own name speaks of."""
        outer = [next((n for n, p in FAMILIES.items() if re.search(p, r.resolve().name)), "") for r in self.roots]
        outer_families = np.array(outer or [""], dtype="U9")[array(self.files["root"]).to_numpy()]
        return np.where(self.family == "", outer_families, self.family)

    def under(self, folder: Path) -> Bools:
        """Which files lie under a folder of the job, bool [F]."""
        return lie_under(self.roots, folder, self.files["root"], self.paths)

    def locate(self, wanted: pa.Array, names: pa.Array, family: str, root: Path) -> Ints:
        """Return the row in `files` of each wanted name, or -1; `names` are the files' names to compare with.

        The dataset's own folder comes first, and never a file from a folder that speaks of another image set.
        """
        rows = np.full(len(wanted), -1, np.int64)
        rows_of_root = self.under(root)
        for mask in (
            rows_of_root & (self.family == family),
            rows_of_root & (self.family == ""),
            ~rows_of_root & (self.outer_family == family),
            ~rows_of_root & (self.outer_family == ""),
        ):
            places = np.flatnonzero(mask)
            if len(places):
                matched_rows = find(wanted, names.take(pa.array(places)))
                rows = np.where(rows < 0, np.where(matched_rows < 0, -1, places[matched_rows]), rows)

        return rows


def lie_under(roots: list[Path], folder: Path, root: pa.ChunkedArray, paths: pa.Array) -> Bools:
    """Return which paths, each relative to a root, lie under a folder, bool [N]; roots may lie in each other."""
    result = np.zeros(len(paths), bool)
    for number, place in enumerate(roots):
        of_root = array(root).to_numpy() == number
        if place.is_relative_to(folder):
            result |= of_root
        elif folder.is_relative_to(place):
            inner = pc.starts_with(paths, f"{folder.relative_to(place).as_posix()}/")
            result |= of_root & inner.to_numpy(zero_copy_only=False)

    return result


@dataclass(kw_only=True)
class Listing:
    """What lies in the folders of a job, before anything is opened. `files`: loose images, of the schema FILES."""

    roots: list[Path]
    files: pa.Table = field(default_factory=FILES.empty_table)
    annotations: list[Path] = field(default_factory=list)
    tars: list[tuple[int, File, str]] = field(default_factory=list)  # root, tar, and its path relative to the root
    tables: list[tuple[int, File]] = field(default_factory=list)  # annotations that a downloader may have written
    others: int = 0


def list_files(
    roots: list[Path], flag: str, skip: Path | None = None, remotes: dict[Path, RemoteTars] | None = None
) -> Listing:
    """List the images under `roots`, known extensions or none at all, no hidden files; and the tars.

    A file that is reached twice through symbolic links counts once. `skip` is a folder to leave alone.
    `remotes` are the tars behind those roots that only stand for a URL.

    Raises:
        UsageError: no such folder.
    """
    listing = Listing(roots=roots)
    seen: set[str] = {os.path.realpath(skip)} if skip else set()
    walked = []

    for number, root in enumerate(roots):
        if remotes and root in remotes:
            _add_remote(number, remotes[root], listing)
        else:
            walked.append(_rows(number, root, flag, listing, seen))

    rows = chain.from_iterable(walked)
    listing.files = table(FILES, rows)
    return listing


def _add_remote(number: int, tars: RemoteTars, listing: Listing) -> None:
    for name in tars.files:
        if name.endswith(".tar"):
            listing.tars.append((number, RemoteFile(tars, name), name))
        else:
            listing.others += 1
            listing.tables.append((number, RemoteFile(tars, name)))


def take_inventory(listing: Listing) -> Inventory:
    """Add the members of the tars, and what a downloader says of files."""
    scans = list(_scan_tars(listing.tars))
    in_tars = pa.concat_tables([FILES.empty_table(), *(scan.files for scan in scans)])
    tables = (read_downloads(number, listing.roots[number], file) for number, file in listing.tables)
    downloads = pa.concat_tables([DOWNLOADS.empty_table(), *tables])
    is_there = pc.equal(downloads["status"], "success")

    return Inventory(
        roots=listing.roots,
        files=_described(pa.concat_tables([listing.files, in_tars]), downloads.filter(is_there)),
        annotations=listing.annotations,
        dead=downloads.filter(pc.invert(is_there)),
        damaged=_damaged([readable(path or tar.name) for _, tar, path in listing.tars], scans),
        others=listing.others,
    )


def _damaged(tars: list[str], scans: list[Scan]) -> list[Damage]:
    """Return the damages, and how many images lie behind each, by the bytes that an image of these tars takes.

    A file that is damaged from its first byte on is perhaps no tar of images at all: it counts as one image.
    """
    per_byte = sum(scan.images for scan in scans) / max(1, sum(scan.read for scan in scans))
    return [
        Damage(
            tar=tar,
            fault=scan.fault,
            lost=max(1, max(scan.listed, _estimated(scan, per_byte)) - len(scan.files)),
        )
        for tar, scan in zip(tars, scans, strict=True)
        if scan.fault
    ]


def _estimated(scan: Scan, per_byte: float) -> int:
    return scan.images + round(scan.unread * per_byte) if scan.read else 0


def _not_a_folder(root: Path) -> str:
    """Say what is given instead of a folder of images."""
    if not root.exists():
        return "no such folder"
    return "a file; give the folder that has it, a list of images (.jsonl, .csv, .tsv, .parquet), or a .tar of images"


def _rows(number: int, root: Path, flag: str, listing: Listing, visited: set[str]) -> Iterator[tuple[Any, ...]]:
    if root.is_file() and root.suffix == ".tar":
        listing.tars.append((number, root, ""))
        return
    if not root.is_dir():
        raise UsageError(f"{flag} {root}: {_not_a_folder(root)}")

    links = []
    for path, is_link in _walk(root, flag, visited):
        extension = os.path.splitext(path)[1].lower()
        if extension == ".tar":
            listing.tars.append((number, root / path, path))
        elif extension not in EXTENSIONS:
            listing.others += 1
            if extension in ANNOTATIONS:
                listing.annotations.append(root / path)
            if extension == ".parquet":
                listing.tables.append((number, root / path))
        elif is_link:
            links.append(path)
        else:
            yield _row(number, path)

    for path in links:  # last, so that a link to what is listed already is left out
        real = os.path.realpath(root / path)
        if real not in visited and not _listed(real, visited):
            visited.add(real)
            yield _row(number, path)


def _listed(real: str, folders: set[str]) -> bool:
    folder, name = os.path.split(real)
    is_image = not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
    return is_image and folder in folders and os.path.exists(real)


def _row(number: int, path: str) -> tuple[Any, ...]:
    text = readable(path)
    return number, text, None if text == path else os.fsencode(path), None, None, None, None, None


def _walk(root: Path, flag: str, visited: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield the relative paths of visible files in a fixed order, and whether each is a link.

    Links to folders are followed, but no folder is visited twice. What is no regular file (a pipe, a device) is left
    out, unless it has an image's name: then it is refused later by that, as a link that leads nowhere is.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        place = os.path.join(root, folder)
        if (real := os.path.realpath(place)) in visited:
            continue

        visited.add(real)
        try:
            with os.scandir(place) as scan:
                entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise UsageError(f"{flag} {place}: cannot be listed: {error.strerror}") from None

        inner = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                inner.append(path)
            elif entry.is_file() or _leads_nowhere(entry) or _looks_like_an_image(entry):
                yield path, entry.is_symlink()

        folders.extend(reversed(inner))


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _looks_like_an_image(entry: "os.DirEntry[str]") -> bool:
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS - {""}


def _scan_tars(tars: list[tuple[int, File, str]]) -> Iterator[Scan]:
    """Look into each tar; many are read by several processes."""
    if len(tars) < 8:
        yield from map(scan_tar, tars)
        return
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        yield from pool.map(scan_tar, tars)


def scan_tar(place: tuple[int, File, str]) -> Scan:
    """List a tar's images, with the texts beside them.

    Its path is given as root, file, and path under the root. Of a damaged tar these are the images before the damage,
    but for those whose texts may lie behind it.

    Raises:
        OperationError: the tar lies behind a URL and cannot be fetched.
    """
    number, tar, path = place
    beside = tar.beside if isinstance(tar, RemoteFile) else tar.with_suffix(".parquet")
    listed = _told(beside) if beside else set()
    with opened(tar) as local:
        return _scanned(number, Path(local), path, readable(path or tar.name), listed)


def _scanned(number: int, tar: Path, path: str, label: str, listed: set[str]) -> Scan:
    raw = os.fsencode(path)
    images: list[tuple[str, Member]] = []  # with their stems
    sidecars: defaultdict[str, dict[str, str]] = defaultdict(dict)
    kinds: defaultdict[str, set[str]] = defaultdict(set)  # of the text files beside each image
    fault, size, read = "", 0, 0

    try:
        size = tar.stat().st_size
        with Window(tar, WINDOW) as window:
            for member in members(window, foreign=True):
                read = member.end
                if os.path.basename(member.name).startswith("."):
                    continue

                stem, extension = os.path.splitext(member.name)
                if extension.lower() in EXTENSIONS and extension:
                    images.append((stem, member))
                elif extension in (".txt", ".json") and stem not in listed:
                    kinds[stem].add(extension)
                    if member.size <= SIDECAR_BYTES:
                        content = window.content(member.data, member.data + member.size)
                        sidecars[stem].update(_sidecar(extension, content))
    except (TarFault, OSError) as error:
        fault = reason(error)

    whole = _with_their_texts(images, kinds, listed) if fault else images

    rows = (
        (
            *(number, f"{label}/{_harmless(member.name)}", raw, member.data, member.size),
            *(beside.get(name) for name in ("url", "text", "fault")),
        )
        for stem, member in whole
        for beside in [sidecars.get(stem, {})]
    )
    # A table takes a tenth of the memory of a list of rows, and of the time to send it to another process.
    return Scan(
        files=table(FILES, rows),
        fault=fault,
        read=read,
        unread=size - read if fault else 0,
        images=len(images),
        listed=len(listed),
    )


def _with_their_texts(
    images: list[tuple[str, Member]], kinds: dict[str, set[str]], listed: set[str]
) -> list[tuple[str, Member]]:
    """Leave out images before a damage that may have texts behind it.

    Those lack a kind of text file that another image has; of a first image nobody knows what it should have. What the
    table beside the tar says of an image is whole.
    """
    stems = {stem for stem, _ in images}
    usual = {kind for stem in stems for kind in kinds.get(stem, ())}
    return [
        (stem, member)
        for stem, member in images
        if stem in listed or (len(stems) > 1 and kinds.get(stem, set()) >= usual)
    ]


def _told(file: File) -> set[str]:
    """Return the keys of a tar's members whose URL and caption the table beside the tar says: no need to read them."""
    with opened(file) as path, suppress(OSError, pa.ArrowException):
        if set(pq.read_schema(path).names) >= DOWNLOADED:
            rows = pq.read_table(path, columns=sorted(DOWNLOADED))
            full = pc.and_(rows["url"].is_valid(), rows["caption"].is_valid())
            return set(rows["key"].filter(pc.and_(full, pc.equal(rows["status"], "success"))).to_pylist())
    return set()


def _harmless(member: str) -> str:
    """Return a member's name as a path that leads nowhere else."""
    text = member.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "/".join(part for part in text.split("/") if part not in ("", ".", ".."))


def _sidecar(extension: str, content: bytes) -> dict[str, str]:
    try:
        text = decode(content).strip()
    except NotText as error:
        return {"fault": f"its {extension} file: {error}"}

    if extension == ".txt":
        return {"text": text}

    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}

    if not isinstance(record, dict):
        return {}

    names = {"url": "url", "caption": "text"}
    return {names[k]: v.strip() for k, v in record.items() if k in names and isinstance(v, str)}


def read_downloads(number: int, root: Path, file: File) -> pa.Table:
    """Return what one of img2dataset's tables (00042.parquet) says; no row of any other Parquet file."""
    inner = file.name if isinstance(file, RemoteFile) else str(file.relative_to(root))
    with opened(file) as path, reading(root / inner, "annotations"):
        schema = pq.read_schema(path)
        if not {"key", "url", "status"} <= set(schema.names):
            return DOWNLOADS.empty_table()
        names = [n for n in ("key", "url", "status", "caption", "error_message") if n in schema.names]
        rows = pq.read_table(path, columns=names)
        by_name = {n: array(rows[n]).cast(pa.string()) for n in names}

    image = pc.binary_join_element_wise(readable(str(Path(inner).with_suffix(""))), by_name["key"], "/")
    message = pc.coalesce(by_name.get("error_message", pa.nulls(len(rows), pa.string())), by_name["status"])
    return columns(
        DOWNLOADS,
        len(rows),
        root=number,
        image=image,
        url=by_name["url"],
        text=by_name.get("caption"),
        status=by_name["status"],
        message=message,
    )


def _described(files: pa.Table, downloads: pa.Table) -> pa.Table:
    """Fill in the URLs and captions of files from the tables beside them, where no file in a tar says them."""
    if not len(downloads):
        return files

    keys = without_extension(pc.replace_substring(array(files["path"]), ".tar/", "/"))
    rows = find(_rooted(files, keys), _rooted(downloads, array(downloads["image"])))
    for name in ("url", "text"):
        values = array(downloads[name]).take(pa.array(rows, mask=rows < 0))
        files = files.set_column(FILES.get_field_index(name), name, pc.coalesce(array(files[name]), values))

    return files


def _rooted(rows: pa.Table, names: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(array(rows["root"]).cast(pa.string()), names, "/")


def readable(path: str) -> str:
    """Return a path as text that can be stored: bytes of a name that are no UTF-8 become `\\xNN`.

    A backslash that would look like that is written as `\\x5c`, so that no two paths become one.
    """
    return re.sub(rb"\\(?=x[0-9a-f]{2})", rb"\\x5c", os.fsencode(path)).decode("utf-8", "backslashreplace")
