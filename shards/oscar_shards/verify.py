"""Every byte of shards read again: what differs from index, manifest or contract, by shard and key."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError, reason
from oscar_common.processes import each
from oscar_common.progress import meter, plural
from oscar_shards import seal
from oscar_shards.index import (
    PLACES,
    SCHEMA,
    Row,
    columns,
    in_batches,
    index_path,
    load_index,
    make_batch,
    places,
    read_bounded,
    read_row,
    size_said,
)
from oscar_shards.manifest import FILE, JOB_FILE, LEFT_OUT_FILE, MISSING_FILE, PLAN_FILE, Manifest
from oscar_shards.pages.page import size
from oscar_shards.quantise import are_finite
from oscar_shards.read import manifest_of, tars_at
from oscar_shards.samples import Entry, array, entries
from oscar_shards.tar import TarFault, Window, members
from oscar_shards.values import Boxes, check_fit, check_values
from oscar_shards.write import rejects_path

GLANCE = 64 << 10  # bytes of the window when arrays are not read
MEGA = 1_000_000
MOST_REJECTS = 10_000_000  # of a shard
REJECTS_LIMIT = 1 << 30  # bytes of them
Findings = Iterator[tuple[str, str]]  # (key, what is wrong with it); the key is empty where it is the whole shard


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in one tar; `faults` are (key, what is wrong)."""

    faults: list[tuple[str, str]]
    keys: pa.Array
    texts: int
    rejects: int
    bytes: int
    unsealed: list[Path]


