"""Conceptual Captions and SBU: lists of (URL, caption), and images that somebody downloaded, under whatever name."""

import hashlib
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from oscar_common.captions import TEXT_COLUMNS
from oscar_common.errors import UsageError
from oscar_common.tables import TEXTS, Ints, array, columns, find, last, numbers, once, reading, stems, strings, table
from oscar_common.text_files import lines, read_text, split_lines
from oscar_extract.sources.folder import read_files
from oscar_extract.sources.inventory import Bools
from oscar_extract.sources.place import Place, read_json, split_of
from oscar_extract.sources.tables import IMAGES, LEFT_OUT, Annotations

URL = r"(?i)^https?://"
COLUMNS = 100  # of a .tsv file that are looked at
SBU_URLS = r"(?i)(^|/)sbu[^/]*urls[^/]*\.txt$"
SBU_JSON = r"(?i)(^|/)sbu[^/]*\.json$"
MARKS = b"\xef\xbb\xbf\xff\xfe"  # bytes of byte-order marks
PEEK = 1 << 16  # bytes that tell whether a .tsv is a list of URLs, or something else, and large


def read_cc(place: Place) -> Annotations:
    """Read Conceptual Captions' TSV files of (caption, URL), in either order, or, without any, img2dataset's output."""
    parts: list[Annotations] = []
    seen: set[str] = set()
    for path in place.annotations(r"(?i)\.tsv$"):
        if (columns := _tsv(place, path)) is not None:
            split = split_of(path.stem)
            prefix = f"{path.stem}/" if split in seen else "" if split == "train" else f"{split}-"
            parts.append(_listed(place, prefix, split, *columns))
            seen.add(split)

    return _joined(place, parts) if parts else _downloads(place)


def read_sbu(place: Place) -> Annotations:
    """Read SBU's two line-aligned lists of URLs and captions, or its JSON file; without any, img2dataset's output."""
    for path in place.annotations(SBU_URLS):
        captions = path.with_name(path.name.replace("urls", "captions"))
        with reading(captions, "--root"):
            urls, texts = map(_lines, (path, captions))
            if len(urls) != len(texts):
                raise UsageError(
                    f"--root {place.root}: {path.name} has {len(urls)} lines, {captions.name} {len(texts)}"
                )

        return _joined(place, [_listed(place, "", "train", strings(urls), strings(texts))])

    for path in place.annotations(SBU_JSON):
        with reading(path, "--root"):
            content = read_json(path, (dict, list))
            if isinstance(content, dict) and {"image_urls", "captions"} <= content.keys():
                fields = [strings(content[k]) for k in ("image_urls", "captions")]
                return _joined(place, [_listed(place, "", "train", *fields)])

    return _downloads(place)


def _lines(path: Path) -> list[str]:
    """Return a file's lines, without the space around them."""
    return [line.strip() for line in lines(path, "--root")]


def _tsv(place: Place, path: Path) -> tuple[pa.Array, pa.Array, pa.Table] | None:
    """Return URLs, captions and malformed rows (schema LEFT_OUT) of a .tsv file; None if it is something else."""
    skipped: list[str] = []
    parse = csv.ParseOptions(
        delimiter="\t",
        quote_char=False,
        double_quote=False,
        invalid_row_handler=lambda row: _skip(skipped, row),
    )
    convert = csv.ConvertOptions(
        column_types={f"f{n}": pa.string() for n in range(COLUMNS)}, strings_can_be_null=False, null_values=[]
    )

    with reading(path, "--root"):
        if not _speaks_of_urls(path):
            return None

        content = read_text(path, "--root")
        if "\r" in content:  # Arrow would end a row there; where rows end in \n, it is white space in a caption
            content = "\n".join(split_lines(content)).replace("\r", " ")

        source = pa.BufferReader(content.encode())
        rows = csv.read_csv(source, csv.ReadOptions(autogenerate_column_names=True), parse, convert)
        texts = [array(column) for column in rows.columns[:COLUMNS]]

    address = next((n for n, t in enumerate(texts) if _is_url(t)), None)
    if address is None or len(texts) < 2:
        return None

    first = [pc.utf8_lower(pc.utf8_trim_whitespace(text[:1]))[0].as_py() for text in texts]
    caption = next((n for n, name in enumerate(first) if name in TEXT_COLUMNS), 1 if address == 0 else 0)
    if not re.match(URL, first[address]):  # a header
        texts = [column[1:] for column in texts]

    urls = pc.utf8_trim_whitespace(texts[address])
    lines = table(LEFT_OUT, [(place.name, path.name, "malformed-row", line[:200]) for line in skipped])
    return urls, texts[caption], lines


