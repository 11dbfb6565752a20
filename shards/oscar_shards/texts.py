"""Texts laid over shards: a Parquet file that adds texts to images, or replaces theirs; the shards stay as they are.

An overlay has a row a text: `key`, the image's in the shards, and the columns of a text. Its schema's metadata says
which texts of the shards it leaves, but anybody's Parquet file with such columns will do.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.captions import FLAG, match, read_beside, read_texts
from oscar_common.errors import UsageError, nearest
from oscar_common.files import check_output_file, replacing
from oscar_common.progress import plural
from oscar_common.tables import Ints, array, columns, find, in_line, last, numbers, once, reading
from oscar_shards.content import TEXT
from oscar_shards.index import index_path
from oscar_shards.read import is_whole, read_index, tars_at
from oscar_shards.seal import write_sealed
from oscar_shards.values import KINDS

OVERLAY = pa.schema([("key", pa.string()), *TEXT])
FORMAT = b"oscar.texts"  # keys of the schema's metadata: the format's version, and one of MODES
REPLACE = b"oscar.texts.replace"
VERSION = b"1"
MODES = ("none", "image", "all")  # the shards' texts stay; stay where the overlay has none for the image; go
NAMES = ["key", "path", "id", "source"]  # columns of the indexes by which files may name images
COCO = r"^(COCO_\w+_)?\d{12}(\.|$)"


def write_overlay(
    path: Path, files: Sequence[Path], source: str | None, replace: str, out: Path, overwrite: bool = False
) -> None:
    """Write the texts of some files as an overlay for the shards at `path`, a folder or a tar.

    Raises:
        UsageError: no shards, a file that cannot be read or names none of their images, or an `out` of another form.
    """
    began = time.monotonic()
    check_overlay_file(out, overwrite)
    images = pa.concat_tables([image_names(tar) for tar in tars_at(path)])
    made = pa.concat_tables([_texts(file, source, images, path) for file in files])
    schema = OVERLAY.with_metadata({FORMAT: VERSION, REPLACE: replace})
    out.parent.mkdir(parents=True, exist_ok=True)

    with replacing(out) as file:
        write_sealed(made.replace_schema_metadata(schema.metadata), file, compression="zstd", write_page_checksum=True)

    reached, seconds = pc.count_distinct(made["key"]).as_py(), time.monotonic() - began
    print(f"{out}: {plural(len(made), 'text')} for {reached:,} of {plural(len(images), 'image')}, {seconds:.1f} s")


def check_overlay_file(out: Path, overwrite: bool, mark: bytes = FORMAT) -> None:
    """Check that an overlay may be written to `out`.

    Raises:
        UsageError: it does not end in .parquet, is a file of shards, or is another's and `overwrite` is not set.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise UsageError(f"--out {out}: an overlay is a file that ends in .parquet")
    if out.with_suffix(".tar").exists() or out.name.startswith("_"):
        raise UsageError(f"--out {out}: that is the name of a file of the shards; give another")
    check_output_file(out, "--out", mark=mark, overwrite=overwrite, makes_folder=True)


def image_names(tar: Path) -> pa.Table:
    """Return the columns NAMES of a tar's index, and no others if it has one."""
    if is_whole(tar) and set(NAMES) <= set(pq.read_schema(index_path(tar)).names):
        with reading(index_path(tar), "PATH"):
            return pq.read_table(index_path(tar), columns=NAMES, partitioning=None)
    return read_index(tar).select(NAMES)


def _texts(file: Path, source: str | None, images: pa.Table, path: Path) -> pa.Table:
    """Read one file of texts, joined to the images: a table of the schema OVERLAY."""
    if file.is_dir():
        texts = read_beside(file, array(images["path"]), source or file.name)
    elif file.is_file():
        texts = read_texts(file, source or file.stem)
    else:
        raise UsageError(f"{FLAG} {file}: no such file")

    names = array(texts["image"]).dictionary_encode()  # an image is named once for each of its texts
    rows = match_images(names.dictionary, images)[names.indices.to_numpy()]
    known = rows >= 0
    if not known.any():
        like = ", ".join(repr(images[name][0].as_py()) for name in ("path", "id") if len(images))
        raise UsageError(
            f"{FLAG} {file}: none of its {len(texts):,} texts names an image of {path} (images there are like "
            f"{like or 'none'}); give the texts of these images"
        )

    if not known.all():
        first = texts["image"][int(np.flatnonzero(~known)[0])].as_py()
        warn_of(f"{(~known).sum():,} of {len(texts):,} texts name no image, the first: {first!r}", f"{FLAG} {file}")

    keys = images["key"].take(pa.array(rows[known]))
    return texts.filter(pa.array(known)).set_column(0, "key", array(keys)).cast(OVERLAY)


