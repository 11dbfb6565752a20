"""Conceptual Captions and SBU: lists of (URL, caption), and images that somebody downloaded, under whatever name."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from oscar_common.errors import UsageError
from oscar_extract.sources.folder import read_folder
from oscar_extract.sources.place import Place, read_json, split_of
from oscar_extract.sources.tables import (
    IMAGES,
    LEFT_OUT,
    TEXTS,
    Annotations,
    Ints,
    array,
    columns,
    find,
    last,
    numbers,
    once,
    reading,
    stems,
    strings,
    table,
)

URL = r"(?i)^https?://"
SBU_URLS = r"(?i)(^|/)sbu[^/]*urls[^/]*\.txt$"
SBU_JSON = r"(?i)(^|/)sbu[^/]*\.json$"


def read_cc(place: Place) -> Annotations:
    """Read Conceptual Captions' TSV files of (caption, URL), in either order, or, without any, img2dataset's output."""
    parts = [part for path in place.annotations(r"\.tsv$") if (part := _tsv(place, path)) is not None]
    return _joined(place, parts) if parts else _downloads(place)


def read_sbu(place: Place) -> Annotations:
    """Read SBU's two line-aligned lists of URLs and captions, or its JSON file; without any, img2dataset's output."""
    for path in place.annotations(SBU_URLS):
        captions = path.with_name(path.name.replace("urls", "captions"))
        with reading(captions, "--root"):
            urls, texts = (p.read_text(encoding="utf-8", errors="replace").splitlines() for p in (path, captions))
            if len(urls) != len(texts):
                raise UsageError(
                    f"--root {place.root}: {path.name} has {len(urls)} lines, {captions.name} {len(texts)}"
                )
        return _joined(place, [_listed(place, "", pa.array(urls, pa.string()), pa.array(texts, pa.string()))])
    for path in place.annotations(SBU_JSON):
        with reading(path, "--root"):
            content = read_json(path, dict)
            found = [pa.array(content[k], pa.string()) for k in ("image_urls", "captions")]
            return _joined(place, [_listed(place, "", *found)])
    return _downloads(place)


def _tsv(place: Place, path: Path) -> Annotations | None:
    """Read a .tsv file of captions and URLs; None if it is something else."""
    skipped: list[str] = []
    parse = csv.ParseOptions(
        delimiter="\t",
        quote_char=False,
        double_quote=False,
        invalid_row_handler=lambda row: _skip(skipped, row),
    )
    convert = csv.ConvertOptions(
        column_types={f"f{n}": pa.string() for n in range(100)}, strings_can_be_null=False, null_values=[]
    )
    with reading(path, "--root"):
        content = path.read_bytes().decode("utf-8-sig", "replace").encode()
        if not content.strip():
            return None
        rows = csv.read_csv(pa.BufferReader(content), csv.ReadOptions(autogenerate_column_names=True), parse, convert)
    texts = [array(column) for column in rows.columns]
    address = next((n for n, t in enumerate(texts) if _is_url(t)), None)
    if address is None or len(texts) < 2:
        return None
    caption = 1 if address == 0 else 0
    if not pc.match_substring_regex(texts[address][:1], URL)[0].as_py():  # a header
        texts = [column[1:] for column in texts]
    prefix = "" if (split := split_of(path.stem)) == "train" else f"{split}-"
    listed = _listed(place, prefix, texts[address], texts[caption])
    lines = [(place.name, path.name, "malformed-row", line[:200]) for line in skipped]
    return Annotations(images=listed.images, texts=listed.texts, left_out=table(LEFT_OUT, lines))


def _skip(skipped: list[str], row: Any) -> str:
    skipped.append(row.text)
    return "skip"


def _is_url(texts: pa.Array) -> bool:
    return bool(pc.sum(pc.match_substring_regex(texts[:100], URL)).as_py() or 0)


def _listed(place: Place, prefix: str, urls: pa.Array, captions: pa.Array) -> Annotations:
    """Make the tables of a list; an image's id is its row. Files are looked for later, for all lists of a dataset."""
    count = len(urls)
    ids = pc.binary_join_element_wise(f"{place.name}/{prefix}", pa.array(np.arange(count)).cast(pa.string()), "")
    split = prefix.rstrip("-") or "train"
    images = columns(IMAGES, count, dataset=place.name, image=ids, name=urls, file=-1, split=split)
    texts = columns(TEXTS, count, image=ids, kind="caption", source=place.name, id="0", text=captions)
    return Annotations(images=images, texts=texts if split in place.splits else TEXTS.empty_table())