def verify(paths: Iterable[Path], quick: bool, workers: int | None) -> int:
    """Check shards, and Parquet files of this project, and print what is wrong with them; return 1 if anything is.

    Raises:
        UsageError: a path has no tar.
    """
    began = time.monotonic()
    paths = list(paths)
    tables = [path for path in paths if path.suffix == ".parquet" and path.is_file()]
    tars = list(dict.fromkeys(tar for path in paths if path not in tables for tar in tars_at(path)))
    sizes = {tar: tar.stat().st_size for tar in tars}
    reports: dict[Path, Report] = {}
    faults = done = 0
    unsealed: list[Path] = []

    for path in tables:
        if message := _check_seal(path, False, unsealed):
            print(f"{path}: {_in_line(message)}")
            faults += 1

    with meter("MB", sum(sizes.values()) // MEGA, refusal="faults") as progress:
        for tar, report in each(partial(check, quick=quick), tars, workers):
            reports[tar] = report
            for key, message in report.faults:
                print(f"{tar}: {_in_line(f'{key}: {message}' if key else message)}", flush=True)
            done, faults = done + sizes[tar], faults + len(report.faults)
            progress.show(done // MEGA, faults)

    for folder in dict.fromkeys(tar.parent for tar in tars):
        for message in check_folder(folder, {t: reports[t] for t in tars if t.parent == folder}, unsealed):
            print(f"{folder}: {_in_line(message)}")
            faults += 1

    unsealed += [path for report in reports.values() for path in report.unsealed]
    if unsealed:
        print(
            f"not covered: {plural(len(unsealed), 'file')} of an older version without a seal ({unsealed[0]}, ...); "
            "what they say was checked, but not every byte of them"
        )

    if not tars:
        print(f"{plural(len(tables), 'file')}: {f'{faults} damaged' if faults else 'no fault'}")
        return int(faults > 0)

    images, texts = (sum(n) for n in zip(*((len(r.keys), r.texts) for r in reports.values()), strict=True))
    read, seconds = sum(r.bytes for r in reports.values()), time.monotonic() - began
    extent = "sizes and headers" if quick else size(read)
    rate = "" if quick else f", {size(read / seconds)}/s"
    result = plural(faults, "fault") if faults else "no fault"
    counts = f"{plural(len(tars), 'shard')}, {plural(images, 'image')}, {plural(texts, 'text')}"
    print(f"{counts}: {result} ({extent} in {seconds:.1f} s{rate})")

    return int(faults > 0)


def check(tar: Path, quick: bool) -> Report:
    """Check one tar with its index and its folder's manifest."""
    faults: list[tuple[str, str]] = []
    unsealed: list[Path] = []
    stored = manifest = None

    try:
        with suppress(UsageError):  # `check_folder` tells
            manifest = manifest_of(tar)
        stored = read_stored(tar, faults)
        table = _read(tar, manifest, stored, quick, faults)
    except OSError as error:
        faults.append(("", f"cannot be read: {error.strerror or error}"))
        table = SCHEMA.empty_table()

    sealed = manifest is not None and manifest.seal is not None
    for path in (index_path(tar), rejects_path(tar)):
        is_reported = path == index_path(tar) and stored is None
        if path.exists() and not is_reported and (message := _check_seal(path, sealed, unsealed)):
            faults.append(("", f"{path.name}: {message}"))

    if stored is not None:
        faults.extend(_differences(stored, table, {key for key, _ in faults}))

    counted = stored if quick and stored is not None else table
    return Report(
        faults=faults,
        keys=table["key"].combine_chunks(),
        texts=pc.sum(pc.list_value_length(counted["texts"])).as_py() or 0 if "texts" in counted.schema.names else 0,
        rejects=_count_rejects(tar, faults),
        bytes=tar.stat().st_size if tar.exists() else 0,
        unsealed=unsealed,
    )


def _check_seal(path: Path, sealed: bool, unsealed: list[Path]) -> str:
    """Return what is wrong with a file's seal; where none is expected (not `sealed`), note a file that has none."""
    try:
        broken = seal.broken(path)
    except OSError as error:
        return f"cannot be read: {reason(error)}"

    if broken is None and not sealed:
        unsealed.append(path)
        return ""

    return seal.BROKEN if broken else "its seal is not there" if broken is None else ""


def _count_rejects(tar: Path, faults: list[tuple[str, str]]) -> int:
    path = rejects_path(tar)
    if not path.exists():
        return 0

    try:
        return len(read_bounded(path, MOST_REJECTS, REJECTS_LIMIT))
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        faults.append(("", f"{path.name} is damaged ({reason(error)})"))
        return 0


def read_stored(tar: Path, faults: list[tuple[str, str]]) -> pa.Table | None:
    """Read the index beside a tar, if it is whole and of this version."""
    try:
        table = load_index(tar)
    except ValueError as error:
        faults.append(("", str(error)))
        return None

    if (stored_size := size_said(table.schema)) != (actual_size := tar.stat().st_size):
        faults.append(("", f"it has {actual_size:,} bytes, its index says {stored_size:,}"))

    return table


def _read(
    tar: Path, manifest: Manifest | None, stored: pa.Table | None, quick: bool, faults: list[tuple[str, str]]
) -> pa.Table:
    """Read a tar and return its rebuilt index without the images whose faults are noted; if `quick`, key and places."""
    with Window(tar, GLANCE) if quick else Window(tar) as window:
        fitting = check_fit(_sound(_entries(window, stored, faults), faults), manifest, faults)
        if quick:
            rows = [(entry.key, places(entry, None, lambda span: None)) for entry in fitting]
            keys = pa.array([key for key, _ in rows], pa.string())
            return pa.table([keys, *columns(row for _, row in rows)], schema=pa.schema([SCHEMA.field("key"), *PLACES]))

        boxes = Boxes()
        batches = []
        for part in in_batches(_rows(window, fitting, boxes, faults)):
            batch, wrong = make_batch(part)
            batches.append(batch)
            faults.extend(wrong)
            boxes.drop({key for key, _ in wrong})

    table = pa.Table.from_batches(batches, SCHEMA)
    faults.extend(check_values(table, boxes, manifest))
    return table


def _entries(window: Window, stored: pa.Table | None, faults: list[tuple[str, str]]) -> Iterator[Entry]:
    """Yield the images of a tar; after a damage go on with the next one that the index knows."""
    begins = np.zeros(0, np.int64) if stored is None else np.sort(stored["sample_offset"].to_numpy())
    offset = 0
    while True:
        try:
            yield from entries(window, members(window, offset))
            return
        except TarFault as fault:
            faults.append((_key_at(stored, fault.offset), str(fault)))
            later = begins[(begins > max(fault.offset, offset)) & (begins < window.size)]
            if not len(later):
                return
            offset = int(later[0])


def _key_at(stored: pa.Table | None, offset: int) -> str:
    """Return the key of the image that has a byte, as the index says, or an empty one."""
    if stored is None:
        return ""
    begin, size = stored["sample_offset"].to_numpy(), stored["sample_bytes"].to_numpy()
    rows = np.flatnonzero((begin <= offset) & (offset < begin + size))
    return str(stored["key"][int(rows[0])]) if len(rows) else ""


def _sound(found: Iterator[Entry], faults: list[tuple[str, str]]) -> Iterator[Entry]:
    for entry in found:
        if entry.faults:
            faults.append((entry.key, "; ".join(entry.faults)))
        else:
            yield entry


def _rows(window: Window, found: Iterator[Entry], boxes: Boxes, faults: list[tuple[str, str]]) -> Iterator[Row]:
    for entry in found:
        assert entry.boxes
        assert entry.features
        try:
            row = read_row(window, entry)
            boxes.add(entry.key, array(window, entry.boxes))
            if not are_finite(array(window, entry.scales or entry.features)):  # int8 is finite
                faults.append((entry.key, "features are not all finite numbers"))
        except TarFault as fault:  # it became shorter meanwhile
            faults.append((entry.key, str(fault)))
            return

        yield row


def _differences(stored: pa.Table, rebuilt: pa.Table, listed: set[str]) -> Findings:
    """Report where the rebuilt index differs from the stored one; nothing more of the keys in `listed`."""
    if not stored["key"].equals(rebuilt["key"]):
        lost = pc.invert(pc.is_in(stored["key"], value_set=rebuilt["key"].combine_chunks()))
        gone = [key for key in stored["key"].filter(lost).to_pylist() if key not in listed]
        if gone:
            yield gone[0], f"{len(gone)} images of the index are not in the tar (this is the first)"

        unknown = pc.invert(pc.is_in(rebuilt["key"], value_set=stored["key"].combine_chunks()))
        yield from ((key, "it is not in the index") for key in rebuilt["key"].filter(unknown).to_pylist())
        rows = pc.index_in(stored["key"], value_set=rebuilt["key"].combine_chunks())
        stored, rebuilt = stored.filter(pc.is_valid(rows)), rebuilt.take(rows.drop_null())

    different: dict[str, list[str]] = defaultdict(list)
    for name in rebuilt.schema.names:
        if rebuilt[name].null_count == len(rebuilt) and name.endswith("_xxh3"):
            continue  # not read, or scales that are not there; these are noticed by their offsets

        if not rebuilt[name].equals(stored[name]):
            ours, theirs = rebuilt[name].combine_chunks(), stored[name].combine_chunks()
            for row in range(len(rebuilt)):
                if not ours.slice(row, 1).equals(theirs.slice(row, 1)):
                    different[str(rebuilt["key"][row])].append(_NAMES.get(name, name))

    for key, names in different.items():
        if key not in listed:
            yield key, f"not what the index says: {', '.join(names)}"


_NAMES = {
    "frame_xxh3": "the bytes of headers, JSON or padding",
    "boxes_xxh3": "the bytes of boxes",
    "scales_xxh3": "the bytes of scales",
    "features_xxh3": "the bytes of features",
}


def check_folder(folder: Path, reports: dict[Path, Report], unsealed: list[Path]) -> Iterator[str]:
    """Say what is wrong with a folder as a whole; of some of its tars only what these say. Files without a seal, which
    older versions wrote, are added to `unsealed`."""
    yield from _twice({tar.name: report.keys for tar, report in reports.items()})
    try:
        manifest = manifest_of(folder)
    except UsageError as error:
        yield f"{error.message}; until then P, vocabulary and counts are not checked"
        return

    if manifest is None:
        indexes = [path for path in map(index_path, reports) if path.exists() and path not in unsealed]
        if indexes and set(folder.glob("[!.]*.tar")) <= set(reports):
            again = f"restore it from a copy, or run oscar-shards index {folder}"
            yield f"{FILE}: it is not there, but there was one when {indexes[0].name} was written; {again}"
        return

    broken = seal.broken_json((folder / FILE).read_bytes())
    if broken:
        yield f"{FILE}: {seal.BROKEN}"
    elif broken is None:
        unsealed.append(folder / FILE)

    if (folder / JOB_FILE).exists() and seal.broken_json((folder / JOB_FILE).read_bytes()) is not False:
        yield f"{JOB_FILE}: {seal.BROKEN}"

    for name in (PLAN_FILE, LEFT_OUT_FILE, MISSING_FILE):
        if (folder / name).exists() and (message := _check_seal(folder / name, manifest.seal is not None, unsealed)):
            yield f"{name}: {message}"

    if set(manifest.tars(folder)) - set(reports):
        return

    beside = {path for tar in reports for path in (index_path(tar), rejects_path(tar))}
    for stray in sorted(set(folder.glob("[!.]*.parquet")) - beside):
        if not stray.name.startswith("_"):
            yield f"{stray.name}: its tar is not there"

    yield from _counts(manifest, reports)


def _twice(keys: dict[str, pa.Array]) -> Iterator[str]:
    """Say which keys occur more than once, and in which tars."""
    counts = pc.value_counts(pa.chunked_array(keys.values(), pa.string()))
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    where: dict[str, list[str]] = defaultdict(list)

    for name, own_rows in keys.items() if len(several) else ():
        for key in own_rows.filter(pc.is_in(own_rows, value_set=several)).to_pylist():
            where[key].append(name)

    for key, names in where.items():
        yield f"{key}: it is there {len(names)} times, in {', '.join(dict.fromkeys(names))}"


def _counts(manifest: Manifest, reports: dict[Path, Report]) -> Iterator[str]:
    plan = manifest.plan
    images, texts, rejects = (
        sum(n) for n in zip(*((len(r.keys), r.texts, r.rejects) for r in reports.values()), strict=True)
    )
    if len(reports) != plan.num_shards:
        yield f"{len(reports)} of the {plan.num_shards} shards of manifest.json are there"
    elif not images <= plan.num_images <= images + rejects:
        yield f"{images} images and {rejects} rejects; manifest.json says {plan.num_images} images"
    elif texts > plan.num_texts or (texts < plan.num_texts and images == plan.num_images):
        yield f"{texts} texts; manifest.json says {plan.num_texts}"


def _in_line(text: str) -> str:
    """Return a text of unknown origin so that a terminal shows it in one line and does nothing else."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