def match_images(wanted: pa.Array, images: pa.Table) -> Ints:
    """Return the image that each name means, or -1: by key, path, source/id, id; see `oscar_common.captions.match`.

    COCO's file names mean the image of that number, whichever year's name the shards have for it.
    """
    keys, paths, ids, sources = (pc.fill_null(array(images[name]), "") for name in NAMES)
    exact = (keys, once(paths), once(pc.binary_join_element_wise(sources, ids, "/")), once(ids))
    rows = match(wanted, exact, paths, ids)
    of_coco = pc.match_substring_regex(last(wanted), COCO)
    unknown = np.flatnonzero((rows < 0) & of_coco.to_numpy(zero_copy_only=False))
    rows[unknown] = find(numbers(last(wanted.take(pa.array(unknown)))), once(numbers(last(ids))))

    return rows


@dataclass(frozen=True)
class Overlay:
    """Texts for some rows of a table of images; `rows`, sorted, says whose each of `texts` is. mode: one of MODES."""

    texts: pa.StructArray
    rows: Ints
    mode: str

    def laid_over(self, texts: pa.ListArray, start: int) -> pa.ListArray:
        """Return the texts of the images from row `start` on with this overlay applied."""
        begin, end = np.searchsorted(self.rows, (start, start + len(texts)))
        return _merged(texts, self.texts[begin:end], self.rows[begin:end] - start, self.mode)


def overlaid(table: pa.Table, files: Sequence[Path], flag: str = "--texts") -> pa.Table:
    """Return a table of images (its columns `key` and `texts` are those of an index) with overlays applied, in order.

    New texts stand after those that an image keeps, in the order of their file.

    Raises:
        UsageError: a file is missing, damaged, has other columns, or names no image.
    """
    overlays = read_overlays(array(table["key"]), files, flag)
    chunks = table["texts"].chunks
    starts = np.cumsum([0, *map(len, chunks)])

    for overlay in overlays:
        chunks = [overlay.laid_over(chunk, int(start)) for chunk, start in zip(chunks, starts, strict=False)]

    position = table.schema.get_field_index("texts")
    return table.set_column(position, table.schema.field("texts"), pa.chunked_array(chunks, pa.list_(TEXT)))


def read_overlays(keys: pa.Array, files: Sequence[Path], flag: str = "--texts") -> list[Overlay]:
    """Read overlays for the images that have these keys, row by row.

    Raises:
        UsageError: a file is missing, damaged, has other columns, or names no image.
    """
    return [_joined(keys, file, flag) for file in files]


def _joined(keys: pa.Array, file: Path, flag: str) -> Overlay:
    overlay, mode = read_overlay(file, flag)
    rows = find(array(overlay["key"]), keys)
    if not (rows >= 0).any():
        key = keys[0].as_py() if len(keys) else None
        raise UsageError(
            f"{flag} {file}: none of its {len(overlay):,} texts has the key of an image (keys are like {key!r}); "
            "make it with: oscar-shards texts"
        )

    if len(strays := np.flatnonzero(rows < 0)):
        first = overlay["key"][int(strays[0])].as_py()
        warn_of(
            f"{len(strays):,} of {len(overlay):,} texts have no image's key, the first: {first!r}", f"{flag} {file}"
        )

    order = np.argsort(rows, kind="stable")[len(strays) :]  # stable: an image's texts stay in their order
    new = overlay.select(TEXT.names).take(pa.array(order))
    texts = pa.StructArray.from_arrays([array(new[name]) for name in TEXT.names], fields=list(TEXT))
    return Overlay(texts, rows[order], mode)