def _joined(place: Place, parts: list[Annotations]) -> Annotations:
    """Find the files of a dataset's lists."""
    located = []
    dead = place.inventory.dead
    for part in parts:
        urls = array(part.images["name"])
        split = part.images["split"][0].as_py() if len(urls) else "train"
        why = find(urls, array(dead["url"]))
        messages = array(dead["message"]).take(pa.array(why, mask=why < 0))
        rows = _locate(place, urls, split)
        images = part.images.set_column(3, "file", pa.array(rows)).set_column(5, "message", messages)
        located.append(images)
    return Annotations(
        images=pa.concat_tables(located),
        texts=pa.concat_tables([p.texts for p in parts]),
        left_out=pa.concat_tables([p.left_out for p in parts]),
    )


def _locate(place: Place, urls: pa.Array, split: str) -> Ints:
    """Return the file of each URL: by the URL that the downloader noted, else by the names in use.

    These are the URL's last part (where no two share it), its MD5, SHA-1, SHA-256 or CRC-32, ROW_CRC32, and ROW.
    """
    files = place.inventory.files
    rows = place.locate(urls, array(files["url"]), place.name)
    unnamed = array(files["url"]).is_null().to_numpy(zero_copy_only=False) & _of_split(place.inventory.paths, split)
    if not unnamed.any():
        return rows
    for wanted, names in _names(place, urls, rows):
        found = place.locate(wanted, pc.if_else(pa.array(unnamed), names, None), place.name)
        rows[rows < 0] = found[rows < 0]
    return rows


def _of_split(paths: pa.Array, split: str) -> npt.NDArray[np.bool_]:
    """Which files may belong to a split: validation images lie in a folder that says so."""
    said = pc.match_substring_regex(paths, r"(?i)(^|/)([^/]*_)?val(id|idation)?(_[^/]*)?/")
    is_val: npt.NDArray[np.bool_] = said.to_numpy(zero_copy_only=False)
    return is_val if split == "val" else ~is_val


def _names(place: Place, urls: pa.Array, found: Ints) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield names that the images of these URLs may have, and the files' names to compare them with.

    Row numbers come last, and only if no other way of naming has found anything: any number would be some row's.
    """
    inventory, plain = place.inventory, pc.replace_substring_regex(urls, r"[?#].*$", "")
    some = inventory.stems[:1000].to_pylist()
    yield once(last(plain)), once(inventory.names)
    yield once(stems(plain)), once(inventory.stems)
    for size, digest in ((32, hashlib.md5), (40, hashlib.sha1), (64, hashlib.sha256)):
        if any(len(s) == size for s in some):
            yield strings([digest(u.encode()).hexdigest() for u in urls.to_pylist()]), inventory.stems
    sums = [crc32(u.encode()) & 0xFFFFFFFF for u in urls.to_pylist()]
    if any("_" in s for s in some):
        yield strings([f"{n}_{c}" for n, c in enumerate(sums)]), inventory.stems
    if any(s.isdigit() for s in some):
        yield strings([str(c) for c in sums]), numbers(inventory.stems)
    if (found < 0).all() and any(s.isdigit() for s in some):
        yield strings([str(n) for n in range(len(urls))]), numbers(inventory.stems)


def _downloads(place: Place) -> Annotations:
    """Read the dataset from img2dataset's tars, which hold the captions, too."""
    if not pc.any(place.inventory.files["offset"].is_valid()).as_py():
        raise UsageError(
            f"--root {place.root}: neither a list of URLs and captions nor tars of images in it, which --dataset "
            f"{place.name} needs"
        )
    return read_folder(place)