def _speaks_of_urls(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(PEEK).replace(b"\0", b"").lstrip(MARKS)  # of UTF-16, too, this leaves the URLs
    return re.search(rb"(?im)(^|[\t\r])\s*https?://", head) is not None


def _skip(skipped: list[str], row: Any) -> str:
    skipped.append(row.text)
    return "skip"


def _is_url(texts: pa.Array) -> bool:
    return bool(pc.sum(pc.match_substring_regex(texts[:100], URL)).as_py() or 0)


def _listed(
    place: Place, prefix: str, split: str, urls: pa.Array, captions: pa.Array, malformed: pa.Table | None = None
) -> Annotations:
    """Make the tables of a list; an image's id is its row. Files are looked for later, for all lists of a dataset."""
    count = len(urls)
    ids = pc.binary_join_element_wise(f"{place.name}/{prefix}", pa.array(np.arange(count)).cast(pa.string()), "")
    images = columns(IMAGES, count, dataset=place.name, image=ids, name=urls, file=-1, split=split)
    texts = columns(TEXTS, count, image=ids, kind="caption", source=place.name, id="0", text=captions)

    return Annotations(
        images=images,
        texts=texts if split in place.splits else TEXTS.empty_table(),
        left_out=LEFT_OUT.empty_table() if malformed is None else malformed,
    )


def _joined(place: Place, parts: list[Annotations]) -> Annotations:
    """Find the files of a dataset's lists."""
    images = pa.concat_tables([p.images for p in parts])
    urls, dead = array(images["name"]), place.inventory.dead
    why = find(urls, array(dead["url"]))
    messages = array(dead["message"]).take(pa.array(why, mask=why < 0))
    rows = _locate(place, images, np.cumsum([0, *(len(p.images) for p in parts)]).astype(np.int64))

    return Annotations(
        images=images.set_column(3, "file", pa.array(rows)).set_column(5, "message", messages),
        texts=pa.concat_tables([p.texts for p in parts]),
        left_out=pa.concat_tables([p.left_out for p in parts]),
    )


def _locate(place: Place, images: pa.Table, starts: Ints) -> Ints:
    """Return the file of each image of several lists: by the URL that a downloader noted, else by the names in use.

    These are the URL's last part (where no two share it), its MD5, SHA-1 or SHA-256, ROW_CRC32; and for files that are
    called by a number, whatever of the URL's last part, its CRC-32 and the row explains the most of them: a lucky hit
    of one must not hide the others.
    """
    urls = array(images["name"])
    files = place.inventory.files
    rows = place.locate(urls, array(files["url"]), place.name)
    free = array(files["url"]).is_null().to_numpy(zero_copy_only=False)
    stems = place.inventory.stems
    numbered = pc.match_substring_regex(stems, r"^\d+$").to_numpy(zero_copy_only=False)
    if (which := free & place.silent & ~numbered).any():
        for candidates, names in _names(place, urls, starts, which):
            rows = _filled(rows, place.locate(candidates, names, place.name))

    if (which := free & place.certain & numbered).any():
        rows = _filled(rows, max(_numbers(place, images, starts, which), key=lambda found: int((found >= 0).sum())))

    return rows


def _filled(rows: Ints, more: Ints) -> Ints:
    return np.where(rows < 0, more, rows)


def _names(place: Place, urls: pa.Array, starts: Ints, which: Bools) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield names that the images of these URLs may have, and the files' names to compare them with."""
    named = pc.if_else(pa.array(which), place.inventory.names, None)
    stem = pc.if_else(pa.array(which), place.inventory.stems, None)
    last_part = _last_part(urls)
    yield once(last_part), once(named)
    yield once(stems(last_part)), once(stem)

    for size, digest in ((32, hashlib.md5), (40, hashlib.sha1), (64, hashlib.sha256)):
        if pc.any(pc.match_substring_regex(stem, rf"^[0-9a-fA-F]{{{size}}}$")).as_py():
            yield strings([digest(u.encode()).hexdigest() for u in urls.to_pylist()]), pc.utf8_lower(stem)

    if pc.any(pc.match_substring_regex(stem, r"^\d+_\d+$")).as_py():
        row = (np.arange(len(urls)) - np.repeat(starts[:-1], np.diff(starts))).tolist()
        yield strings([f"{n}_{c}" for n, c in zip(row, _sums(urls), strict=True)]), stem


def _numbers(place: Place, images: pa.Table, starts: Ints, which: Bools) -> Iterator[Ints]:
    """Yield the files of images for each way of calling them by a number."""
    urls = array(images["name"])
    stem = pc.if_else(pa.array(which), place.inventory.stems, None)
    yield place.locate(once(stems(_last_part(urls))), once(stem), place.name)
    number = numbers(stem)
    yield place.locate(strings(list(map(str, _sums(urls)))), number, place.name)
    rows = np.full(len(urls), -1, np.int64)
    seen: set[str] = set()

    for start, end in pairwise(starts):
        split = images["split"][int(start)].as_py() if end > start else "train"
        if split in seen:
            continue  # of several lists, the rows of the first are meant

        seen.add(split)
        of_split = which & _of_split(place.inventory.paths, split)
        if len(starts) == 2 and not of_split.any():
            of_split = which  # there is no other split to tell it from

        count = pa.array(np.arange(end - start)).cast(pa.string())
        rows[start:end] = place.locate(count, pc.if_else(pa.array(of_split), number, None), place.name)

    yield rows


def _of_split(paths: pa.Array, split: str) -> Bools:
    """Which files may belong to a split: validation images lie in a folder that says so."""
    is_validation = pc.match_substring_regex(paths, r"(?i)(^|/)([^/]*[-_])?val(id|idation)?([-_][^/]*)?/")
    is_val: Bools = is_validation.to_numpy(zero_copy_only=False)
    return is_val if split == "val" else ~is_val


def _last_part(urls: pa.Array) -> pa.Array:
    return last(pc.replace_substring_regex(urls, r"[?#].*$", ""))


def _sums(urls: pa.Array) -> list[int]:
    return [crc32(u.encode()) for u in urls.to_pylist()]


def _downloads(place: Place) -> Annotations:
    """Read the dataset from img2dataset's output, which holds the captions, too."""
    files = place.inventory.files
    from_tar = array(files["offset"]).is_valid().to_numpy(zero_copy_only=False)
    from_url = array(files["url"]).is_valid().to_numpy(zero_copy_only=False)
    which = place.silent & (from_tar | from_url)
    if not which.any() and not len(place.dead):
        raise UsageError(
            f"--root {place.root}: neither a list of URLs and captions nor tars of images in it, which --dataset "
            f"{place.name} needs"
        )

    return read_files(place, which)