def read_overlay(file: Path, flag: str = "--texts") -> tuple[pa.Table, str]:
    """Return an overlay as a table of the schema OVERLAY, and which of MODES it is; what it need not say is filled in.

    Raises:
        UsageError: it is missing, damaged, of a later format, or lacks a column.
    """
    if not file.is_file():
        raise UsageError(f"{flag} {file}: no such file; give one that oscar-shards texts wrote")

    with reading(file, flag):
        table = pq.read_table(file, partitioning=None, page_checksum_verification=True)
        metadata = table.schema.metadata or {}
        if (version := metadata.get(FORMAT, VERSION)) != VERSION:
            raise UsageError(
                f"{flag} {file}: format {in_line(version.decode())}; this version reads {VERSION.decode()}"
            )
        if (mode := metadata.get(REPLACE, b"none").decode()) not in MODES:
            raise UsageError(f"{flag} {file}: its metadata says replace {mode!r}{nearest(mode, MODES)}")

        return _checked(table, file, flag), mode


def _checked(table: pa.Table, file: Path, flag: str) -> pa.Table:
    """Cast the columns of a file to OVERLAY, fill in those that may be missing, and check what texts need."""
    names = set(table.column_names)
    if "key" not in names or not ("text" in names or {"question", "answer"} <= names):
        raise UsageError(
            f"{flag} {file}: it has the columns {in_line(', '.join(table.column_names))}; needed are key, and text or "
            "question and answer"
        )

    columns_cast = {name: _cast(table[name], name) for name in OVERLAY.names if name in names}
    nothing = pa.nulls(len(table), pa.string())
    is_qa = pc.and_(*(columns_cast.get(name, nothing).is_valid() for name in ("question", "answer")))
    derived = {
        "kind": pc.if_else(is_qa, "qa", "caption"),
        "source": pa.repeat(pa.scalar(file.stem), len(table)),
        "id": pa.array(np.arange(len(table))).cast(pa.string()),
    }
    columns_cast |= {name: pc.coalesce(columns_cast.get(name, nothing), fill) for name, fill in derived.items()}
    if len(odd := np.flatnonzero(~_bools(pc.is_in(columns_cast["kind"], value_set=pa.array(KINDS))))):
        kind = columns_cast["kind"][int(odd[0])].as_py()
        raise UsageError(f"{flag} {file}: row {odd[0]} has the kind {kind!r}; known: {', '.join(KINDS)}")

    says = pc.if_else(pc.equal(columns_cast["kind"], "qa"), is_qa, columns_cast.get("text", nothing).is_valid())
    if len(odd := np.flatnonzero(~_bools(pc.and_(says, columns_cast["key"].is_valid())))):
        column_name = "question and answer" if columns_cast["kind"][int(odd[0])].as_py() == "qa" else "text"
        raise UsageError(f"{flag} {file}: row {odd[0]} lacks its key or its {column_name}")

    return columns(OVERLAY, len(table), **columns_cast)


def _cast(column: pa.ChunkedArray, name: str) -> pa.Array:
    """Return a column as text; whole numbers may be keys and ids."""
    form = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    if not any(test(form) for test in plain):
        raise ValueError(f"the column {name} is {form}, not text")
    return array(column.cast(pa.string()))


def _bools(column: pa.Array) -> npt.NDArray[np.bool_]:
    values: npt.NDArray[np.bool_] = column.to_numpy(zero_copy_only=False)
    return values


def _merged(chunk: pa.ListArray, new: pa.StructArray, rows: Ints, mode: str) -> pa.ListArray:
    """Return lists of texts with new ones behind; `rows`, sorted, says whose each of these is."""
    old, owner = chunk.flatten(), pc.list_parent_indices(chunk).to_numpy().astype(np.int64)
    if mode != "none":
        replaced = np.isin(owner, rows) if mode == "image" else np.ones(len(owner), bool)
        old, owner = old.filter(pa.array(~replaced)), owner[~replaced]

    owners = np.concatenate([owner, rows])
    order = np.argsort(owners, kind="stable")
    values = pa.concat_arrays([old, new]).take(pa.array(order))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(chunk)))]).astype(np.int32)

    return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(TEXT))


def warn_of(line: str, where: str) -> None:
    """Print a warning about the file that `where` names."""
    print(f"warning: {where}: {line}", file=sys.stderr, flush=True)
