"""The files of a job: every image under its folders and in the tars there, found once, before anything reads them."""

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.errors import UsageError, reason
from oscar_common.tables import Ints, array, columns, find, last, reading, stems, table, without_extension
from oscar_extract.images import EXTENSIONS
from oscar_extract.sources.tables import FILES
from oscar_extract.sources.tars import Window, members

ANNOTATIONS = frozenset({".json", ".jsonl", ".tsv", ".csv", ".txt", ".token", ".parquet"})
SIDECAR_BYTES = 1 << 20  # a caption or the metadata of one image is smaller
FAMILIES = {  # folder names by which the image sets of a shared root are told apart
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
class Inventory:
    """`files`: a table of the schema FILES. `annotations`: other files that may say something of them.

    `dead`: what img2dataset's tables say was not to be had, of the schema DOWNLOADS. `others`: how many files are
    neither.
    """

    roots: list[Path]
    files: pa.Table
    annotations: list[Path]
    dead: pa.Table
    damaged: list[tuple[str, str]]  # tars that end before they should, and what is wrong with them
    others: int

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
        said = np.full(len(folder.dictionary), "", dtype="U9")
        for name, pattern in FAMILIES.items():
            said[pc.match_substring_regex(folder.dictionary, pattern).to_numpy(zero_copy_only=False)] = name
        found: npt.NDArray[np.str_] = said[folder.indices.to_numpy()]
        return found

    @cached_property
    def outer_family(self) -> npt.NDArray[np.str_]:
        """The same, and where those say nothing, what the root's own name speaks of."""
        outer = [next((n for n, p in FAMILIES.items() if re.search(p, r.resolve().name)), "") for r in self.roots]
        found = np.array(outer or [""], dtype="U9")[array(self.files["root"]).to_numpy()]
        return np.where(self.family == "", found, self.family)

    def under(self, folder: Path) -> Bools:
        """Which files lie under a folder of the job, bool [F]."""
        return lie_under(self.roots, folder, self.files["root"], self.paths)

    def locate(self, wanted: pa.Array, names: pa.Array, family: str, root: Path) -> Ints:
        """Return the row in `files` of each wanted name, or -1; `names` are the files' names to compare with.

        The dataset's own folder comes first, and never a file from a folder that speaks of another image set.
        """
        rows = np.full(len(wanted), -1, np.int64)
        own = self.under(root)
        for mask in (
            own & (self.family == family),
            own & (self.family == ""),
            ~own & (self.outer_family == family),
            ~own & (self.outer_family == ""),
        ):
            places = np.flatnonzero(mask)
            if len(places):
                found = find(wanted, names.take(pa.array(places)))
                rows = np.where(rows < 0, np.where(found < 0, -1, places[found]), rows)
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
    tars: list[tuple[int, Path, str]] = field(default_factory=list)  # root, tar, and its path relative to the root
    tables: list[tuple[int, Path]] = field(default_factory=list)  # annotations that a downloader may have written
    others: int = 0


def list_files(roots: list[Path], flag: str, skip: Path | None = None) -> Listing:
    """List the images under `roots`, known extensions or none at all, no hidden files; and the tars.

    A file that is reached twice through symbolic links counts once. `skip` is a folder to leave alone.

    Raises:
        UsageError: no such folder.
    """
    found = Listing(roots=roots)
    seen: set[str] = {os.path.realpath(skip)} if skip else set()
    rows = chain.from_iterable(_rows(number, root, flag, found, seen) for number, root in enumerate(roots))
    found.files = table(FILES, rows)
    return found


def take_inventory(found: Listing) -> Inventory:
    """Add the members of the tars, and what a downloader says of files."""
    scanned = list(_scan_tars(found.tars))
    members = pa.concat_tables([FILES.empty_table(), *(of_tar for of_tar, _ in scanned)])
    tables = (read_downloads(number, found.roots[number], path) for number, path in found.tables)
    downloads = pa.concat_tables([DOWNLOADS.empty_table(), *tables])
    is_there = pc.equal(downloads["status"], "success")
    return Inventory(
        roots=found.roots,
        files=_described(pa.concat_tables([found.files, members]), downloads.filter(is_there)),
        annotations=found.annotations,
        dead=downloads.filter(pc.invert(is_there)),
        damaged=[(readable(tar[2]), fault) for tar, (_, fault) in zip(found.tars, scanned, strict=True) if fault],
        others=found.others,
    )


def _not_a_folder(root: Path) -> str:
    """Say what is given instead of a folder of images."""
    if not root.exists():
        return "no such folder"
    return "a file; give the folder that has it, a list of images (.jsonl, .csv, .tsv, .parquet), or a .tar of images"


def _rows(number: int, root: Path, flag: str, found: Listing, seen: set[str]) -> Iterator[tuple[Any, ...]]:
    if root.is_file() and root.suffix == ".tar":
        found.tars.append((number, root, ""))
        return
    if not root.is_dir():
        raise UsageError(f"{flag} {root}: {_not_a_folder(root)}")
    links = []
    for path, is_link in _walk(root, flag, seen):
        extension = os.path.splitext(path)[1].lower()
        if extension == ".tar":
            found.tars.append((number, root / path, path))
        elif extension not in EXTENSIONS:
            found.others += 1
            if extension in ANNOTATIONS:
                found.annotations.append(root / path)
            if extension == ".parquet":
                found.tables.append((number, root / path))
        elif is_link:
            links.append(path)
        else:
            yield _row(number, path)
    for path in links:  # last, so that a link to what is listed already is left out
        real = os.path.realpath(root / path)
        if real not in seen and not _listed(real, seen):
            seen.add(real)
            yield _row(number, path)


def _listed(real: str, folders: set[str]) -> bool:
    folder, name = os.path.split(real)
    is_image = not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
    return is_image and folder in folders and os.path.exists(real)


def _row(number: int, path: str) -> tuple[Any, ...]:
    text = readable(path)
    return number, text, None if text == path else os.fsencode(path), None, None, None, None


def _walk(root: Path, flag: str, seen: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield the relative paths of visible files in a fixed order, and whether each is a link.

    Links to folders are followed, but no folder is visited twice. What is no regular file (a pipe, a device) is left
    out, unless it has an image's name: then it is refused later by that, as a link that leads nowhere is.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        place = os.path.join(root, folder)
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
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


def _scan_tars(tars: list[tuple[int, Path, str]]) -> Iterator[tuple[pa.Table, str]]:
    """Yield the image members of each tar, and what is wrong with it; many are read by several processes."""
    if len(tars) < 8:
        yield from map(_scanned, tars)
        return
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        yield from pool.map(_scanned, tars)


def _scanned(place: tuple[int, Path, str]) -> tuple[pa.Table, str]:
    """Return a table, which takes a tenth of the memory, and of the time to send, of a list of rows."""
    rows, fault = scan_tar(place)
    return table(FILES, rows), fault


def scan_tar(place: tuple[int, Path, str]) -> tuple[list[tuple[Any, ...]], str]:
    """Return rows of the schema FILES for a tar's images, with the texts beside them; and what is wrong with it."""
    number, tar, path = place
    label, raw = readable(path or tar.name), os.fsencode(path)
    images: list[tuple[str, str, int, int]] = []
    sidecars: dict[str, dict[str, str]] = {}
    fault = ""
    told = _told(tar.with_suffix(".parquet"))
    try:
        with Window(tar) as file:
            for name, offset, size in members(file):
                stem, extension = os.path.splitext(name)
                if extension.lower() in EXTENSIONS and extension:
                    images.append((name, stem, offset, size))
                elif extension in (".txt", ".json") and size <= SIDECAR_BYTES and stem not in told:
                    sidecars.setdefault(stem, {}).update(_sidecar(extension, file.read(offset, size)))
    except (TarError, OSError) as error:
        fault = reason(error)
    rows = [
        (number, f"{label}/{_harmless(member)}", raw, offset, size, beside.get("url"), beside.get("text"))
        for member, stem, offset, size in images
        for beside in [sidecars.get(stem, {})]
    ]
    return rows, fault


def _told(path: Path) -> set[str]:
    """Return the keys of a tar's members whose URL and caption the table beside the tar says: no need to read them."""
    with suppress(OSError, pa.ArrowException):
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
    text = content.decode("utf-8", "replace").strip()
    if extension == ".txt":
        return {"text": text}
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    names = {"url": "url", "caption": "text"}
    return {names[k]: v.strip() for k, v in said.items() if k in names and isinstance(v, str)}


def read_downloads(number: int, root: Path, path: Path) -> pa.Table:
    """Return what one of img2dataset's tables (00042.parquet) says; no row of any other Parquet file."""
    with reading(path, "annotations"):
        schema = pq.read_schema(path)
        if not {"key", "url", "status"} <= set(schema.names):
            return DOWNLOADS.empty_table()
        wanted = [n for n in ("key", "url", "status", "caption", "error_message") if n in schema.names]
        rows = pq.read_table(path, columns=wanted)
        said = {n: array(rows[n]).cast(pa.string()) for n in wanted}
    image = pc.binary_join_element_wise(readable(str(path.relative_to(root).with_suffix(""))), said["key"], "/")
    message = pc.coalesce(said.get("error_message", pa.nulls(len(rows), pa.string())), said["status"])
    return columns(
        DOWNLOADS,
        len(rows),
        root=number,
        image=image,
        url=said["url"],
        text=said.get("caption"),
        status=said["status"],
        message=message,
    )


def _described(files: pa.Table, downloads: pa.Table) -> pa.Table:
    """Fill in the URLs and captions of files from the tables beside them, where no file in a tar says them."""
    if not len(downloads):
        return files
    keys = without_extension(pc.replace_substring(array(files["path"]), ".tar/", "/"))
    rows = find(_rooted(files, keys), _rooted(downloads, array(downloads["image"])))
    for name in ("url", "text"):
        said = array(downloads[name]).take(pa.array(rows, mask=rows < 0))
        files = files.set_column(FILES.get_field_index(name), name, pc.coalesce(array(files[name]), said))
    return files


def _rooted(rows: pa.Table, names: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(array(rows["root"]).cast(pa.string()), names, "/")


def readable(path: str) -> str:
    """Return a path as text that can be stored: bytes of a name that are no UTF-8 become `\\xNN`.

    A backslash that would look like that is written as `\\x5c`, so that no two paths become one.
    """
    return re.sub(rb"\\(?=x[0-9a-f]{2})", rb"\\x5c", os.fsencode(path)).decode("utf-8", "backslashreplace")
